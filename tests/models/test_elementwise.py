"""Functions with small residuals have the gradients of automatic differentiation."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.models.elementwise import ACTIVATIONS, Norm
from gptjax.parallel.platforms import override_defaults

CONFIG = GPTConfig(vocab_size=5, embed_dim=24, num_heads=2, dtype="float32")
PLAIN = {
    "gelu_tanh": nn.gelu,
    "gelu_exact": lambda x: nn.gelu(x, approximate=False),
    "relu": nn.relu,
    "relu_squared": lambda x: jnp.square(nn.relu(x)),
    "silu": nn.silu,
}


def kept_bytes(function, *args) -> int:
    """What the backward pass finds of the forward pass, the arguments apart."""
    _, pullback = jax.vjp(function, *args)
    ours = {id(leaf) for leaf in args}
    return sum(leaf.nbytes for leaf in jax.tree.leaves(pullback) if id(leaf) not in ours)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name):
    x_BTF = 3 * jax.random.normal(jax.random.key(0), (2, 5, 16))
    dy_BTF = jax.random.normal(jax.random.key(1), x_BTF.shape)
    y_BTF, pullback = jax.vjp(ACTIVATIONS[name], x_BTF)
    with jax.enable_x64(True):  # in float32, 1 + tanh of flax's GELU loses what 1 / (1 + exp) does not
        exact_BTF, exact_pullback = jax.vjp(PLAIN[name], x_BTF.astype(np.float64))
        (exact_dx_BTF,) = exact_pullback(dy_BTF.astype(np.float64))
    np.testing.assert_allclose(y_BTF, exact_BTF, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(pullback(dy_BTF)[0], exact_dx_BTF, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gelu_far_from_zero_and_in_bfloat16(dtype):
    """It goes to 0 and to x without a NaN, and bfloat16 rounds once: flax's rounds on the way."""
    x_N = jnp.array([-1e4, -40, -9, -6, -1e-3, 0, 1e-3, 6, 9, 40, 1e4], dtype)
    y_N, slope_N = jax.vmap(jax.value_and_grad(ACTIVATIONS["gelu_tanh"]))(x_N)
    exact_N, exact_slope_N = jax.vmap(jax.value_and_grad(nn.gelu))(x_N.astype(jnp.float32))
    assert y_N.dtype == slope_N.dtype == dtype
    tolerance = {"float32": 1e-5, "bfloat16": 2**-8}[dtype]
    np.testing.assert_allclose(y_N.astype(jnp.float32), exact_N, rtol=tolerance, atol=3e-6)
    np.testing.assert_allclose(slope_N.astype(jnp.float32), exact_slope_N, rtol=tolerance, atol=1e-5)


@pytest.mark.parametrize("store_moments", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layer_norm_is_flaxs(dtype, store_moments):
    """However its backward pass sums."""
    keys = jax.random.split(jax.random.key(0), 4)
    x_BTD = (5 + 2 * jax.random.normal(keys[0], (3, 7, 24))).astype(dtype)
    params = {"scale": jax.random.normal(keys[1], (24,)), "bias": jax.random.normal(keys[2], (24,))}
    dy_BTD = jax.random.normal(keys[3], x_BTD.shape).astype(dtype)
    ours = Norm(dataclasses.replace(CONFIG, dtype=dtype))
    flaxs = nn.LayerNorm(epsilon=CONFIG.norm_eps, dtype=dtype, use_fast_variance=False)
    results = []
    for module in (ours, flaxs):
        with override_defaults("cpu", store_norm_moments=store_moments):
            y_BTD, pullback = jax.vjp(lambda p, x, m=module: m.apply({"params": p}, x), params, x_BTD)
            assert y_BTD.dtype == dtype
            results.append((y_BTD, pullback(dy_BTD)))
    tolerance = {"float32": 1e-5, "bfloat16": 1e-2}[dtype]
    for a, b in zip(*map(jax.tree.leaves, results), strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(*(np.asarray(leaf, np.float32) for leaf in (a, b)), rtol=tolerance, atol=tolerance)


def test_little_is_kept():
    """Flax's own keep several arrays of the input's size."""
    x_BTD = jax.random.normal(jax.random.key(0), (4, 64, 24)).astype(jnp.bfloat16)
    module = Norm(dataclasses.replace(CONFIG, dtype="bfloat16"))
    params = nn.unbox(module.init(jax.random.key(0), x_BTD))
    flaxs = nn.LayerNorm(dtype=jnp.bfloat16, use_fast_variance=False)
    position = 2 * 4 * 4 * 64  # two float32 numbers each
    assert kept_bytes(lambda x: module.apply(params, x), x_BTD) <= position + 2 * 4 * 24
    assert kept_bytes(lambda x: flaxs.apply(params, x), x_BTD) > 2 * x_BTD.nbytes
    assert kept_bytes(ACTIVATIONS["gelu_tanh"], x_BTD) == 0
    assert kept_bytes(PLAIN["gelu_tanh"], x_BTD) > 2 * x_BTD.nbytes
