"""Configuration of the model in three groups: what is computed, how it is initialised and regularised, how it runs.

The groups are base classes, so that all fields are keys of one section: `model.num_layers`, `model.remat`.
"""

import dataclasses
from typing import Literal

from gptjax.config.errors import UserError


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What is computed: fields that determine the shapes of the parameters, or the function that they parameterise."""

    vocab_size: int | None = None  # rows of the token embedding; None: the tokenizer's vocabulary
    context_length: int = 1024  # positions, each with a learned embedding
    num_layers: int = 12
    num_heads: int = 12
    embed_dim: int = 768
    ffw_dim: int | None = None  # width of the feed-forward layer; None: 4 * embed_dim
    norm_position: Literal["pre", "post"] = "pre"  # GPT-1 is post-LN; from GPT-2 on, pre-LN with a final norm
    norm_eps: float = 1e-5
    activation: Literal["gelu_tanh", "gelu_exact", "relu", "silu"] = "gelu_tanh"
    scale_attention: bool = True  # divide attention scores by sqrt(head_dim); GPT-Neo does not
    qkv_bias: bool = True  # biases of queries, keys and values; GPT-Neo has none
    # Kinds of attention, repeated over the layers; ("dense", "banded") is GPT-3's alternation. In a banded layer, a
    # position attends to the last band_width positions, including itself.
    attention_pattern: tuple[str, ...] = ("dense",)
    band_width: int = 256
    adapter_dim: int | None = None  # bottleneck width of adapters (Houlsby et al. 2019); None: no adapters


@dataclasses.dataclass(frozen=True)
class Initialisation:
    """How parameters are initialised and regularised: fields that matter in training only."""

    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    token_init_std: float = 0.02
    position_init_std: float = 0.01
    kernel_init_std: float = 0.02
    scale_residual_init: bool = True  # kernels of residual branches start at std / sqrt(2 * num_layers)


@dataclasses.dataclass(frozen=True)
class Execution:
    """How it is computed: fields that change speed, memory and rounding, but not the model."""

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
    """The model: GPT-1, GPT-2 and GPT-3 are values of it (Radford et al. 2018, 2019; Brown et al. 2020)."""

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def feed_forward_dim(self) -> int:
        return 4 * self.embed_dim if self.ffw_dim is None else self.ffw_dim

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
