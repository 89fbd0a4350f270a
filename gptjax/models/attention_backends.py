"""Attention over whole sequences by one function, `attention`, and the choice of its backend.

"xla" is the reference: plain array code that runs anywhere and materialises all T x T scores. "splash" (Pallas, on
TPUs) and "cudnn" (on NVIDIA GPUs) are flash attention (Dao et al. 2022): they compute blocks in on-chip memory, and
skip blocks that are fully masked. cuDNN's gradients differ from run to run in their last bits, unless XLA_FLAGS has
--xla_gpu_exclude_nondeterministic_ops=true. If positions are sharded over devices, `gptjax.parallel.ring` is used.
"""

import math
from collections.abc import Callable
from typing import Any, cast

import jax
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    CausalMask,
    LocalMask,
    MultiHeadMask,
    SegmentIds,
    make_splash_mha,
)
from jax.experimental.pallas.ops.tpu.splash_attention.splash_attention_kernel import SplashAttentionKernel

from gptjax.config import GPTConfig, UserError
from gptjax.models.dot_product import attention_mask, divisible_heads, dot_product_attention
from gptjax.parallel.mesh import BATCH_AXES, axis_size, partition_spec, platform
from gptjax.parallel.platforms import platform_defaults
from gptjax.parallel.ring import ring_attention

NAME = "attention"  # checkpoint name of the output of attention, for rematerialisation policies
TILE = 128  # the kernels support lengths that are multiples of it
SPLASH_BLOCKS = (512, 256, 128)  # positions per block: the first that divides the length is used
MIN_CAPABILITY = 8.0  # compute capability for flash attention by cuDNN: Ampere


def attention(
    config: GPTConfig,
    kind: str,
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    segments_BT: jax.Array | None,
    dropout_rng: jax.Array | None,
    ring: bool = False,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """Attention among T positions, by the backend that `choose_backend` returns; other than causal masks by "xla".

    Args:
      kind: "dense", "banded" (position t attends to t - config.band_width < s <= t), "full" (t attends to every s) or
        "prefix" (see `attention_mask`).
      q_BTHK, k_BTHK, v_BTHK: of the same dtype; keys and values may have fewer heads, each shared by consecutive
        query heads.
      segments_BT: int, documents packed into a row; attention stays within one. None: the row is one document.
      dropout_rng: key of the attention dropout; None: no dropout.
      ring: positions are in the order of `parallel.balanced_order`. Then ring attention is used, without dropout.
      sinks_H: float32, a logit for each query head that takes part in its softmax, without a value. None: no sinks.

    Returns:
      (B, T, H, K), of q's dtype.

    Raises:
      UserError: config.attention_backend does not support these arguments.
    """
    rows, length, heads, _ = q_BTHK.shape
    scale = score_scale(config)
    band_width = config.band_width if kind == "banded" and config.band_width < length else None
    k_BTHK, v_BTHK = divisible_heads(k_BTHK, heads), divisible_heads(v_BTHK, heads)
    if ring:
        assert kind in ("dense", "banded"), "the ring is causal"
        assert dropout_rng is None, "ring attention has no dropout; mesh.check_fit refuses it"
        return ring_attention(
            q_BTHK,
            k_BTHK,
            v_BTHK,
            segments_BT,
            sinks_H,
            band_width=band_width,
            scale=scale,
            precision=config.precision,
        )
    backend = "xla"  # the kernels are set up for causal masks
    if kind in ("dense", "banded") or (kind == "prefix" and segments_BT is None):
        backend = choose_backend(
            config, platform(), length, segments_BT is not None, dropout_rng is not None, compute_capability()
        )
    if backend == "splash" and _divide_over_mesh(rows, heads):
        return splash_attention(q_BTHK, k_BTHK, v_BTHK, segments_BT, band_width, scale, sinks_H)
    if backend == "cudnn" and _divide_over_mesh(rows, heads):
        return cudnn_attention(q_BTHK, k_BTHK, v_BTHK, band_width, scale)

    def plain(
        q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, segments_BT: Any, dropout_rng: Any, sinks_H: Any
    ) -> jax.Array:
        mask_BHTS = attention_mask(kind, config.band_width, length, segments_BT)
        rate, precision = config.attention_dropout, config.precision
        return dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask_BHTS, rate, dropout_rng, precision, scale, sinks_H)

    if platform_defaults().recompute_activations:
        plain = jax.checkpoint(plain, prevent_cse=False)
    return checkpoint_name(plain(q_BTHK, k_BTHK, v_BTHK, segments_BT, dropout_rng, sinks_H), NAME)


