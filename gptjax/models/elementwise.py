"""Normalisation and activations with small residuals (arrays saved for the backward pass).

Automatic differentiation would save three float32 arrays of the input's shape for a layer norm and four for a GELU, and
their memory traffic costs more than the arithmetic that they save. Here the input is saved, and for a layer norm two
numbers per position; the rest is recomputed.
"""

import math
from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.parallel.mesh import partitioned
from gptjax.parallel.platforms import platform_defaults

Function = Callable[[jax.Array], jax.Array]


def saving_only_input(function: Function) -> Function:
    """Wraps a function of one array so that only its input is saved for the backward pass."""

    @jax.custom_vjp
    def same(x: jax.Array) -> jax.Array:
        return function(x)

    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return function(x), x

    def backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        return jax.vjp(function, x)[1](dy)

    same.defvjp(forward, backward)
    return same


_GELU_SLOPE, _GELU_CUBIC = math.sqrt(8 / math.pi), 0.044715


@jax.custom_vjp
def gelu_tanh(x: jax.Array) -> jax.Array:
    """x (1 + tanh(z / 2)) / 2 with z = sqrt(8 / pi) (x + 0.044715 x^3), computed in float32 as x / (1 + exp(-z)).

    An exponential costs a third of the polynomials of a tanh, which would take longer than the memory traffic on a GPU.
    """
    x32 = x.astype(jnp.float32)
    return (x32 * _gelu_gate(x32)).astype(x.dtype)


def _gelu_gate(x32: jax.Array) -> jax.Array:
    return 1 / (1 + jnp.exp(-_GELU_SLOPE * (x32 + _GELU_CUBIC * x32 * x32 * x32)))


def _gelu_backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
    x32 = x.astype(jnp.float32)
    gate = _gelu_gate(x32)
    slope = _GELU_SLOPE * (1 + 3 * _GELU_CUBIC * x32 * x32)
    return ((dy.astype(jnp.float32) * gate * (1 + x32 * (1 - gate) * slope)).astype(x.dtype),)


gelu_tanh.defvjp(lambda x: (gelu_tanh(x), x), _gelu_backward)

ACTIVATIONS: dict[str, Function] = {
    "gelu_tanh": gelu_tanh,
    "gelu_exact": saving_only_input(partial(nn.gelu, approximate=False)),
    "relu": nn.relu,
    "relu_squared": saving_only_input(lambda x: jnp.square(nn.relu(x))),  # So et al. 2021
    "silu": saving_only_input(nn.silu),
}


def activation(config: GPTConfig) -> Function:
    """The activation function of the feed-forward layers."""
    if config.activation == "silu" and config.swish_beta != 1:
        return saving_only_input(lambda x: x * nn.sigmoid(config.swish_beta * x))
    return ACTIVATIONS[config.activation]


class Norm(nn.Module):
    """Layer normalisation (Ba et al. 2016) or RMS normalisation (Zhang and Sennrich 2019) of the last axis.

    Computed in float32 whatever the dtype of activations; (..., D) to (..., D).
    """

    config: GPTConfig
    has_gain: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config, width = self.config, x_BTD.shape[-1:]
        scale_D, bias_D = jnp.ones(width), jnp.zeros(width)
        if self.has_gain:
            init = partitioned(nn.initializers.ones, "norm")
            scale_D = nn.unbox(self.param("scale", init, width, config.param_dtype))
        if config.norm == "rms":
            return rms_normalise(x_BTD, scale_D, config.norm_eps).astype(config.dtype)
        if self.has_gain:
            init = partitioned(nn.initializers.zeros, "norm")
            bias_D = nn.unbox(self.param("bias", init, width, config.param_dtype))
        return normalise(x_BTD, scale_D, bias_D, config.norm_eps).astype(config.dtype)


