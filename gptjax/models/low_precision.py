"""8-bit matrix products with the kernels of layers, for training.

float8 (Micikevicius et al. 2022, FP8 formats): inputs and kernels are e4m3, with four bits of exponent and three of
mantissa; gradients are e5m2, with more range. Each array is scaled when it is rounded, so that its largest entry is the
largest of the format ("current scaling"): there is no state, and nothing saturates. The backward pass saves and
multiplies the rounded arrays, which are half as large.

int8 (quantisation-aware training: Jacob et al. 2018, section 3): each row of the inputs and each column of a kernel is
scaled so that its largest entry is 127. Integers lack the range for gradients, so the backward pass multiplies the
unrounded arrays in the model's dtype, with a straight-through estimator.

Products are accumulated in float32, and those of integers exactly, in int32.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig, UserError
from gptjax.models import attention_backends
from gptjax.parallel.platforms import PLATFORM_DEFAULTS

MIN_CAPABILITY = {"float8": 8.9, "int8": 8.0}  # of GPUs with such units: Ada and Hopper; Ampere
TPU_DTYPES = ("int8",)  # supported by all TPUs from v5e on

Scaled = tuple[jax.Array, jax.Array]  # the rounded array, and its scale: the float32 factor that restores its values


def check_device(config: GPTConfig, platform: str) -> None:
    """Raises UserError if this device does not support config.matmul_dtype."""
    dtype = config.matmul_dtype
    emulated = PLATFORM_DEFAULTS[platform].emulate_low_precision
    if dtype == "model" or emulated or (platform == "tpu" and dtype in TPU_DTYPES):
        return
    if platform != "gpu" or attention_backends.compute_capability() < MIN_CAPABILITY[dtype]:
        tpu = "a TPU or " if dtype in TPU_DTYPES else ""
        raise UserError(
            f"model.matmul_dtype={dtype} needs {tpu}an NVIDIA GPU of compute capability {MIN_CAPABILITY[dtype]} or "
            "later: leave it at model"
        )


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def float8_product(x: jax.Array, kernel: jax.Array, count: int) -> jax.Array:
    """Contracts the last `count` axes of `x` with the first ones of `kernel`; the result has x's dtype."""
    return _float8_forward(x, kernel, count)[0]


def _float8_forward(x: jax.Array, kernel: jax.Array, count: int) -> tuple[jax.Array, tuple[Scaled, Scaled, jax.Array]]:
    kept = rounded(x, jnp.float8_e4m3fn), rounded(kernel, jnp.float8_e4m3fn)
    return _multiplied(*kept, _summed(x, count), x.dtype), (*kept, jnp.zeros((), kernel.dtype))


def _float8_backward(count: int, kept: tuple[Scaled, Scaled, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel, of_kernel = kept
    ends, rows = _summed_backward(x[0], kernel[0], count)
    dy8 = rounded(dy, jnp.float8_e5m2)
    return _multiplied(dy8, kernel, ends, dy.dtype), _multiplied(x, dy8, rows, of_kernel.dtype)


float8_product.defvjp(_float8_forward, _float8_backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def int8_product(x: jax.Array, kernel: jax.Array, count: int) -> jax.Array:
    """Contracts the last `count` axes of `x` with the first ones of `kernel`; the result has x's dtype."""
    x8, x_scale = rounded_to_int8(x, range(x.ndim - count, x.ndim))
    kernel8, kernel_scale = rounded_to_int8(kernel, range(count))
    sums = jax.lax.dot_general(x8, kernel8, (_summed(x, count), ((), ())), preferred_element_type=jnp.int32)
    x_scale = x_scale.reshape(*x.shape[: x.ndim - count], *[1] * (kernel.ndim - count))
    kernel_scale = kernel_scale.reshape(*[1] * (x.ndim - count), *kernel.shape[count:])
    return (sums.astype(jnp.float32) * x_scale * kernel_scale).astype(x.dtype)


def _int8_backward(count: int, kept: tuple[jax.Array, jax.Array], dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    ends, rows = _summed_backward(x, kernel, count)
    dx = jax.lax.dot_general(dy, kernel, (ends, ((), ())), preferred_element_type=x.dtype)
    return dx, jax.lax.dot_general(x, dy, (rows, ((), ())), preferred_element_type=kernel.dtype)


int8_product.defvjp(lambda x, kernel, count: (int8_product(x, kernel, count), (x, kernel)), _int8_backward)


def _dot_general(
    product: Any,
    x: jax.Array,
    kernel: jax.Array,
    dimension_numbers: Any,
    precision: Any = None,
    preferred_element_type: Any = None,
) -> jax.Array:
    """`jax.lax.dot_general` for the last axes of `x` and the first ones of `kernel`, as dense layers call it."""
    (ours, theirs), batch = dimension_numbers
    count = len(ours)
    assert not any(batch), dimension_numbers
    assert (tuple(ours), tuple(theirs)) == _summed(x, count), dimension_numbers
    return product(x, kernel, count)


# The `dot_general` of dense layers, by GPTConfig.matmul_dtype.
DOT_GENERAL = {"float8": partial(_dot_general, float8_product), "int8": partial(_dot_general, int8_product)}


def rounded(x: jax.Array, dtype: Any) -> Scaled:
    """Rounds `x` to 8-bit floats of `dtype`, with one scale."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    most = float(jnp.finfo(dtype).max)
    # A power of two, so that scaling is exact. Zeros stay zeros, and non-finite entries make the scale NaN.
    exponent = jnp.where(largest > 0, jnp.floor(jnp.log2(most / largest)), 0)
    scale = jnp.exp2(jnp.clip(exponent, -100, 100))
    scaled = jnp.clip(x.astype(jnp.float32) * scale, -most, most)
    return scaled.astype(dtype), jnp.where(jnp.isfinite(largest), 1 / scale, jnp.nan)


def rounded_to_int8(x: jax.Array, axes: range) -> Scaled:
    """Rounds `x` to integers from -127 to 127, with one scale for all entries along `axes`."""
    x32 = x.astype(jnp.float32)
    largest = jnp.max(jnp.abs(x32), axis=tuple(axes), keepdims=True)
    finite = jnp.isfinite(largest)
    scale = jnp.where(largest > 0, largest / 127, 1)
    # Non-finite entries make the scale NaN.
    return jnp.where(finite, jnp.round(x32 / scale), 0).astype(jnp.int8), jnp.where(finite, scale, jnp.nan)


def _summed(x: jax.Array, count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The axes of `x` and of a kernel that a layer contracts."""
    return tuple(range(x.ndim - count, x.ndim)), tuple(range(count))


def _summed_backward(x: jax.Array, kernel: jax.Array, count: int) -> tuple[Any, Any]:
    """The contracted axes of dy and the kernel for dx, and of x and dy for the gradient of the kernel."""
    leading, outputs = x.ndim - count, kernel.ndim - count
    ends = (tuple(range(leading, leading + outputs)), tuple(range(count, count + outputs)))
    return ends, (tuple(range(leading)), tuple(range(leading)))


def _multiplied(a: Scaled, b: Scaled, axes: Any, dtype: Any) -> jax.Array:
    # The unscaled sums are in the range of bfloat16 and of float32.
    sums = jax.lax.dot_general(a[0], b[0], (axes, ((), ())), preferred_element_type=dtype)
    return (sums.astype(jnp.float32) * (a[1] * b[1])).astype(dtype)
