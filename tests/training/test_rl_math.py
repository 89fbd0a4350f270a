"""The equations of learning from preferences, on numbers worked out by hand."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.training import rl_math


def softplus(x: float) -> float:
    return math.log(1 + math.exp(x))


def test_ranking_loss_by_hand():
    scores = jnp.array([[2.0, 1.0, 1.5], [0.0, 3.0, 9.0]])
    present = jnp.array([[True, True, True], [True, True, False]])
    losses, accuracies = jax.jit(rl_math.ranking_loss)(scores, present)
    # Pairs of the first: 2 over 1, 2 over 1.5, 1 over 1.5; of the second only 0 over 3, which is the wrong way round.
    assert losses[0] == pytest.approx((softplus(-1) + softplus(-0.5) + softplus(0.5)) / 3, rel=1e-6)
    assert losses[1] == pytest.approx(softplus(3), rel=1e-6)
    assert accuracies.tolist() == pytest.approx([2 / 3, 0])
    assert losses.dtype == jnp.float32


def test_scores_count_by_their_differences_alone():
    scores, present = jnp.array(np.random.default_rng(0).normal(size=(4, 5)), jnp.float32), jnp.ones((4, 5), bool)
    np.testing.assert_allclose(
        rl_math.ranking_loss(scores + 100, present)[0], rl_math.ranking_loss(scores, present)[0], rtol=1e-4
    )


def test_a_prompt_without_pairs_has_no_loss_and_no_gradient():
    present = jnp.array([[True, False, False], [False, False, False]])
    scores = jnp.array([[1.0, jnp.inf, 2.0], [0.0, 1.0, 2.0]])
    losses, accuracies = rl_math.ranking_loss(scores, present)
    assert losses.tolist() == accuracies.tolist() == [0, 0]
    finite = jnp.ones((2, 3))
    assert not jnp.any(jax.grad(lambda s: jnp.sum(rl_math.ranking_loss(s, present)[0]))(finite))


def test_dpo_loss_by_hand():
    better, worse = jnp.array([[-10.0]]), jnp.array([[-12.0]])
    reference_better, reference_worse = jnp.array([[-11.0]]), jnp.array([[-9.0]])
    # Log-ratios 1 and -3, so the margin is 0.5 x 4.
    losses, margins = rl_math.dpo_loss(better, worse, reference_better, reference_worse, 0.5)
    assert float(margins[0, 0]) == pytest.approx(2.0)
    assert float(losses[0, 0]) == pytest.approx(softplus(-2.0), rel=1e-6)
    smoothed, _ = rl_math.dpo_loss(better, worse, reference_better, reference_worse, 0.5, 0.2)
    assert float(smoothed[0, 0]) == pytest.approx(0.8 * softplus(-2.0) + 0.2 * softplus(2.0), rel=1e-6)


def test_the_gradient_of_dpo_is_the_papers():
    """Rafailov et al. 2023, section 4: -beta sigmoid(-margin) for the better answer, the opposite for the worse."""
    better, worse, reference = jnp.array([[-10.0]]), jnp.array([[-12.0]]), jnp.array([[-11.0]])

    def loss(better, worse):
        return rl_math.dpo_loss(better, worse, reference, reference, 0.5)[0][0, 0]

    gradients = jax.grad(loss, (0, 1))(better, worse)
    expected = 0.5 / (1 + math.exp(0.5 * 2))
    assert [float(g[0, 0]) for g in gradients] == pytest.approx([-expected, expected], rel=1e-6)
