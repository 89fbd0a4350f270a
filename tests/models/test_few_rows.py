"""Products with output-major kernels are those of the layers that declared the kernels."""

import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.models.few_rows import MOST_FEW_ROWS, OutputMajor, dense_products, few_rows_product, product

LAYERS = {
    "dense": (nn.Dense(6), (3, 8), 1),
    "without bias": (nn.Dense(6, use_bias=False), (3, 8), 1),
    "heads": (nn.DenseGeneral((3, 2, 4)), (2, 5, 8), 1),
    "of heads": (nn.DenseGeneral(6, axis=(-2, -1)), (2, 5, 4, 2), 2),
    "bfloat16": (nn.Dense(6, dtype="bfloat16"), (1, 8), 1),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_computes_the_same(name):
    layer, shape, inputs = LAYERS[name]
    x = jax.random.normal(jax.random.key(0), shape)
    params = layer.init(jax.random.key(1), x)["params"]
    if "bias" in params:  # initialised to zero
        params["bias"] = jax.random.normal(jax.random.key(2), params["bias"].shape)
    stored = {**params, "kernel": OutputMajor.of(params["kernel"], inputs)}
    expected = layer.apply({"params": params}, x)
    with dense_products():
        found = layer.apply({"params": stored}, x)
        untouched = layer.apply({"params": params}, x)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-2 if name == "bfloat16" else 1e-6, atol=1e-6)
    np.testing.assert_array_equal(untouched, expected)
    np.testing.assert_array_equal(layer.apply({"params": stored}, x), expected)  # unboxed to the declared shape


def test_the_kernel_is_read_as_it_is_stored():
    """No program transposes it, which would cost more than the layout gains."""
    layer = nn.DenseGeneral((2, 4))
    stored = {"kernel": OutputMajor.of(jnp.ones((8, 2, 4)), 1), "bias": jnp.zeros((2, 4))}

    def apply(params, x):
        with dense_products():
            return layer.apply({"params": params}, x)

    assert "transpose" not in str(jax.make_jaxpr(apply)(stored, jnp.ones((1, 8))))
    assert "transpose" in str(
        jax.make_jaxpr(lambda *args: layer.apply({"params": args[0]}, args[1]))(stored, jnp.ones((1, 8)))
    )


def test_a_product_sums_over_all_input_axes():
    kernel = np.arange(24.0, dtype=np.float32).reshape(2, 3, 4)
    x = np.arange(12.0, dtype=np.float32).reshape(2, 2, 3)
    np.testing.assert_allclose(
        product(jnp.asarray(x), OutputMajor.of(jnp.asarray(kernel), 2)), np.einsum("bxy,xyz->bz", x, kernel)
    )


@pytest.mark.parametrize("rows", [1, 2, 7, MOST_FEW_ROWS, MOST_FEW_ROWS + 1])
def test_products_of_all_numbers_of_rows(rows):
    x_NX, values_YX = (np.random.default_rng(i).normal(size=(n, 8)).astype(np.float32) for i, n in enumerate((rows, 5)))
    np.testing.assert_allclose(few_rows_product(x_NX, values_YX), x_NX @ values_YX.T, rtol=1e-5, atol=1e-6)
    half = few_rows_product(
        jnp.asarray(x_NX, "bfloat16"), jnp.asarray(values_YX, "bfloat16"), dtype=jnp.dtype("float32")
    )
    assert half.dtype == jnp.float32
    np.testing.assert_allclose(half, x_NX @ values_YX.T, atol=0.1)


@pytest.mark.parametrize(("rows", "result"), [(4, "f32[160,4]"), (MOST_FEW_ROWS + 1, f"f32[{MOST_FEW_ROWS + 1},160]")])
def test_the_weights_are_the_left_operand_for_few_rows(rows, result):
    """Also in the compiled program: XLA copies the right operand in every call."""
    program = jax.jit(few_rows_product).lower(jnp.ones((rows, 96)), jnp.ones((160, 96))).compile().as_text()
    (product_line,) = re.findall(r"= (\S+)\{\S* dot\(", program)
    assert product_line == result


@pytest.mark.parametrize("change", [lambda box: box.replace_boxed(1), lambda box: box.add_axis(0, {})])
def test_a_stored_kernel_is_read_only(change):
    with pytest.raises(NotImplementedError, match="an output-major kernel"):
        change(OutputMajor.of(jnp.ones((2, 3)), 1))
