"""The weight formats for decoding give the same model, up to rounding."""

import hypothesis
import hypothesis.extra.numpy as hnp
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st

from gptjax.config import UserError
from gptjax.inference import weights as weights_module
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.inference.weights import Int8, prepare
from gptjax.models.decoding import forward, logits
from gptjax.models.few_rows import OutputMajor

TOKENS_BT = np.random.default_rng(3).integers(0, 60, (2, 24)).astype(np.int32)


def distributions(engine: Engine) -> np.ndarray:
    """(B, T, V), of what comes after each token."""

    @jax.jit
    def run(params):
        return jax.nn.softmax(logits(engine.model, params, forward(engine.model, params, TOKENS_BT)[0]))

    return np.asarray(run(engine.params))


def test_stacked_is_as_given(engine_of, prompts):
    greedy = Sampling(temperature=0)
    for one, other in zip(
        engine_of("banded").generate(prompts, 12, greedy),
        engine_of("banded", "stacked").generate(prompts, 12, greedy),
        strict=True,
    ):
        np.testing.assert_array_equal(one.tokens, other.tokens)
        np.testing.assert_allclose(one.logprobs, other.logprobs, atol=1e-5)


def test_smaller_weights_give_nearly_the_same_distributions(engine_of):
    exact_BTV = distributions(engine_of("banded"))
    for weights, most in (("bfloat16", 0.02), ("int8", 0.02)):
        distance_BT = np.abs(distributions(engine_of("banded", weights)) - exact_BTV).sum(axis=-1) / 2
        assert 1e-4 < distance_BT.mean() < most, weights
        assert distance_BT.max() < 10 * most, weights


def test_matrices_have_the_bytes_that_were_asked_for(engine_of):
    def matrices(weights: str) -> list:
        """Those that products read; an Int8 is one."""
        params = engine_of("banded", weights).params
        is_box = lambda leaf: isinstance(leaf, Int8 | OutputMajor)  # noqa: E731
        leaves = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_box)
        found = [leaf for path, leaf in leaves if path[-1].key == "kernel" or path[-2].key == "token_embedding"]
        assert len(found) == 1 + 2 * 4  # the token embedding, and 4 of each layer
        return [leaf.values_YX if isinstance(leaf, OutputMajor) else leaf for leaf in found]

    assert {leaf.dtype.name for leaf in matrices("as_given")} == {"float32"}
    assert {leaf.dtype.name for leaf in matrices("bfloat16")} == {"bfloat16"}
    assert {leaf.values.dtype.name for leaf in matrices("int8")} == {"int8"}
    for given, small in zip(matrices("as_given"), matrices("int8"), strict=True):
        assert small.values.nbytes == given.nbytes / 4
        assert small.scale.size <= given.size / 16  # of which all sums are of at least as many
    assert engine_of("banded", "bfloat16").model.config.dtype == "bfloat16"


@hypothesis.given(
    kernel=hnp.arrays(np.float32, (3, 2, 4), elements=st.floats(-100, 100, width=32)),
    summed_axes=st.sampled_from([(0,), (0, 1), (1,), (2,)]),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16]),
)
@hypothesis.example(kernel=np.full((1, 1, 1), 1.3515625, np.float32), summed_axes=(0,), dtype=jnp.bfloat16)
def test_int8_is_off_by_half_a_step_at_most(kernel, summed_axes, dtype):
    quantized = Int8.quantize(jnp.asarray(kernel, dtype), summed_axes)
    kernel = np.asarray(jnp.asarray(kernel, dtype), np.float32)
    step = np.abs(kernel).max(axis=summed_axes, keepdims=True) / 127
    np.testing.assert_allclose(quantized.scale, step, rtol=1e-6, atol=1e-30)
    assert np.all(np.abs(np.asarray(quantized.values, np.int32)) <= 127)
    assert np.all(np.abs(quantized.unbox() - kernel) <= step * (0.5 + 1e-4) + 1e-30)  # less is taken for 0


def test_int8_has_a_scale_for_each_output(engine_of):
    """One for all would round the small outputs away."""
    kernel = jnp.array([[100.0, 0.01, 0.0], [50.0, -0.02, 0.0]])
    np.testing.assert_allclose(Int8.quantize(kernel, (0,)).unbox(), kernel, rtol=0.01)
    layer = engine_of("banded", "int8").params["layers"][0]
    assert layer["attention"]["qkv"]["kernel"].scale.shape == (1, 3, 2, 8)
    assert layer["attention"]["out"]["kernel"].scale.shape == (1, 1, 16)
    assert layer["mlp"]["up"]["kernel"].scale.shape == (1, 64)
    assert layer["mlp"]["down"]["kernel"].scale.shape == (1, 16)


def test_unknown_weights_are_an_error(engine_of):
    engine = engine_of("banded")
    with pytest.raises(UserError, match=r"weights='int4' is not one of as_given, bfloat16, int8, stacked"):
        prepare(engine.model, engine.params, "int4")


@pytest.mark.parametrize("weights", ["as_given", "bfloat16", "int8"])
def test_a_second_engine_of_a_model_compiles_nothing(engine_of, model_of, weights):
    """Whatever its weights are; and it has its own."""
    first = engine_of("banded", weights)
    compiled = weights_module._prepare._cache_size()
    assert compiled > 0
    model, params = model_of("banded")
    second = Engine(model, jax.tree.map(lambda leaf: 2 * leaf, params), first.tokenizer, weights=weights)
    assert weights_module._prepare._cache_size() == compiled
    biases = [engine.params["layers"][1]["mlp"]["up"]["bias"] for engine in (first, second)]
    np.testing.assert_array_equal(biases[1], 2 * biases[0])
