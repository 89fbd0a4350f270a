"""8-bit matrix products: rounding, gradients, supported devices, and training."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as c
from gptjax.checkpoint.state import create_state, state_shardings
from gptjax.models import attention_backends, low_precision
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.platforms import override_defaults
from gptjax.stages import registry
from gptjax.training.step import make_train_step

MODEL = c.GPTConfig(vocab_size=32, context_length=16, num_layers=2, num_heads=2, embed_dim=32, layer_loop="unroll")


@pytest.fixture
def emulated():
    with override_defaults("cpu", emulate_low_precision=True):
        yield


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
@pytest.mark.parametrize("size", [1e-20, 1.0, 1e6])
def test_rounding_keeps_the_bits_that_the_format_has(dtype, size):
    x_NM = size * jax.random.normal(jax.random.key(0), (64, 8))
    numbers, scale = low_precision.rounded(x_NM, dtype)
    largest = np.abs(x_NM).max()
    wrong = np.abs(numbers.astype(jnp.float32) * scale - x_NM)
    assert numbers.dtype == dtype
    bits = jnp.finfo(dtype).nmant
    assert np.all(wrong <= 2.0 ** -(bits + 1) * np.abs(x_NM) + 1e-4 * largest)
    assert np.all(low_precision.rounded(0 * x_NM, dtype)[0].astype(jnp.float32) == 0)


def test_int8_keeps_a_127th_of_the_largest_of_each_row():
    x_NM = jnp.array([1e-20, 1.0, 1e6])[:, None, None] * jax.random.normal(jax.random.key(0), (3, 16, 8))
    numbers, scale = low_precision.rounded_to_int8(x_NM, range(1, 3))
    largest = np.abs(x_NM).max(axis=(1, 2), keepdims=True)
    assert numbers.dtype == jnp.int8
    assert np.all(np.abs(numbers).max(axis=(1, 2)) == 127)
    assert np.all(np.abs(numbers * scale - x_NM) <= 1.001 * largest / 254)
    assert not np.any(low_precision.rounded_to_int8(0 * x_NM, range(1, 3))[0])


@pytest.mark.parametrize("bad", [np.inf, np.nan])
def test_what_is_not_finite_shows(bad):
    x_NM = jnp.ones((4, 8)).at[1, 2].set(bad)
    assert not np.isfinite(low_precision.float8_product(x_NM, jnp.ones((8, 3)), 1)).any()
    finite = np.isfinite(low_precision.int8_product(x_NM, jnp.ones((8, 3)), 1))
    assert list(finite.all(axis=1)) == [True, False, True, True]
    assert not finite[1].any()


SHAPES = [((2, 5, 16), (16, 3, 2, 4), 1), ((2, 5, 4, 4), (4, 4, 8), 2)]  # of x and kernel, and axes summed over


def multiplied(product, x_shape, kernel_shape, count):
    """Random x and kernel, their product, a cotangent, and the gradients that it gives."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, kernel = jax.random.normal(keys[0], x_shape), jax.random.normal(keys[1], kernel_shape)
    y, pullback = jax.vjp(lambda x, kernel: product(x, kernel, count), x, kernel)
    dy = jax.random.normal(keys[2], y.shape)
    return x, kernel, y, dy, pullback(dy)


@pytest.mark.parametrize(("x", "kernel", "count"), SHAPES)
def test_int8_multiplies_rounded_arrays_forward_and_exact_ones_backward(x, kernel, count):
    x, kernel, y, dy, gradients = multiplied(low_precision.int8_product, x, kernel, count)
    exact, expected = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, count), x, kernel)
    x8, x_scale = low_precision.rounded_to_int8(x, range(x.ndim - count, x.ndim))
    kernel8, kernel_scale = low_precision.rounded_to_int8(kernel, range(count))
    np.testing.assert_allclose(y, jnp.tensordot(x8 * x_scale, kernel8 * kernel_scale, count), rtol=1e-5, atol=1e-5)
    assert 1e-4 < np.linalg.norm(y - exact) / np.linalg.norm(exact) < 0.02
    for a, b in zip(gradients, expected(dy), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("x", "kernel", "count"), SHAPES)
def test_float8_products_and_gradients_are_those_of_the_rounded_arrays(x, kernel, count):
    x, kernel, y, dy, gradients = multiplied(low_precision.float8_product, x, kernel, count)

    def back(array, dtype):
        numbers, scale = low_precision.rounded(array, dtype)
        return numbers.astype(jnp.float32) * scale

    x8, kernel8 = (back(array, jnp.float8_e4m3fn) for array in (x, kernel))
    expected, exact = jax.vjp(lambda x, kernel: jnp.tensordot(x, kernel, count), x8, kernel8)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    for a, b in zip(gradients, exact(back(dy, jnp.float8_e5m2)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4)


def losses(matmul_dtype: str, steps: int = 12) -> list[float]:
    """The losses of a model trained on one batch."""
    model = dataclasses.replace(MODEL, matmul_dtype=matmul_dtype)
    config = c.Config(model=model, batch=c.BatchConfig(total_tokens=1, tokens_per_batch=8 * 16))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    tokens_MBT = jax.random.randint(jax.random.key(0), (1, 8, 16), 0, 32)
    batch = {"tokens": tokens_MBT, "targets": jnp.roll(tokens_MBT, -1, 2), "weights": jnp.ones(tokens_MBT.shape)}
    with jax.set_mesh(mesh):
        objective = registry.objective(config)
        step, state = (
            make_train_step(objective, state_shardings(objective.parameters, mesh)),
            create_state(objective.parameters, mesh),
        )
        measured = []
        for _ in range(steps):
            state, metrics = step(state, batch, np.int32(1), {"lr": np.float32(1e-2)})
            measured.append(float(metrics["loss"]))
    return measured


@pytest.mark.slow
@pytest.mark.parametrize("matmul_dtype", low_precision.DOT_GENERAL)
def test_a_model_learns_as_much(emulated, matmul_dtype):
    ours, exact = losses(matmul_dtype), losses("model")
    assert ours != exact
    assert exact[-1] < 0.7 * exact[0]
    np.testing.assert_allclose(ours, exact, rtol=0.03)


def test_devices_without_it_say_so(monkeypatch):
    models = {name: dataclasses.replace(MODEL, matmul_dtype=name) for name in ("model", "float8", "int8")}
    with pytest.raises(c.UserError, match=r"model.matmul_dtype=float8 needs an NVIDIA GPU of compute capability 8.9"):
        low_precision.check_device(models["float8"], "tpu")
    with pytest.raises(c.UserError, match=r"model.matmul_dtype=int8 needs a TPU or an NVIDIA GPU of .* 8.0"):
        low_precision.check_device(models["int8"], "cpu")
    with pytest.raises(c.UserError, match="float8"):
        losses("float8", steps=1)
    low_precision.check_device(models["int8"], "tpu")
    low_precision.check_device(models["model"], "cpu")
    monkeypatch.setattr(attention_backends, "compute_capability", lambda: 8.0)  # an A100
    low_precision.check_device(models["int8"], "gpu")
    with pytest.raises(c.UserError, match="float8"):
        low_precision.check_device(models["float8"], "gpu")
