"""Floating-point operations of a model by formula.

These are formulas because XLA's cost analysis counts the body of a scan over layers only once. Tests compare them with
the model.
"""

import dataclasses
import functools
from typing import Literal

from gptjax.config import GPTConfig
from gptjax.scaling.parameters import active_size, layer_parameters, vocab_size


@functools.lru_cache(maxsize=256)
def forward_flops_per_token(model: GPTConfig) -> int:
    """Floating-point operations of the forward pass over a full context, per token.

    Counts every matrix product, two operations per multiply-add: the layers, the head, and attention's two products. A
    mixture counts the router and the experts of the token. Attention is counted as PaLM does (Chowdhery et al. 2022,
    appendix B): a dense layer as if each position saw all `context_length` of them, the causal half included; a banded
    layer as if each saw min(band_width, context_length). Embedding look-ups, biases, norms, softmax, rotations and
    activations are not counted.
    """
    layers = range(model.num_layers)
    return sum(kernel_flops(model, n) + attention_flops(model, n) for n in layers) + head_flops(model)


@functools.lru_cache(maxsize=1024)
def kernel_flops(model: GPTConfig, layer: int) -> int:
    """Forward pass of a layer per token: the products with its kernels."""
    return 2 * sum(active_size(model, part) for part in layer_parameters(model, layer) if part.kind == "kernel")


@functools.lru_cache(maxsize=256)
def expert_flops(model: GPTConfig) -> int:
    """Forward pass of all layers per token: the products with kernels of experts; a part of `kernel_flops`."""
    parts = (part for n in range(model.num_layers) for part in layer_parameters(model, n))
    return 2 * sum(active_size(model, part) for part in parts if part.of_experts and part.kind == "kernel")


def attention_flops(model: GPTConfig, layer: int) -> int:
    """Forward pass of a layer per token: scores, and weighted sums of values."""
    return 4 * model.num_heads * model.head_dim * seen_positions(model, layer)


def seen_positions(model: GPTConfig, layer: int) -> int:
    """The most positions that one position of a layer attends to, and a decoding cache keeps."""
    kind = model.attention_pattern[layer % len(model.attention_pattern)]
    return model.context_length if kind == "dense" else min(model.band_width, model.context_length)


def image_flops(model: GPTConfig) -> int:
    """Forward pass of the image encoder and the projector per image; its tokens then cost what tokens of text do."""
    vision = model.vision
    if vision.encoder == "none":
        return 0
    patch = 3 * vision.patch_size**2
    if vision.encoder == "patches":
        return 2 * vision.num_patches * patch * model.embed_dim
    encoder, W = model.image_encoder, vision.embed_dim
    length = encoder.context_length
    layer = kernel_flops(encoder, 0) + 4 * length * W  # scores, and weighted sums of values
    patches = 2 * vision.num_patches * patch * W
    return patches + vision.layers_read * length * layer + sum(_projector_flops(model))


def _projector_flops(model: GPTConfig) -> tuple[int, int]:
    """Forward pass per image of the two layers of the projector behind an encoder."""
    vision, D = model.vision, model.embed_dim
    first, second = vision.embed_dim * D, (vision.projector == "mlp") * D * D
    return 2 * vision.tokens_per_image * first, 2 * vision.tokens_per_image * second


def image_step_flops(model: GPTConfig, trained: Literal["all", "projector", "none"]) -> int:
    """Floating-point operations of a training step per image, in the encoder and the projector.

    Args:
      trained: their trained part. Where it is the projector, the gradient of its input is not computed.
    """
    forward = image_flops(model)
    if trained == "all":
        return 3 * forward
    first, second = _projector_flops(model) if model.vision.encoder == "vit" else (0, 0)
    return forward + (first + 2 * second if trained == "projector" else 0)


def most_images(model: GPTConfig) -> int:
    """The number of images that fit into a context, each with a token of text; 0 for a model of text."""
    if not model.reads_images:
        return 0
    return max(1, model.context_length // (model.vision.tokens_per_image + 1))


def head_flops(model: GPTConfig) -> int:
    """Forward pass of the head per token."""
    return 2 * model.embed_dim * vocab_size(model)


def flops_per_token(model: GPTConfig) -> int:
    """Floating-point operations per token of a training step in which all parameters are trained.

    It is three times the forward pass, as the backward pass costs two. Recomputation by rematerialisation is not
    counted (Chowdhery et al. 2022, appendix B).
    """
    return 3 * forward_flops_per_token(model)


@dataclasses.dataclass(frozen=True)
class TrainedPart:
    """The trained part of a model whose other parameters are frozen.

    Attributes:
      weights: trained entries of matrices that one token is multiplied by: kernels of layers, and the head, which is
        the token embedding if it is tied. Kernels of experts count with those of the token's experts only.
      low_rank: the same of low-rank matrices next to kernels.
      lowest_layer: the number, from 0, of the lowest layer with trained parameters; the backward pass ends there.
    """

    weights: int
    low_rank: int
    lowest_layer: int


def partial_flops_per_token(model: GPTConfig, trained: TrainedPart) -> int:
    """Floating-point operations per token of a training step in which a part of the parameters is trained.

    The forward pass, the gradients of activations down to the lowest trained layer, and the gradients of trained
    weights; with everything trained it is `flops_per_token`.
    """
    above = range(trained.lowest_layer, model.num_layers)
    layers = sum(kernel_flops(model, n) + 2 * attention_flops(model, n) for n in above)
    low_rank = 3 * 2 * trained.low_rank  # forward pass, gradients of activations, gradients of weights
    return forward_flops_per_token(model) + layers + head_flops(model) + 2 * trained.weights + low_rank
