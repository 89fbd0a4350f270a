"""Layer normalisation and activations that keep little for the backward pass.

Left to automatic differentiation, a layer norm keeps three float32 arrays of its input's shape and a GELU four: what
the backward pass then writes and reads costs more than the arithmetic it saves. Here the input is kept, and of a layer
norm two numbers a position; the rest is computed again.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.parallel.mesh import partitioned

Function = Callable[[jax.Array], jax.Array]


def keeping_the_input(function: Function) -> Function:
    """`function` of one array, whose gradient is computed from that array alone."""

    @jax.custom_vjp
    def same(x: jax.Array) -> jax.Array:
        return function(x)

    def forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
        return function(x), x

    def backward(x: jax.Array, dy: jax.Array) -> tuple[jax.Array]:
        return jax.vjp(function, x)[1](dy)

    same.defvjp(forward, backward)
    return same


ACTIVATIONS: dict[str, Function] = {
    "gelu_tanh": keeping_the_input(partial(nn.gelu, approximate=True)),
    "gelu_exact": keeping_the_input(partial(nn.gelu, approximate=False)),
    "relu": nn.relu,
    "silu": keeping_the_input(nn.silu),
}


class LayerNorm(nn.Module):
    """Layer normalisation (Ba et al. 2016), computed in float32 whatever the activations' dtype; (..., D)."""

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config, width = self.config, x_BTD.shape[-1:]
        scale_D = self.param("scale", partitioned(nn.initializers.ones, "norm"), width, config.param_dtype)
        bias_D = self.param("bias", partitioned(nn.initializers.zeros, "norm"), width, config.param_dtype)
        scale_D, bias_D = nn.unbox(scale_D), nn.unbox(bias_D)
        return normalise(x_BTD, scale_D, bias_D, config.norm_eps).astype(config.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def normalise(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(var + eps) * scale + bias over the last axis, float32."""
    return _forward(x_BTD, scale_D, bias_D, eps)[0]


def _forward(x_BTD: jax.Array, scale_D: jax.Array, bias_D: jax.Array, eps: float) -> tuple[jax.Array, tuple]:
    x32_BTD = x_BTD.astype(jnp.float32)
    mean_BT1 = jnp.mean(x32_BTD, axis=-1, keepdims=True)
    # Not E[x^2] - E[x]^2, which loses all digits where the mean is large.
    inverse_BT1 = jax.lax.rsqrt(jnp.mean(jnp.square(x32_BTD - mean_BT1), axis=-1, keepdims=True) + eps)
    y_BTD = (x32_BTD - mean_BT1) * (inverse_BT1 * _rows(scale_D, x_BTD)) + _rows(bias_D, x_BTD)
    return y_BTD, (x_BTD, scale_D, bias_D, mean_BT1, inverse_BT1)


def _backward(eps: float, kept: tuple, dy_BTD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    x_BTD, scale_D, bias_D, mean_BT1, inverse_BT1 = kept
    unit_BTD = (x_BTD.astype(jnp.float32) - mean_BT1) * inverse_BT1
    dunit_BTD = dy_BTD * _rows(scale_D, x_BTD)
    along_BT1 = jnp.mean(dunit_BTD * unit_BTD, axis=-1, keepdims=True)
    dx_BTD = inverse_BT1 * (dunit_BTD - jnp.mean(dunit_BTD, axis=-1, keepdims=True) - unit_BTD * along_BT1)
    leading = tuple(range(x_BTD.ndim - 1))
    dscale_D, dbias_D = jnp.sum(dy_BTD * unit_BTD, axis=leading), jnp.sum(dy_BTD, axis=leading)
    return dx_BTD.astype(x_BTD.dtype), dscale_D.astype(scale_D.dtype), dbias_D.astype(bias_D.dtype)


def _rows(vector_D: jax.Array, like: jax.Array) -> jax.Array:
    return jnp.expand_dims(vector_D, range(like.ndim - 1))


normalise.defvjp(_forward, _backward)
