"""Configuration of the model in groups: architecture, initialisation and regularisation, execution.

The groups are base classes, so that all fields are keys of one section: `model.num_layers`, `model.remat`. The defaults
are GPT-2's. Each field of the architecture can be combined with any other, so that every difference between GPT-2 and
gpt-oss is an ablation.
"""

import dataclasses
from typing import Literal

from gptjax.config.errors import UserError

# --- architecture -----------------------------------------------------------------------------------------------------

QUICK_GELU_BETA = 1.702  # x sigmoid(1.702 x) approximates the GELU (Hendrycks and Gimpel 2016, section 2)
GATE_CHANNELS = 12  # first channels of the hidden state, the inputs of the gates of value embeddings


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Vocabulary, context, depth and width."""

    vocab_size: int | None = None  # rows of the token embedding; None: the tokenizer's vocabulary
    context_length: int = 1024  # most positions of a text
    num_layers: int = 12
    embed_dim: int = 768


@dataclasses.dataclass(frozen=True)
class Positions:
    """Position encoding."""

    # learned: an embedding for each position, added to the token's (GPT-1 to GPT-3); rotary: queries and keys are
    # rotated by angles proportional to their position (RoPE, Su et al. 2021, section 3.2)
    positions: Literal["learned", "rotary"] = "learned"
    rope_theta: float = 10_000.0  # base of the wavelengths of rotary positions
    # YaRN (Peng et al. 2023, section 3.4): extends rotary positions to yarn_factor times the context of pretraining.
    # None: no extension
    yarn_factor: float | None = None
    yarn_original_context: int = 4096  # positions of pretraining, before the extension
    yarn_beta_fast: float = 32.0  # rotations within the original context above which a frequency is kept
    yarn_beta_slow: float = 1.0  # rotations below which a frequency is divided by yarn_factor
    yarn_truncate: bool = True  # round the limits of the ramp between both to whole frequencies; gpt-oss does not
    yarn_attention_factor: float | None = None  # factor of cosines and sines; None: 0.1 ln(yarn_factor) + 1
    # Llama 3.1's extension of rotary positions: frequencies that rotate less than llama3_low_rotations times within the
    # original context are divided by this, those above llama3_high_rotations kept. None: no extension
    llama3_factor: float | None = None
    llama3_original_context: int = 8192  # positions of pretraining, before the extension
    llama3_low_rotations: float = 1.0
    llama3_high_rotations: float = 4.0


@dataclasses.dataclass(frozen=True)
class Normalisation:
    """Normalisation of hidden states, queries and keys."""

    norm: Literal["layer", "rms"] = "layer"  # rms: x / sqrt(mean x^2 + eps) (Zhang and Sennrich 2019)
    norm_gain: bool = True  # learned gains, and biases of layer norms; False: norms without parameters
    norm_position: Literal["pre", "post"] = "pre"  # GPT-1 is post-LN; from GPT-2 on, pre-LN with a final norm
    norm_eps: float = 1e-5
    norm_embedding: bool = False  # normalise the input of the first layer, without gain
    qk_norm: bool = False  # RMS norm of each query and key over its head's width (Henry et al. 2020)
    qk_norm_gain: bool = True  # a learned gain of that norm, shared by the heads
    qk_norm_scale: float = 1.0  # factor of normalised queries and keys


@dataclasses.dataclass(frozen=True)
class Attention:
    """Self-attention."""

    num_heads: int = 12
    # Heads of keys and values, each shared by num_heads / num_kv_heads query heads (grouped queries, Ainslie et al.
    # 2023). None: num_heads
    num_kv_heads: int | None = None
    head_width: int | None = None  # width of a head; None: embed_dim / num_heads
    scale_attention: bool = True  # divide attention scores by sqrt(head width); GPT-Neo does not
    qkv_bias: bool = True  # biases of queries, keys and values; GPT-Neo has none
    attention_out_bias: bool = True  # bias of the output projection
    # A learned logit for each head in the denominator of its softmax, so that a head may attend to nothing (gpt-oss)
    attention_sinks: bool = False
    # Kinds of attention, repeated over the layers; ("dense", "banded") is GPT-3's alternation. In a banded layer, a
    # position attends to the last band_width positions, including itself.
    attention_pattern: tuple[str, ...] = ("dense",)
    band_width: int = 256
    # Layers that add a gated embedding of the token to its value (value embeddings: Zhou et al. 2024, as gated in
    # karpathy/nanochat). alternate: every second layer, including the last
    value_embeddings: Literal["none", "alternate", "all"] = "none"


@dataclasses.dataclass(frozen=True)
class FeedForward:
    """The position-wise feed-forward layer, or that of one expert."""

    ffw_dim: int | None = None  # width of the feed-forward layer; None: 4 * embed_dim
    activation: Literal["gelu_tanh", "gelu_exact", "relu", "relu_squared", "silu"] = "gelu_tanh"
    gated: bool = False  # activation(gate(x)) * up(x) (Shazeer 2020); with silu this is SwiGLU
    swish_beta: float = 1.0  # silu is x * sigmoid(swish_beta * x); gpt-oss has 1.702
    # Limits of a gated layer: gate(x) is clipped from above, up(x) from both sides. gpt-oss has 7. None: no limit
    gate_limit: float | None = None
    up_offset: float = 0.0  # added to up(x) in a gated layer; gpt-oss has 1
    ffw_bias: bool = True  # biases of the feed-forward layer
    adapter_dim: int | None = None  # bottleneck width of adapters (Houlsby et al. 2019); None: no adapters


@dataclasses.dataclass(frozen=True)
class Experts:
    """A mixture of experts in place of each feed-forward layer (Shazeer et al. 2017)."""

    num_experts: int | None = None  # feed-forward layers of width ffw_dim in each layer; None: one, without a router
    experts_per_token: int = 2  # those with the largest router scores compute a token
    # Weights of a token's experts: softmax: of their router logits; sigmoid: sigmoids divided by their sum
    # (DeepSeek-V3, section 2.1.2)
    router_weights: Literal["softmax", "sigmoid"] = "softmax"
    router_bias: bool = False  # bias of the router's logits
    # A bias added to the scores for the choice of experts only, raised where an expert has too few tokens and lowered
    # where it has too many (auxiliary-loss-free load balancing: Wang et al. 2024)
    balance_bias: bool = False
    # Most tokens of an expert, as a multiple of the mean; tokens above it skip the expert (Fedus et al. 2021, section
    # 2.2). None: no token is dropped
    expert_capacity: float | None = None


@dataclasses.dataclass(frozen=True)
class Output:
    """The residual stream and the head."""

    tied_head: bool = True  # the head is the token embedding (Radford et al. 2018, section 3.1)
    logit_soft_cap: float | None = None  # logits are cap * tanh(logits / cap) (Gemma 2, section 2); None: no cap
    # Each layer reads a x + b x0 with learned scalars a and b, where x0 is the input of the first layer
    residual_scalars: bool = False


@dataclasses.dataclass(frozen=True)
class Parametrization:
    """Hyperparameter transfer: the size of the base model whose learning rate, weight decay and init_std are given."""

    # How initialisation, update sizes, attention scores, branches and logits depend on the size of the model, so that
    # its hyperparameters are those of the base model. standard: they do not; mup: on the width (Yang et al. 2022);
    # completep: on width and depth (Dey et al. 2025, alpha = 1). A model of the base size is the same in all three
    # (`models/parametrization.py`)
    parametrization: Literal["standard", "mup", "completep"] = "standard"
    base_width: int | None = None  # mup, completep: embed_dim of the base model, whose other widths are in proportion
    base_depth: int | None = None  # completep: num_layers of the base model
    # mup, completep: width of the base model's heads. None: that of this model, which has more heads instead
    base_head_width: int | None = None


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """Images as input, in the form of LLaVA (Liu et al. 2023, section 4.1).

    The defaults are LLaVA-1.5's, whose encoder is CLIP's ViT-L/14 at 336 pixels.
    """

    # none: text alone; vit: a vision transformer (Dosovitskiy et al. 2021) encodes each image, and a projector maps its
    # outputs to the width of the model; patches: a linear map of each patch, without an encoder
    encoder: Literal["none", "vit", "patches"] = "none"
    image_size: int = 336  # width and height of the image that the model reads, in pixels
    patch_size: int = 14  # width and height of a patch, in pixels
    # Conversion to a square. crop: the shorter edge to image_size, then the centre (CLIP); pad: to a square with the
    # mean colour, then resized (LLaVA-1.5); stretch: resized regardless of its proportions (SigLIP)
    resize: Literal["crop", "pad", "stretch"] = "crop"
    # Mean and standard deviation of red, green and blue, of 1, by which pixels are normalised; the defaults are CLIP's
    pixel_mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    pixel_std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)
    num_layers: int = 24  # of the vision transformer
    num_heads: int = 16
    embed_dim: int = 1024
    ffw_dim: int | None = None  # None: 4 * embed_dim
    activation: Literal["quick_gelu", "gelu_tanh", "gelu_exact"] = "quick_gelu"  # quick: x * sigmoid(1.702 x)
    norm_eps: float = 1e-5
    patch_bias: bool = False  # bias of the patch embedding; SigLIP has one
    class_token: bool = True  # a learned vector before the patches; SigLIP has none
    embedding_norm: bool = True  # layer norm before the first layer (CLIP)
    read_layer: int = -2  # layer whose output is read, from the last one, -1
    final_norm: bool = False  # layer norm of the outputs that are read
    keep_class_token: bool = False  # the output of the class token is one of an image's tokens
    projector: Literal["linear", "mlp"] = "mlp"  # mlp: linear, exact GELU, linear (LLaVA-1.5)
    # Token of the vocabulary that stands where an image's tokens are; None: one is added by the chat format
    image_token: int | None = None

    @property
    def num_patches(self) -> int:
        """Patches of an image."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def tokens_per_image(self) -> int:
        """Positions of the text that an image takes."""
        has_class_token = self.encoder == "vit" and self.class_token and self.keep_class_token
        return self.num_patches + has_class_token

    @property
    def layers_read(self) -> int:
        """Layers up to the one that is read; the others only exist to be exported."""
        return self.num_layers + 1 + self.read_layer

    @property
    def values_per_image(self) -> int:
        """Rows times columns times channels of an image."""
        return 3 * self.image_size**2