def score_scale(config: GPTConfig) -> float:
    """The factor of attention scores before the softmax.

    Under muP it falls as 1 / head_dim from that of the base model, since queries and keys become correlated in training
    (Yang et al. 2022, definition 4.1).
    """
    base = config.base_head_width or config.head_dim
    return (base**-0.5 if config.scale_attention else 1.0) * (base / config.head_dim)


# --- the choice -------------------------------------------------------------------------------------------------------


def choose_backend(
    config: GPTConfig, platform: str, length: int, has_segments: bool, has_dropout: bool, capability: float
) -> str:
    """Returns the backend for attention among `length` positions: "xla", "cudnn" or "splash".

    With "auto" it is the kernel of the platform where that is supported. Any other config.attention_backend is used, or
    is an error. In both cases xla is used for lengths that no kernel supports, such as those of short prompts, or the
    single position with which parameters are initialised.

    Args:
      platform: "cpu", "gpu" or "tpu".
      capability: the result of `compute_capability`; used on "gpu" only.

    Raises:
      UserError: config.attention_backend does not support it.
    """
    if length % TILE != 0:
        return "xla"
    named = config.attention_backend
    backend = {"gpu": "cudnn", "tpu": "splash"}.get(platform, "xla") if named == "auto" else named
    obstacle = _obstacle(backend, config, platform, has_segments, has_dropout, capability)
    if obstacle is None:
        return backend
    if named == "auto":
        return "xla"
    raise UserError(f"model.attention_backend={backend} {obstacle}")


def check_backend(config: GPTConfig, platform: str, has_segments: bool) -> None:
    """Raises UserError if config.attention_backend does not support training this model on this platform."""
    named, length = config.attention_backend, config.context_length
    choose_backend(config, platform, TILE, has_segments, config.attention_dropout > 0, compute_capability())
    if named in ("cudnn", "splash") and length % TILE != 0:
        raise UserError(
            f"model.attention_backend={named} supports lengths that are multiples of {TILE}: set model.context_length="
            f"{length} to {math.ceil(length / TILE) * TILE}, or leave the backend at auto"
        )


def compute_capability() -> float:
    """The CUDA compute capability of this process's first GPU, such as 8.0 (Ampere); 0: there is no NVIDIA GPU."""
    try:
        return float(getattr(jax.local_devices()[0], "compute_capability", 0))
    except ValueError:  # on AMD GPUs it is a name
        return 0.0


def _obstacle(
    backend: str, config: GPTConfig, platform: str, has_segments: bool, has_dropout: bool, capability: float
) -> str | None:
    """The reason why `backend` does not support this, and the fix; None: it does."""
    if backend == "xla":
        return None
    if backend == "splash" and platform != "tpu":
        return f"needs a TPU and this is a {platform}: leave it at auto"
    if backend == "cudnn" and (platform != "gpu" or capability < MIN_CAPABILITY):
        return f"needs an NVIDIA GPU of compute capability {MIN_CAPABILITY} or later: leave it at auto"
    # Splash has no precision argument, and would round float32 operands as TPUs do by default.
    if config.dtype == "float32":
        return "computes in bfloat16: set model.dtype=bfloat16, or leave it at auto"
    if has_dropout:
        return f"has no dropout: set model.attention_dropout={config.attention_dropout} to 0, or leave it at auto"
    if backend == "cudnn" and has_segments:
        return "does not support data.packing=segment: set data.packing=concatenate, or leave it at auto"
    if backend == "cudnn" and config.attention_sinks:
        return "has no attention sinks: leave it at auto"
    # The limits of jax/_src/cudnn/fused_attention_stablehlo.py.
    widest = 256 if capability >= 9 else 128
    if backend == "cudnn" and (config.head_dim % 8 != 0 or config.head_dim > widest):
        return f"needs heads of a width that is a multiple of 8 up to {widest}, not {config.head_dim}: leave it at auto"
    return None


