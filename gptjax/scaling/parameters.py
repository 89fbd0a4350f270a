"""Parameters of a model by formula: the shapes of its arrays, and how many numbers they hold.

Tests compare the formulas with the model.
"""

import functools
import math
from typing import Literal, NamedTuple

from gptjax.config import GPTConfig
from gptjax.config.model import GATE_CHANNELS


class Parameter(NamedTuple):
    """An array of parameters.

    Attributes:
      shape: experts on the first axis, if there are several.
      kind: kernel: multiplied in a layer; table: rows are looked up; head: the head's matrix, which is also the table
        of tokens if it is tied; vector: biases, gains and other parameters without a matrix product; balance: a bias
        that the load of experts moves, without moments in the optimizer; image: any array of the image encoder and the
        projector, which no token of text reads.
      of_experts: whether each token reads only the entries of its experts.
    """

    shape: tuple[int, ...]
    kind: Literal["kernel", "table", "head", "vector", "balance", "image"]
    of_experts: bool = False

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@functools.lru_cache(maxsize=256)
def parameter_count(model: GPTConfig) -> int:
    """Number of parameters; vocab_size must be set. A tied head (Radford et al. 2018, section 3.1) counts once."""
    return sum(part.size for part in parameters(model))


@functools.lru_cache(maxsize=256)
def non_embedding_parameter_count(model: GPTConfig) -> int:
    """Number of parameters without embeddings and head: N of Kaplan et al. 2020, section 2.1, with biases."""
    return sum(part.size for part in parameters(model) if part.kind not in ("table", "head"))


@functools.lru_cache(maxsize=256)
def active_parameter_count(model: GPTConfig) -> int:
    """Number of parameters that compute one token: those of its experts, and of no others.

    The head counts, embeddings that are looked up do not.
    """
    return sum(active_size(model, part) for part in parameters(model) if part.kind not in ("table", "image"))


@functools.lru_cache(maxsize=256)
def expert_parameter_count(model: GPTConfig) -> int:
    """Number of parameters of all experts, which the mesh axis "expert" shards; without routers."""
    return sum(part.size for part in parameters(model) if part.of_experts)


def active_size(model: GPTConfig, part: Parameter) -> int:
    """The number of entries that one token reads."""
    if not part.of_experts:
        return part.size
    assert model.num_experts is not None
    return part.size // model.num_experts * model.experts_per_token


@functools.lru_cache(maxsize=256)
def parameters(model: GPTConfig) -> tuple[Parameter, ...]:
    """All arrays, each layer's separately."""
    layers = (part for layer in range(model.num_layers) for part in layer_parameters(model, layer))
    return (*_outer_parameters(model), *layers, *image_parameters(model))


@functools.lru_cache(maxsize=256)
def image_parameters(model: GPTConfig) -> tuple[Parameter, ...]:
    """All arrays of the image encoder and the projector; none if the model reads no images."""
    vision = model.vision
    if vision.encoder == "none":
        return ()
    patch = 3 * vision.patch_size**2
    if vision.encoder == "patches":
        D = model.embed_dim
        shapes: list[tuple[int, ...]] = [(patch, D), (D,), (vision.num_patches, D)]
    else:
        encoder = model.image_encoder
        W, D = vision.embed_dim, model.embed_dim
        shapes = [(patch, W), (encoder.context_length, W), (W,), (W,)]  # the last two: the final norm
        shapes += vision.patch_bias * [(W,)] + vision.class_token * [(W,)] + vision.embedding_norm * [(W,), (W,)]
        shapes += [part.shape for n in range(vision.num_layers) for part in layer_parameters(encoder, n)]
        shapes += [(W, D), (D,)] + (vision.projector == "mlp") * [(D, D), (D,)]
    return tuple(Parameter(shape, "image") for shape in shapes)


def vocab_size(model: GPTConfig) -> int:
    """The vocabulary size, which must be set."""
    assert model.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
    return model.vocab_size


def _outer_parameters(model: GPTConfig) -> list[Parameter]:
    """Embeddings, head and final norm."""
    table = (vocab_size(model), model.embed_dim)
    found = [Parameter(table, "head" if model.tied_head else "table")]
    if not model.tied_head:
        found.append(Parameter(table, "head"))
    if (layers := len(model.value_embedding_layers)) > 0:
        found.append(Parameter((table[0], layers * model.kv_heads * model.head_dim), "table"))
    if model.positions == "learned":
        found.append(Parameter((model.context_length, model.embed_dim), "table"))
    return found + (_norm(model) if model.norm_position == "pre" else [])


@functools.lru_cache(maxsize=1024)
def layer_parameters(model: GPTConfig, layer: int) -> tuple[Parameter, ...]:
    """The arrays of one layer, counted from 0."""
    found = _attention(model, layer) + _feed_forward(model) + 2 * _norm(model)
    if model.adapter_dim is not None:
        D, A = model.embed_dim, model.adapter_dim
        found += 2 * (_dense((D,), (A,), bias=True) + _dense((A,), (D,), bias=True))
    if model.residual_scalars:
        found += 2 * [Parameter((), "vector")]
    return tuple(found)


def _attention(model: GPTConfig, layer: int) -> list[Parameter]:
    D, H, kv, K = model.embed_dim, model.num_heads, model.kv_heads, model.head_dim
    if kv == H:
        found = _dense((D,), (3, H, K), model.qkv_bias)
    else:
        found = _dense((D,), (H, K), model.qkv_bias) + _dense((D,), (2, kv, K), model.qkv_bias)
    found += [Parameter((H, K, D), "kernel")]
    if model.attention_out_bias:
        found += [Parameter((D,), "vector")]
    if model.attention_sinks:
        found += [Parameter((H,), "vector")]
    if model.qk_norm and model.qk_norm_gain:
        found += 2 * [Parameter((K,), "vector")]
    if layer in model.value_embedding_layers:
        found += [Parameter((GATE_CHANNELS, kv), "kernel")]
    return found


def _feed_forward(model: GPTConfig) -> list[Parameter]:
    """The feed-forward layer; or the router, and the layers of all experts."""
    D, F, E = model.embed_dim, model.feed_forward_dim, model.num_experts
    inner = _dense((D,), (F,), model.ffw_bias)
    layer = (2 * inner if model.gated else inner) + _dense((F,), (D,), model.ffw_bias)
    if E is None:
        return layer
    router = _dense((D,), (E,), model.router_bias) + ([Parameter((E,), "balance")] if model.balance_bias else [])
    return router + [Parameter((E, *part.shape), part.kind, of_experts=True) for part in layer]


def _norm(model: GPTConfig) -> list[Parameter]:
    if not model.norm_gain:
        return []
    return (2 if model.norm == "layer" else 1) * [Parameter((model.embed_dim,), "vector")]


def _dense(inputs: tuple[int, ...], outputs: tuple[int, ...], bias: bool) -> list[Parameter]:
    kernel = Parameter((*inputs, *outputs), "kernel")
    return [kernel, Parameter(outputs, "vector")] if bias else [kernel]
