"""Matrix products of 8-bit floats, with a scale for each array (Micikevicius et al. 2022, FP8 formats).

What a layer reads and its weights are e4m3, four bits of exponent and three of mantissa; gradients are e5m2, of more
range. Each array is scaled so that its largest entry is the largest that the format has, found when it is rounded
("current scaling"): there is no state, and nothing to saturate. Products are summed in float32 by the device. The
backward pass keeps the rounded arrays, half as large.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig, UserError
from gptjax.models.attention_backends import compute_capability

MIN_CAPABILITY = 8.9  # of GPUs that multiply them: Ada, Hopper
EMULATED = {"cpu": False}  # whether a device that has none computes in float32 with the rounded numbers, as in tests

Scaled = tuple[jax.Array, jax.Array]  # the rounded array, and what it is to be multiplied by, float32


def check_device(config: GPTConfig, platform: str) -> None:
    """Raises UserError when config.matmul_dtype is one in which this device does not multiply."""
    if config.matmul_dtype != "float8" or EMULATED.get(platform):
        return
    if platform != "gpu" or compute_capability() < MIN_CAPABILITY:
        raise UserError(
            f"model.matmul_dtype=float8 needs an NVIDIA GPU of compute capability {MIN_CAPABILITY} or later: "
            "leave it at model"
        )


def dot_general(
    x: jax.Array,
    kernel: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` of the last axes of `x` and the first of `kernel`, as dense layers call it."""
    (ours, theirs), batch = dimension_numbers
    count = len(ours)
    assert not any(batch), dimension_numbers
    assert tuple(theirs) == tuple(range(count)), dimension_numbers
    assert tuple(ours) == tuple(range(x.ndim - count, x.ndim)), dimension_numbers
    return product(x, kernel, count)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def product(x: jax.Array, kernel: jax.Array, count: int) -> jax.Array:
    """Sums over the last `count` axes of `x` and the first of `kernel`; of x's dtype."""
    return _forward(x, kernel, count)[0]


def _forward(x: jax.Array, kernel: jax.Array, count: int) -> tuple[jax.Array, tuple[Scaled, Scaled, jax.Array]]:
    kept = rounded(x, jnp.float8_e4m3fn), rounded(kernel, jnp.float8_e4m3fn)
    axes = (tuple(range(x.ndim - count, x.ndim)), tuple(range(count)))
    return _multiplied(*kept, axes, x.dtype), (*kept, jnp.zeros((), kernel.dtype))


def _backward(count: int, kept: tuple[Scaled, Scaled, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, of_kernel = kept
    leading, outputs = x[0].ndim - count, kernel[0].ndim - count
    dy8 = rounded(dy, jnp.float8_e5m2)
    ends = (tuple(range(leading, leading + outputs)), tuple(range(count, count + outputs)))
    rows = (tuple(range(leading)), tuple(range(leading)))
    return _multiplied(dy8, kernel, ends, dy.dtype), _multiplied(x, dy8, rows, of_kernel.dtype)


product.defvjp(_forward, _backward)


def rounded(x: jax.Array, dtype: Any) -> Scaled:
    """`x` in a format of 8 bits."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    most = float(jnp.finfo(dtype).max)
    # A power of two: scaling rounds nothing. Zeros stay zeros, and what is not finite shows in the product.
    exponent = jnp.where(largest > 0, jnp.floor(jnp.log2(most / largest)), 0)
    scale = jnp.exp2(jnp.clip(exponent, -100, 100))
    scaled = jnp.clip(x.astype(jnp.float32) * scale, -most, most)
    return scaled.astype(dtype), jnp.where(jnp.isfinite(largest), 1 / scale, jnp.nan)


def _multiplied(a: Scaled, b: Scaled, axes: Any, dtype: Any) -> jax.Array:
    # The sums are in units of the scales, and fit bfloat16 and float32 alike.
    sums = jax.lax.dot_general(a[0], b[0], (axes, ((), ())), preferred_element_type=dtype)
    return (sums.astype(jnp.float32) * (a[1] * b[1])).astype(dtype)