def _divide_over_mesh(rows: int, heads: int) -> bool:
    """Whether rows and heads divide evenly over the mesh in use, and positions are not sharded."""
    shards = math.prod(axis_size(axis) for axis in BATCH_AXES)
    return axis_size("context") == 1 and rows % shards == 0 and heads % axis_size("tensor") == 0


# --- the backends -----------------------------------------------------------------------------------------------------


def splash_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    segments_BT: jax.Array | None,
    band_width: int | None,
    scale: float,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """`dot_product_attention` by the splash kernels, sharded over rows and heads; T is a multiple of 128.

    On a CPU the kernels are interpreted, slowly, for tests.

    Returns:
      (B, T, H, K), of q's dtype. It and the log-sum-exp, a residual of the backward pass, have checkpoint name NAME.
    """
    interpret = platform_defaults().interpret_pallas

    def kernel(
        q_BTHK: jax.Array,
        k_BTHK: jax.Array,
        v_BTHK: jax.Array,
        segments_BT: jax.Array | None,
        sinks_H: jax.Array | None,
    ) -> jax.Array:
        _, length, heads, _ = q_BTHK.shape
        row = splash_kernel(length, heads, band_width, interpret)
        ids = None if segments_BT is None else SegmentIds(segments_BT, segments_BT)
        q_BHTK, k_BHTK, v_BHTK = (x_BTHK.swapaxes(1, 2) for x_BTHK in (q_BTHK * scale, k_BTHK, v_BTHK))
        by_row = jax.vmap(row, in_axes=(0, 0, 0, 0, None))
        return cast(jax.Array, by_row(q_BHTK, k_BHTK, v_BHTK, ids, sinks_H)).swapaxes(1, 2)

    return _on_each_device(kernel, q_BTHK, k_BTHK, v_BTHK, segments_BT, sinks_H)


def splash_kernel(length: int, heads: int, band_width: int | None, interpret: bool) -> SplashAttentionKernel:
    """The kernel for one row, of (H, T, K) arrays, with `scale` 1. Fully masked blocks are skipped.

    The backward pass has one kernel for the gradient of q and one for those of k and v. The fused kernel recomputes
    less, but does not skip blocks of a banded layer, and writes the gradient of q once for every block of keys.
    """
    shape = (length, length)
    mask = CausalMask(shape) if band_width is None else LocalMask(shape, (band_width - 1, 0), 0)
    block = next(block for block in SPLASH_BLOCKS if length % block == 0)
    return make_splash_mha(
        MultiHeadMask([mask] * heads),
        block_sizes=BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        head_shards=1,
        q_seq_shards=1,
        residual_checkpoint_name=NAME,
        interpret=interpret,
    )


def cudnn_attention(
    q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, band_width: int | None, scale: float
) -> jax.Array:
    """`dot_product_attention` of unpacked rows by cuDNN, sharded over rows and heads; (B, T, H, K)."""

    def kernel(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array) -> jax.Array:
        return jax.nn.dot_product_attention(
            q_BTHK,
            k_BTHK,
            v_BTHK,
            scale=scale,
            is_causal=True,
            local_window_size=None if band_width is None else (band_width - 1, 0),  # before and after a position
            implementation="cudnn",
        )

    return _on_each_device(kernel, q_BTHK, k_BTHK, v_BTHK)


def is_cudnn_forward(primitive: Any, *_: Any, **__: Any) -> bool:
    """Rematerialisation policy: saves the results of cuDNN's forward kernel.

    One of them, the log-sum-exp, cannot be given a checkpoint name, and without it the kernel would run again.
    """
    return str(primitive).startswith("dot_product_attention_fwd")


def _on_each_device(kernel: Callable[..., jax.Array], *arrays: jax.Array | None) -> jax.Array:
    """Calls `kernel` on each device's shard of rows and heads: the SPMD partitioner would gather its operands.

    Args:
      kernel: from (B, T, H, K), (B, T) and (H,) arrays to (B, T, H, K).
    """
    if jax.sharding.get_abstract_mesh().empty:
        return kernel(*arrays)
    specs = {4: ("batch", None, "heads", None), 2: ("batch", None), 1: ("heads",)}
    in_specs = tuple(None if x is None else partition_spec(specs[x.ndim]) for x in arrays)
    return jax.shard_map(kernel, in_specs=in_specs, out_specs=partition_spec(specs[4]), check_vma=False)(*arrays)
