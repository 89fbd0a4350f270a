"""Sampling filters against their definitions in numpy, and the distribution of samples."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from gptjax.config import UserError
from gptjax.inference.sampling import Sampling, candidates, likeliest, penalise, sample, top_p_mask

V = 9
# Distinct by at least a hundredth: which of equals are kept is nobody's promise.
distinct_logits = st.lists(st.integers(-600, 600), min_size=V, max_size=V, unique=True).map(
    lambda hundredths: np.array(hundredths, np.float32) / 100
)


def softmax(logits_V: np.ndarray) -> np.ndarray:
    weights_V = np.exp(logits_V - logits_V.max())
    return weights_V / weights_V.sum()


def defined(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution that a token is drawn from, (V,), one rule after the other, token by token."""
    probs_V = softmax(logits_V.astype(np.float64) / sampling.temperature)
    if sampling.top_k is not None:
        probs_V = np.array([p if np.sum(probs_V > p) < sampling.top_k else 0 for p in probs_V])
        probs_V /= probs_V.sum()
    if sampling.top_p is not None:
        probs_V = np.array([p if probs_V[probs_V > p].sum() < sampling.top_p else 0 for p in probs_V])
        probs_V /= probs_V.sum()
    if sampling.min_p is not None:
        probs_V = np.where(probs_V >= sampling.min_p * probs_V.max(), probs_V, 0)
        probs_V /= probs_V.sum()
    return probs_V