class Vector(nn.Module):
    """A learned vector or scalar named after its module, such as "sinks/bias"; the leaf's name decides weight decay."""

    config: GPTConfig
    leaf: str  # "scale" or "bias"
    shape: tuple[int, ...]
    axes: tuple[str, ...]
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> jax.Array:
        value = self.param(self.leaf, partitioned(self.initializer, *self.axes), self.shape, self.config.param_dtype)
        return jnp.asarray(nn.unbox(value))


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, float32."""
    return _forward(x_BTD, scale_D, bias_D, eps)[0]


def _forward(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> tuple[jax.Array, tuple]:
    x32_BTD = x_BTD.astype(jnp.float32)
    mean_BT1 = jnp.mean(x32_BTD, axis=-1, keepdims=True)
    # Not E[x^2] - E[x]^2, which cancels where the mean is large.
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD - mean_BT1), axis=-1, keepdims=True) + eps)
    y_BTD = (x32_BTD - mean_BT1) * (inverse_BT1 * _rows(scale_D, x_BTD)) + _rows(bias_D, x_BTD)
    return y_BTD, (x_BTD, scale_D, bias_D, mean_BT1, inverse_BT1)


def _backward(eps: float, kept: tuple, dy_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_BTD, scale_D, bias_D, mean_BT1, inverse_BT1 = kept
    store_moments = platform_defaults().store_norm_moments
    if store_moments:
        mean_BT1, inverse_BT1 = jax.lax.optimization_barrier((mean_BT1, inverse_BT1))
    unit_BTD = (x_BTD.astype(jnp.float32) - mean_BT1) * inverse_BT1
    dunit_BTD = dy_BTD * _rows(scale_D, x_BTD)
    along_BT1 = jnp.mean(dunit_BTD * unit_BTD, axis=-1, keepdims=True)
    dx_BTD = inverse_BT1 * (dunit_BTD - jnp.mean(dunit_BTD, axis=-1, keepdims=True) - unit_BTD * along_BT1)
    leading = tuple(range(x_BTD.ndim - 1))
    on_one_device = all(size == 1 for size in jax.sharding.get_abstract_mesh().shape.values())
    if store_moments and on_one_device:
        # One kernel that reads the gradient once. On several devices XLA would gather the operands of such a reduction.
        pairs, zeros = (dy_BTD * unit_BTD, dy_BTD.astype(jnp.float32)), (jnp.float32(0), jnp.float32(0))
        dscale_D, dbias_D = jax.lax.reduce(pairs, zeros, lambda a, b: (a[0] + b[0], a[1] + b[1]), leading)
    else:
        dscale_D, dbias_D = jnp.sum(dy_BTD * unit_BTD, axis=leading), jnp.sum(dy_BTD, axis=leading)
    return dx_BTD.astype(x_BTD.dtype), dscale_D.astype(scale_D.dtype), dbias_D.astype(bias_D.dtype)


def _rows(vector_D: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector_D, range(like.ndim - 1))


normalise.defvjp(_forward, _backward)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rms_normalise(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> jax.Array:
    """x / sqrt(mean(x^2) + eps) * scale over the last axis, float32."""
    return _rms_forward(x_BTD, scale_D, eps)[0]


def _rms_forward(x_BTD: jax.Array, scale_D: jax.Array, eps: float) -> tuple[jax.Array, tuple]:
    x32_BTD = x_BTD.astype(jnp.float32)
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD), axis=-1, keepdims=True) + eps)
    return x32_BTD * inverse_BT1 * _rows(scale_D, x_BTD), (x_BTD, scale_D, inverse_BT1)


def _rms_backward(eps: float, kept: tuple, dy_BTD: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_BTD, scale_D, inverse_BT1 = kept
    unit_BTD = x_BTD.astype(jnp.float32) * inverse_BT1
    dunit_BTD = dy_BTD * _rows(scale_D, x_BTD)
    dx_BTD = inverse_BT1 * (dunit_BTD - unit_BTD * jnp.mean(dunit_BTD * unit_BTD, axis=-1, keepdims=True))
    dscale_D = jnp.sum(dy_BTD * unit_BTD, axis=tuple(range(x_BTD.ndim - 1)))
    return dx_BTD.astype(x_BTD.dtype), dscale_D.astype(scale_D.dtype)


rms_normalise.defvjp(_rms_forward, _rms_backward)