@dataclasses.dataclass(frozen=True)
class Architecture(Parametrization, Output, Experts, FeedForward, Attention, Normalisation, Positions, Sizes):
    """The architecture: fields that determine the shapes of the parameters or the function that they parameterise."""

    vision: VisionConfig = VisionConfig()


# --- training and execution -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Initialisation:
    """Initialisation, regularisation and auxiliary losses: fields that matter in training only."""

    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    token_init_std: float = 0.02
    position_init_std: float = 0.01
    kernel_init_std: float = 0.02
    scale_residual_init: bool = True  # kernels of residual branches start at std / sqrt(2 * num_layers)
    zero_residual_init: bool = False  # kernels of residual branches start at 0
    head_init_std: float = 0.02  # of an untied head
    z_loss: float = 0.0  # coefficient of log(Z)^2 in training, Z the softmax's denominator (Chowdhery et al. 2022, 5)
    # Coefficients of the losses of routers, means over tokens and layers: load balance, 1 when balanced (Fedus et al.
    # 2021, equation 4), and log(Z)^2 of the router's logits (Zoph et al. 2022, equation 5)
    router_balance_loss: float = 0.0
    router_z_loss: float = 0.0
    # Change of balance_bias in each step at the peak learning rate; it follows the learning-rate schedule
    balance_bias_rate: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Execution:
    """Execution: fields that change speed, memory and rounding, but not the model."""

    # scan: compile time independent of depth; unroll: often faster steps; auto: the platform's default
    # (`parallel/platforms.py`)
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    # Recomputation in the backward pass. none: nothing; cheap: norms, activations and sums; dots: everything except the
    # matrix products outside attention; attention: everything except the results of attention; full: everything;
    # offload: everything, with the inputs of layers offloaded to host memory
    remat: Literal["none", "cheap", "dots", "attention", "full", "offload"] = "none"
    # xla: any device and mask; cudnn: NVIDIA GPUs; splash: TPUs; auto: the fastest that supports the device, the dtype
    # and the shapes. With mesh axis context > 1, ring attention is used instead
    attention_backend: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations; softmax, norms and the loss are float32
    # Products with the kernels of experts. grouped: tokens are sorted by expert and multiplied by that one only
    # (`jax.lax.ragged_dot`); dense: every expert computes every token; auto: the platform's default
    expert_backend: Literal["auto", "grouped", "dense"] = "auto"
    # Dtype of matrix products with the layers' kernels in training. model: that of `dtype`; float8: NVIDIA GPUs from
    # Ada and Hopper on; int8: TPUs, and GPUs from Ampere on (`models/low_precision.py`)
    matmul_dtype: Literal["model", "float8", "int8"] = "model"
    # Dtype in which a training step stores logits; they are accumulated in float32, and so is the loss. bfloat16 halves
    # the memory traffic of the loss; auto: the platform's default (`parallel/platforms.py`)
    logits_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    # Dtype of parameters that no step changes: imported weights, reference models, models adapted by PEFT. Trained
    # parameters, their gradients and moving average are float32
    param_dtype: Literal["float32", "bfloat16"] = "float32"