def filtered(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The same by the library."""
    logits_BC, token_BC = candidates(jnp.asarray(logits_V)[None], sampling.static, sampling.values)
    probs_V = np.zeros(len(logits_V))
    tokens_C = np.arange(len(logits_V)) if token_BC is None else np.asarray(token_BC)[0]
    probs_V[tokens_C] = jax.nn.softmax(logits_BC[0])
    return probs_V


@given(
    logits_V=distinct_logits,
    temperature=st.floats(0.2, 3),
    top_k=st.sampled_from([None, 1, 4, V, V + 2]),  # each is a shape of its own
    top_p=st.none() | st.floats(0.01, 0.999),
    min_p=st.none() | st.floats(0, 1),
)
def test_each_filter_and_their_order_are_as_defined(logits_V, temperature, top_k, top_p, min_p):
    sampling = Sampling(temperature, top_k, top_p, min_p)
    expected_V = defined(logits_V, sampling)
    # On the brink of a rule, rounding decides: then a nudge of the threshold would change the result.
    for nudge in (1 - 1e-5, 1 + 1e-5):
        nudged = Sampling(temperature, top_k, top_p and top_p * nudge, min_p and min(1, min_p * nudge))
        assume(np.array_equal(defined(logits_V, nudged) > 0, expected_V > 0))
    np.testing.assert_allclose(filtered(logits_V, sampling), expected_V, atol=2e-6)


@pytest.mark.parametrize(
    ("sampling", "kept"),
    [
        (Sampling(top_k=2), [0, 1]),
        (Sampling(top_k=9), [0, 1, 2, 3]),
        (Sampling(top_p=0.49), [0]),
        (Sampling(top_p=0.51), [0, 1]),  # the token that passes the threshold stays
        (Sampling(top_p=1.0), [0, 1, 2, 3]),
        (Sampling(min_p=0.31), [0, 1]),
        (Sampling(min_p=0.29), [0, 1, 2]),
        (Sampling(min_p=0.0), [0, 1, 2, 3]),
        (Sampling(min_p=1.0), [0]),
        (Sampling(temperature=0.5, top_p=0.6), [0]),  # 0.5**2 is 0.68 of the sum of squares
        (Sampling(top_k=2, top_p=0.6), [0]),  # among two, 0.5 is 0.625
    ],
)
def test_filters_by_hand(sampling, kept):
    probs_V = np.array([0.5, 0.3, 0.15, 0.05])
    assert np.flatnonzero(filtered(np.log(probs_V).astype(np.float32), sampling)).tolist() == kept


def test_the_likeliest_token_always_stays():
    logits_V = np.array([0.0, 9.0, 0.0], np.float32)
    for sampling in (Sampling(top_k=1), Sampling(top_p=1e-6), Sampling(min_p=1.0)):
        assert filtered(logits_V, sampling).tolist() == [0, 1, 0]


def test_repetition_penalty_by_hand():
    logits_BV = jnp.array([[2.0, -2.0, 3.0, -1.0]])
    seen_BV = jnp.array([[True, True, False, False]])
    assert penalise(logits_BV, seen_BV, np.float32(4)).tolist() == [[0.5, -8.0, 3.0, -1.0]]


@partial(jax.jit, static_argnums=(2, 3))
def draw(logits_V, knobs, form, number, seen_V=None):
    """`number` tokens with as many seeds, in one call."""
    keys_B = jax.vmap(jax.random.key)(jnp.arange(number))
    logits_BV = jnp.broadcast_to(logits_V, (number, len(logits_V)))
    seen_BV = None if seen_V is None else jnp.broadcast_to(seen_V, logits_BV.shape)
    return sample(logits_BV, seen_BV, keys_B, form, knobs)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        Sampling(temperature=0.5),
        Sampling(temperature=1.5, top_k=5),
        Sampling(top_p=0.8),
        Sampling(min_p=0.1),
        Sampling(temperature=2.0, top_k=7, top_p=0.9, min_p=0.12),
    ],
    ids=str,
)
def test_draws_are_distributed_as_the_filters_leave_it(sampling):
    number = 20_000
    logits_V = np.random.default_rng(0).normal(size=12).astype(np.float32)
    expected_V = defined(logits_V, sampling)
    counts_V = np.bincount(draw(logits_V, sampling.values, sampling.static, number), minlength=12)
    assert not counts_V[expected_V == 0].any()
    kept = expected_V > 0
    assert stats.chisquare(counts_V[kept], number * expected_V[kept]).pvalue > 1e-3


def test_draws_with_a_repetition_penalty_are_distributed_so():
    logits_V = np.array([1.0, 0.5, -0.5, 0.0], np.float32)
    sampling = Sampling(repetition_penalty=2.0)
    counts_V = np.bincount(
        draw(logits_V, sampling.values, sampling.static, 20_000, jnp.array([True, False, True, False])), minlength=4
    )
    expected_V = softmax(np.array([0.5, 0.5, -1.0, 0.0]))
    assert stats.chisquare(counts_V, 20_000 * expected_V).pvalue > 1e-3


def test_temperature_0_is_greedy_and_knows_no_filter_but_the_penalty():
    logits_V = np.array([1.0, 3.0, 2.5, -1.0], np.float32)
    greedy = Sampling(temperature=0, top_k=2, top_p=0.9, min_p=0.5)
    assert set(np.asarray(draw(logits_V, greedy.values, greedy.static, 50)).tolist()) == {1}
    penalised = Sampling(temperature=0, repetition_penalty=2.0)
    seen_V = jnp.array([False, True, False, False])
    assert set(np.asarray(draw(logits_V, penalised.values, penalised.static, 50, seen_V)).tolist()) == {2}


@pytest.mark.parametrize("temperature", [1e-30, 1e-38, 1e-45, 1e-300])  # a normal float32, subnormal ones, and 0
def test_a_tiny_temperature_is_greedy(temperature):
    logits_V = np.array([-3.0, -1.0, -1.0625, -7.0], np.float32)
    for sampling in (Sampling(temperature), Sampling(temperature, top_k=3, top_p=0.9, min_p=0.1)):
        assert set(np.asarray(draw(logits_V, sampling.values, sampling.static, 50)).tolist()) == {1}


def test_an_enormous_temperature_is_uniform():
    sampling = Sampling(1e300)
    logits_BC, _ = candidates(jnp.array([[3.0, -50.0, 1e4]]), sampling.static, sampling.values)
    np.testing.assert_allclose(jax.nn.softmax(logits_BC), np.full((1, 3), 1 / 3), rtol=1e-6)


def test_an_extreme_repetition_penalty_leaves_numbers():
    logits_V, seen_V = np.array([1.0, 3.0, 2.5, -1.0], np.float32), jnp.array([True, True, False, False])
    for penalty, expected in ((1e-300, {0, 1}), (1e300, {2})):
        sampling = Sampling(1e-3, repetition_penalty=penalty)
        assert set(np.asarray(draw(logits_V, sampling.values, sampling.static, 50, seen_V)).tolist()) <= expected


@pytest.mark.parametrize(
    ("field", "value", "range_"),
    [
        ("temperature", -0.1, "at least 0"),
        ("temperature", float("nan"), "at least 0"),
        ("top_k", 0, "at least 1"),
        ("top_p", 0.0, "in (0, 1]"),
        ("top_p", 1.01, "in (0, 1]"),
        ("min_p", -0.01, "in [0, 1]"),
        ("min_p", 1.01, "in [0, 1]"),
        ("repetition_penalty", 0.0, "positive"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_range(field, value, range_):
    with pytest.raises(UserError) as error:
        Sampling(**{field: value})
    assert str(error.value) == f"{field}={value} must be {range_}"


def test_needed_are_the_likeliest_of_a_sorted_vocabulary():
    """With a large vocabulary, in which many probabilities are close to each other."""
    rng = np.random.default_rng(0)
    for scale in (0.01, 1.0, 8.0):
        logits_BV = (rng.normal(0, scale, (4, 5003)) - 3).astype(np.float32)
        logits_BV[2, ::7] = -np.inf
        for top_p in (1e-3, 0.3, 0.9):
            probs_BV = np.asarray(jax.nn.softmax(jnp.asarray(logits_BV)), np.float64)
            falling_BV = -np.sort(-probs_BV, axis=-1)
            number_B = np.sum(np.cumsum(falling_BV, axis=-1) - falling_BV < top_p, axis=-1)
            kept_BV = np.asarray(top_p_mask(jnp.asarray(logits_BV), np.float32(top_p)))
            np.testing.assert_allclose(kept_BV.sum(axis=-1), number_B, atol=1)  # float32 sums
            for kept_V, logits_V in zip(kept_BV, logits_BV, strict=True):
                assert logits_V[kept_V].min() > logits_V[~kept_V].max()


def test_the_likeliest_of_equals_is_the_first():
    logits_BV = jnp.array([[0.0, 2.0, 2.0, 1.0], [3.0, 3.0, 3.0, 3.0], [-1.0, -2.0, -jnp.inf, -0.5]])
    assert likeliest(logits_BV).tolist() == [1, 0, 3]
    random_BV = jax.random.randint(jax.random.key(0), (64, 300), 0, 50).astype(jnp.float32)
    np.testing.assert_array_equal(likeliest(random_BV), jnp.argmax(random_BV, axis=-1))


@pytest.mark.parametrize("sampling", [Sampling(0.7), Sampling(1.3, top_k=20), Sampling(1.1, min_p=0.05)])
def test_draws_are_those_of_jax(sampling):
    """Samples are those of `jax.random.categorical`, so that a seed keeps its completion."""
    logits_BV = jax.random.normal(jax.random.key(1), (16, 301))
    keys_B = jax.random.split(jax.random.key(2), 16)
    logits_BC, token_BC = candidates(logits_BV, sampling.static, sampling.values)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BC)
    expected_B = drawn_B if token_BC is None else jnp.take_along_axis(token_BC, drawn_B[:, None], axis=1)[:, 0]
    np.testing.assert_array_equal(sample(logits_BV, None, keys_B, sampling.static, sampling.values), expected_B)
