"""The knobs of the model."""

import dataclasses
from typing import Literal

from gptjax.config.errors import UserError


@dataclasses.dataclass(frozen=True)
class GPTConfig:
    """The model: GPT-1, GPT-2 and GPT-3 are values of it (Radford et al. 2018, 2019; Brown et al. 2020)."""

    vocab_size: int | None = None  # rows of the token embedding; None: the tokenizer's vocabulary
    context_length: int = 1024  # positions, each with a learned embedding
    num_layers: int = 12
    num_heads: int = 12
    embed_dim: int = 768
    ffw_dim: int | None = None  # width of the feed-forward layer; None: 4 * embed_dim
    norm_position: Literal["pre", "post"] = "pre"  # GPT-1 is post-LN; GPT-2 on are pre-LN with a final norm
    norm_eps: float = 1e-5
    activation: Literal["gelu_tanh", "gelu_exact", "relu", "silu"] = "gelu_tanh"
    scale_attention: bool = True  # scores are divided by sqrt(head_dim); GPT-Neo's are not
    qkv_bias: bool = True  # GPT-Neo's queries, keys and values have none
    # Repeated over the layers; ("dense", "banded") is GPT-3's alternation. A banded layer sees the last band_width
    # positions, its own included.
    attention_pattern: tuple[str, ...] = ("dense",)
    band_width: int = 256
    embedding_dropout: float = 0.0
    attention_dropout: float = 0.0
    residual_dropout: float = 0.0
    token_init_std: float = 0.02
    position_init_std: float = 0.01
    kernel_init_std: float = 0.02
    scale_residual_init: bool = True  # projections into the residual stream start at std / sqrt(2 * num_layers)
    adapter_dim: int | None = None  # bottleneck of Houlsby et al. 2019's adapters; None: there are none
    # scan: compile time flat in depth; unroll: often faster steps; auto: what suits the device (`models/gpt.py`)
    layer_loop: Literal["auto", "scan", "unroll"] = "auto"
    # What the backward pass recomputes: nothing; norms, activations and sums, which is cheap; attention too, all but
    # the other matrix products; all but what attention returned; all; all, while what one layer handed to the next
    # waits in the host's memory
    remat: Literal["none", "cheap", "dots", "attention", "full", "offload"] = "none"
    # xla: any device and mask; cudnn: NVIDIA GPUs; splash: TPUs; auto: the fastest that the device, the dtype and the
    # shapes allow. Over a mesh axis "context" it is the ring, whatever stands here
    attention_backend: Literal["auto", "xla", "cudnn", "splash"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "bfloat16"  # of activations; softmax, norms and loss are float32 anyway
    # Of the products with the weights of the layers, when training: as `dtype` says, or of 8 bits
    # (`models/low_precision.py`). float8: NVIDIA GPUs from Ada and Hopper on; int8: TPUs, and GPUs from Ampere on
    matmul_dtype: Literal["model", "float8", "int8"] = "model"
    # As a training step holds them; they are summed in float32 anyway, and so is the loss. bfloat16 halves what the
    # loss reads and writes; auto: what suits the device (`training/losses.py`)
    logits_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    param_dtype: Literal["float32", "bfloat16"] = "float32"

    @property
    def head_dim(self) -> int:
        return self.embed_dim // self.num_heads

    @property
    def feed_forward_dim(self) -> int:
        return 4 * self.embed_dim if self.ffw_dim is None else self.ffw_dim

    def with_vocabulary(self, size: int) -> "GPTConfig":
        """The config for a tokenizer of `size` tokens: vocab_size filled in where it is unset.

        Raises:
          UserError: vocab_size is set, and too small.
        """
        if self.vocab_size is not None and self.vocab_size < size:
            raise UserError(
                f"model.vocab_size={self.vocab_size} is smaller than the tokenizer's {size} tokens: "
                "leave it unset, or round up"
            )
        return dataclasses.replace(self, vocab_size=size if self.vocab_size is None else self.vocab_size)

    @property
    def precision(self) -> str | None:
        """Of matrix products: float32 means float32, where a GPU or TPU would round the operands by default."""
        return "highest" if self.dtype == "float32" else None