# Dataclasses collect the fields of the last base first.
@dataclasses.dataclass(frozen=True)
class GPTConfig(Execution, Initialisation, Architecture):
    """The model: every generation from GPT-1 to gpt-oss is a value of it."""

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads if self.head_width is None else self.head_width

    @property
    def kv_heads(self) -> int:
        return self.num_heads if self.num_kv_heads is None else self.num_kv_heads

    @property
    def feed_forward_dim(self) -> int:
        return 4 * self.embed_dim if self.ffw_dim is None else self.ffw_dim

    @property
    def width_factor(self) -> float:
        """The width as a multiple of the base model's; 1 with parametrization=standard."""
        return 1.0 if self.base_width is None else self.embed_dim / self.base_width

    @property
    def depth_factor(self) -> float:
        """The number of layers as a multiple of the base model's; 1 unless parametrization=completep."""
        return 1.0 if self.base_depth is None else self.num_layers / self.base_depth

    @property
    def reads_images(self) -> bool:
        return self.vision.encoder != "none"

    @property
    def image_encoder(self) -> "GPTConfig":
        """The layers of the vision transformer as those of a GPT, executed as those of this model."""
        vision = self.vision
        is_quick = vision.activation == "quick_gelu"
        execution = {field.name: getattr(self, field.name) for field in dataclasses.fields(Execution)}
        return GPTConfig(
            **execution | {"attention_backend": "auto"},
            vocab_size=1,
            context_length=vision.num_patches + vision.class_token,
            num_layers=vision.num_layers,
            num_heads=vision.num_heads,
            embed_dim=vision.embed_dim,
            ffw_dim=vision.ffw_dim,
            activation="silu" if is_quick else vision.activation,  # type: ignore[arg-type]
            swish_beta=QUICK_GELU_BETA if is_quick else 1.0,
            norm_eps=vision.norm_eps,
            attention_pattern=("full",),
            kernel_init_std=self.kernel_init_std,
        )

    @property
    def value_embedding_layers(self) -> range:
        """The numbers of the layers with value embeddings."""
        step = 2 if self.value_embeddings == "alternate" else 1
        first = self.num_layers if self.value_embeddings == "none" else (self.num_layers - 1) % step
        return range(first, self.num_layers, step)

    def with_attention(self, kind: str) -> "GPTConfig":
        """The config with one kind of attention in every layer; the parameters stay those of the same layers."""
        return dataclasses.replace(self, attention_pattern=(kind,) * len(self.attention_pattern))

    def with_vocabulary(self, size: int) -> "GPTConfig":
        """The config for a tokenizer of `size` tokens: sets vocab_size if it is None.

        Raises:
          UserError: vocab_size is set and too small.
        """
        if self.vocab_size is not None and self.vocab_size < size:
            raise UserError(
                f"model.vocab_size={self.vocab_size} is smaller than the tokenizer's {size} tokens: "
                "leave it unset, or round up"
            )
        return dataclasses.replace(self, vocab_size=size if self.vocab_size is None else self.vocab_size)

    @property
    def precision(self) -> str | None:
        """Precision of matrix products; "highest": float32 operands are not rounded, as GPUs and TPUs do by default."""
        return "highest" if self.dtype == "float32" else None


def fields_independent_of_weights() -> tuple[str, ...]:
    """Names of the fields that training which starts from given weights may change."""
    return tuple(field.name for group in (Initialisation, Execution) for field in dataclasses.fields(group))
