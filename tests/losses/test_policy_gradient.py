"""The losses of PPO, GRPO, reward models and DPO: values computed by hand, and invariants.

Longer than 400 lines because both modules of losses share the helpers of their tests.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.losses import policy_gradient, preference


def close(actual, expected, rtol=1e-6, atol=1e-6):
    assert actual.dtype == jnp.float32
    assert actual.shape == np.shape(expected)
    np.testing.assert_allclose(actual, expected, rtol=rtol, atol=atol)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def log_sigmoid(x):
    return -math.log1p(math.exp(-x))


# Three rows: a completion in the middle, one that fills its row, one at the end.
MASK = np.array([[0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]], bool)
REWARDS, VALUES = normal(3, 6, seed=1), normal(3, 6, seed=2)


class TestDivergences:
    def test_by_hand(self):
        # pi = 0.5 and 0.2, pi_ref = 0.25 and 0.8, so pi_ref / pi = 0.5 and 4.
        policy, reference = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.25, 0.8]))
        close(policy_gradient.kl_k1(policy, reference), [math.log(2), -math.log(4)])
        close(policy_gradient.kl_k3(policy, reference), [0.5 - 1 + math.log(2), 4 - 1 - math.log(4)])

    @pytest.mark.parametrize("estimator", [policy_gradient.kl_k1, policy_gradient.kl_k3])
    def test_are_unbiased(self, estimator):
        p, q = np.array([0.5, 0.3, 0.2]), np.array([0.2, 0.2, 0.6])
        on_average = np.sum(p * estimator(jnp.log(p), jnp.log(q)))
        np.testing.assert_allclose(on_average, np.sum(p * np.log(p / q)), rtol=1e-6)

    def test_k3_is_never_negative_and_precise_where_policies_are_close(self):
        # exp(d) - 1 - d is d^2 / 2 for a small d; 1e-4 squared is lost in float32 if 1 is ever added to d.
        apart = jnp.array([-1e-4, 0.0, 1e-4])
        close(policy_gradient.kl_k3(jnp.zeros(3), apart), [5e-9, 0, 5e-9], rtol=1e-2, atol=0)
        assert np.all(policy_gradient.kl_k3(normal(100), normal(100, seed=1)) >= 0)

    def test_gradient_of_k3_vanishes_at_the_reference(self):
        gradient = jax.grad(lambda x: jnp.sum(policy_gradient.kl_k3(x, jnp.array([-1.0, -2.0]))))
        close(gradient(jnp.array([-1.0, -2.0])), [0.0, 0.0])
        close(gradient(jnp.array([-1.0 + math.log(2), -2.0])), [1 - 0.5, 0.0])  # 1 - pi_ref / pi


class TestEntropy:
    def test_by_hand(self):
        # Even odds of 4; certainty; 1/2, 1/4, 1/4: ln 2 / 2 + ln 4 / 2.
        logits = jnp.array([[0.0, 0, 0, 0], [200.0, 0, 0, 0], [math.log(2), 0, 0, -math.inf]])
        close(policy_gradient.entropy(logits), [math.log(4), 0, 1.5 * math.log(2)])

    def test_gradient_with_a_probability_of_0(self):
        # d entropy / d logit = -p (log p + entropy).
        gradient = jax.grad(policy_gradient.entropy)(jnp.array([math.log(2), 0, 0, -math.inf]))
        close(gradient, [0.5 * -0.5 * math.log(2), 0.25 * 0.5 * math.log(2), 0.25 * 0.5 * math.log(2), 0])


class TestPenalisedRewards:
    def test_by_hand(self):
        rewards = policy_gradient.penalised_rewards(
            jnp.array([2.0, -1.0, 5.0]),
            jnp.array([[9.0, -1, -2, 9], [-1, -3, -2, -1], [1, 2, 3, 4]]),
            jnp.array([[7.0, -2, -4, 8], [-1, -2, -5, -1], [4, 3, 2, 1]]),
            jnp.array([[0, 1, 1, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
            0.1,
        )
        # The log-ratios of the tokens: 1 and 2; 0, -1, 3 and 0; none. The score is added at the last.
        close(rewards, [[0, -0.1, 2 - 0.2, 0], [0, 0.1, -0.3, -1 + 0], [0, 0, 0, 0]])

    def test_sums_to_the_score_minus_the_sum_of_penalties(self):
        scores, policy, reference = normal(3), normal(3, 6), normal(3, 6, seed=3)
        rewards = policy_gradient.penalised_rewards(scores, policy, reference, MASK, 0.3)
        close(jnp.sum(rewards, 1), scores - 0.3 * np.sum(MASK * (policy - reference), 1), atol=1e-5)


class TestGAE:
    def test_by_hand(self):
        # discount 0.5, lambda 0.5; from the last token on:
        # delta_3 = 2 - 3               = -1         A_3 = -1
        # delta_2 = 0 + 0.5 x 3 - 1     = 0.5        A_2 = 0.5 + 0.25 x -1    = 0.25
        # delta_1 = 1 + 0.5 x 1 - 2     = -0.5       A_1 = -0.5 + 0.25 x 0.25 = -0.4375
        advantages, returns = policy_gradient.gae(
            jnp.array([[1.0, 0, 2]]), jnp.array([[2.0, 1, 3]]), jnp.ones((1, 3)), discount=0.5, gae_lambda=0.5
        )
        close(advantages, [[-0.4375, 0.25, -1]])
        close(returns, [[2 - 0.4375, 1 + 0.25, 3 - 1]])

    def test_lambda_1_is_the_discounted_return_minus_the_value(self):
        advantages, returns = policy_gradient.gae(REWARDS, VALUES, MASK, 0.9, 1.0)
        for row, token in np.argwhere(MASK):
            ahead = np.flatnonzero(MASK[row, token:])
            future = np.sum(0.9**ahead * REWARDS[row, token:][ahead])
            np.testing.assert_allclose(returns[row, token], future, atol=1e-5)
            np.testing.assert_allclose(advantages[row, token], future - VALUES[row, token], atol=1e-5)

    def test_lambda_0_is_the_temporal_difference_error(self):
        advantages, _ = policy_gradient.gae(REWARDS, VALUES, MASK, 0.9, 0.0)
        next_values = np.pad(VALUES * MASK, ((0, 0), (0, 1)))[:, 1:]
        close(advantages, MASK * (REWARDS + 0.9 * next_values - VALUES), atol=1e-5)

    def test_discount_0_is_the_reward_minus_the_value(self):
        advantages, returns = policy_gradient.gae(REWARDS, VALUES, MASK, 0.0, 0.95)
        close(advantages, MASK * (REWARDS - VALUES))
        close(returns, MASK * REWARDS)

    def test_packing_completions_into_a_row_changes_nothing(self):
        """Each in its own row, or two in one row with a gap between them."""
        row = slice(0, 3)
        alone = [
            policy_gradient.gae(r[None], v[None], jnp.ones((1, 3), bool), 0.9, 0.8)
            for r, v in ((REWARDS[0, row], VALUES[0, row]), (REWARDS[1, row], VALUES[1, row]))
        ]
        gap = np.full((1, 1), 7, np.float32)
        rewards = np.concatenate([gap, REWARDS[:1, row], gap, REWARDS[1:2, row], gap], axis=1)
        values = np.concatenate([gap, VALUES[:1, row], gap, VALUES[1:2, row], gap], axis=1)
        packed = policy_gradient.gae(rewards, values, jnp.array([[0, 1, 1, 1, 0, 1, 1, 1, 0]]), 0.9, 0.8)
        for together, (first, second) in zip(packed, zip(*alone, strict=True), strict=True):
            np.testing.assert_array_equal(together[:, 1:4], first)
            np.testing.assert_array_equal(together[:, 5:8], second)


class TestWhiten:
    def test_by_hand(self):
        # 1, 2, 3 and 6: mean 3, variance (4 + 1 + 0 + 9) / 3.
        x, mask = jnp.array([[1.0, 2, 50], [3, 50, 6]]), jnp.array([[1, 1, 0], [1, 0, 1]])
        unit = math.sqrt(14 / 3)
        close(policy_gradient.whiten(x, mask), [[-2 / unit, -1 / unit, 0], [0, 0, 3 / unit]])
        close(
            policy_gradient.whiten(x, mask, shift_mean=False), [[3 - 2 / unit, 3 - 1 / unit, 0], [3, 0, 3 + 3 / unit]]
        )

    def test_has_mean_0_and_variance_1_in_the_mask(self):
        whitened = np.asarray(policy_gradient.whiten(5 + 3 * normal(3, 6), MASK))[MASK]
        np.testing.assert_allclose(np.mean(whitened), 0, atol=1e-6)
        np.testing.assert_allclose(np.var(whitened, ddof=1), 1, rtol=1e-5)

    @pytest.mark.parametrize("count", [0, 1])
    def test_is_0_for_too_few_tokens_for_a_variance(self, count):
        close(policy_gradient.whiten(jnp.array([[3.0, 4.0]]), jnp.arange(2)[None] < count), [[0.0, 0.0]])


class TestPolicyLoss:
    # Ratios above and below 1 +- 0.2, each with either sign of A.
    RATIOS, ADVANTAGES = (1.5, 1.5, 0.5, 0.5, 1.1), (2.0, -2.0, 2.0, -2.0, 2.0)

    def loss(self, log_ratios, advantages):
        return policy_gradient.policy_loss(log_ratios - 3, jnp.full(len(log_ratios), -3.0), jnp.array(advantages), 0.2)

    def test_by_hand(self):
        losses, clipped = self.loss(jnp.log(jnp.array(self.RATIOS)), self.ADVANTAGES)
        # A = 2: -min(3, 1.2 x 2) clipped, -min(1, 0.8 x 2) not; A = -2: -min(-3, -2.4) not, -min(-1, -1.6) clipped.
        close(losses, [-2.4, 3.0, -1.0, 1.6, -2.2])
        close(clipped, [1.0, 0.0, 0.0, 1.0, 0.0])

    def test_gradient_is_0_exactly_where_clipped(self):
        gradient = jax.grad(lambda x: jnp.sum(self.loss(x, self.ADVANTAGES)[0]))(jnp.log(jnp.array(self.RATIOS)))
        close(gradient, [0, -1.5 * -2, -0.5 * 2, 0, -1.1 * 2])  # else -ratio A

    def test_at_ratio_1_the_gradient_is_the_policy_gradient(self):
        logits_TV, tokens_T, advantages_T = normal(5, 7), np.array([0, 3, 6, 2, 2]), normal(5, seed=4)

        def logprobs_T(logits_TV):
            return jax.nn.log_softmax(logits_TV)[np.arange(5), tokens_T]

        def clipped(logits_TV):
            return jnp.sum(
                policy_gradient.policy_loss(logprobs_T(logits_TV), logprobs_T(logits_TV), advantages_T, 0.2)[0]
            )

        # -A grad log pi(a) = -A (onehot(a) - p): no gradient flows through the old policy and the advantages.
        expected = -advantages_T[:, None] * (np.eye(7)[tokens_T] - jax.nn.softmax(logits_TV))
        close(jax.grad(clipped)(logits_TV), expected)

    def test_zero_advantages_give_zero_gradient(self):
        gradient = jax.grad(lambda x: jnp.sum(self.loss(x, [0.0] * 6)[0]))(normal(6))
        np.testing.assert_array_equal(gradient, 0)


class TestValueLoss:
    # V_old 1, clip 0.5. V beyond it towards the return, beyond it away from it, within it, below.
    VALUES, RETURNS = (2.0, 2.0, 1.2, 0.0), (3.0, 0.0, 3.0, -1.0)

    def loss(self, values):
        return policy_gradient.value_loss(values, jnp.ones(4), jnp.array(self.RETURNS), 0.5)

    def test_by_hand(self):
        losses, clipped = self.loss(jnp.array(self.VALUES))
        # max((2 - 3)^2, (1.5 - 3)^2) / 2; max(2^2, 1.5^2) / 2; (1.2 - 3)^2 / 2; max((0 + 1)^2, (0.5 + 1)^2) / 2.
        close(losses, [1.125, 2.0, 1.62, 1.125])
        close(clipped, [1.0, 0.0, 0.0, 1.0])

    def test_gradient_is_0_exactly_where_clipped(self):
        close(jax.grad(lambda v: jnp.sum(self.loss(v)[0]))(jnp.array(self.VALUES)), [0, 2.0, -1.8, 0])

    def test_no_gradient_flows_through_returns(self):
        gradient = jax.grad(lambda v: jnp.sum(policy_gradient.value_loss(v, v, v + 2, 0.5)[0]))
        close(gradient(jnp.array([1.0, -3.0])), [-2.0, -2.0])


class TestGroupAdvantages:
    def test_by_hand(self):
        # 1, 2, 6: mean 3, variance (4 + 1 + 9) / 2 = 7.
        rewards = jnp.array([[1.0, 2, 6]])
        unit = math.sqrt(7) + 1e-4
        close(policy_gradient.group_advantages(rewards), [[-2 / unit, -1 / unit, 3 / unit]])
        close(policy_gradient.group_advantages(rewards, by_std=False), [[-2.0, -1.0, 3.0]])
        close(policy_gradient.group_advantages(rewards, eps=1.0), np.array([[-2, -1, 3]]) / (math.sqrt(7) + 1))

    @pytest.mark.parametrize("by_std", [True, False])
    def test_equal_rewards_have_advantages_of_0(self, by_std):
        # Their mean in float32 can differ from them by a rounding error.
        rewards = jnp.array([[0.0] * 7, [100.1] * 7, [-0.1] * 7])
        np.testing.assert_array_equal(policy_gradient.group_advantages(rewards, by_std=by_std), 0)
        np.testing.assert_array_equal(policy_gradient.group_advantages(rewards[:, :1], by_std=by_std), 0)


class TestAggregation:
    """Completions of 3, 1 and 2 tokens and one without tokens, with per-token losses in the comments."""

    MASK = np.array([[1, 1, 1, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]], bool)
    LOSSES = np.array([[1.0, 2, 6, 9], [9, 5, 9, 9], [3, -1, 9, 9], [9, 9, 9, 9]], np.float32)

    def aggregate(self, aggregation, rows=slice(None)):
        weights_NT = policy_gradient.token_weights(self.MASK[rows], aggregation, max_tokens=4)
        normaliser = (
            jnp.float32(np.any(self.MASK[rows], axis=1).sum()) if aggregation == "dr_grpo" else jnp.sum(weights_NT)
        )
        return jnp.sum(weights_NT * self.LOSSES[rows]), normaliser

    def test_weights_by_hand(self):
        third, half, quarter = 1 / 3, 1 / 2, 1 / 4
        close(
            policy_gradient.token_weights(self.MASK, "grpo"),
            [[third, third, third, 0], [0, 1, 0, 0], [half, half, 0, 0], [0, 0, 0, 0]],
        )
        close(
            policy_gradient.token_weights(self.MASK, "dr_grpo", 4),
            [[quarter, quarter, quarter, 0], [0, quarter, 0, 0], [quarter, quarter, 0, 0], [0, 0, 0, 0]],
        )
        close(policy_gradient.token_weights(self.MASK, "dapo"), self.MASK.astype(np.float32))

    @pytest.mark.parametrize(
        ("aggregation", "expected"),
        [
            ("grpo", (9 / 3 + 5 / 1 + 2 / 2) / 3),  # mean of the completions' means
            ("dr_grpo", (9 + 5 + 2) / 4 / 3),  # sums divided by max_tokens, mean over completions
            ("dapo", (9 + 5 + 2) / 6),  # mean over all tokens
        ],
    )
    def test_loss_by_hand(self, aggregation, expected):
        total, normaliser = self.aggregate(aggregation)
        close(total / normaliser, expected)

    @pytest.mark.parametrize("aggregation", ["grpo", "dr_grpo", "dapo"])
    def test_microbatches_add_up_to_the_batch(self, aggregation):
        parts = [self.aggregate(aggregation, rows) for rows in (slice(0, 1), slice(1, 4))]
        for whole, pair in zip(self.aggregate(aggregation), zip(*parts, strict=True), strict=True):
            close(sum(pair), whole)

    @pytest.mark.parametrize(("aggregation", "max_tokens"), [("dr_grpo", None), ("dr_grpo", 0), ("mean", 4)])
    def test_refuses_an_unknown_aggregation_and_a_missing_length(self, aggregation, max_tokens):
        with pytest.raises(ValueError, match=aggregation):
            policy_gradient.token_weights(self.MASK, aggregation, max_tokens)


class TestDPOLoss:
    def test_is_log_2_where_the_policy_is_the_reference(self):
        losses, margins = preference.dpo_loss(normal(4), normal(4, seed=1), normal(4), normal(4, seed=1), 0.1, 0.2)
        close(losses, [math.log(2)] * 4)
        close(margins, [0.0] * 4)

    def test_by_hand(self):
        # beta 0.5: log-ratios 2 and -1 make a margin of 1.5, and -3 and 1 one of -2.
        arrays = (jnp.array(x) for x in ([-3.0, -9], [-7.0, -4], [-5.0, -6], [-6.0, -5]))
        losses, margins = preference.dpo_loss(*arrays, 0.5)
        close(margins, [1.5, -2.0])
        close(losses, [-log_sigmoid(1.5), -log_sigmoid(-2)])

    def test_label_smoothing_flips_a_fraction_of_the_pairs(self):
        arrays = [jnp.array([x]) for x in (-3.0, -7.0, -5.0, -6.0)]
        close(preference.dpo_loss(*arrays, 0.5, 0.1)[0], [-0.9 * log_sigmoid(1.5) - 0.1 * log_sigmoid(-1.5)])
        flipped = [arrays[i] for i in (1, 0, 3, 2)]
        close(preference.dpo_loss(*arrays, 0.5, 0.3)[0], preference.dpo_loss(*flipped, 0.5, 0.7)[0])

    def test_gradient_by_hand(self):
        # d loss / d log pi(better) = -beta sigmoid(-margin), and the opposite for worse; margin 1.5, beta 0.5.
        arrays = [jnp.array([x]) for x in (-3.0, -7.0, -5.0, -6.0)]
        better, worse = jax.grad(lambda *a: preference.dpo_loss(*a, 0.5)[0][0], (0, 1))(*arrays)
        push = 0.5 / (1 + math.exp(1.5))
        close(better, [-push])
        close(worse, [push])


class TestRankingLoss:
    def test_of_one_pair_is_log_sigmoid(self):
        ranks = jnp.array([[1, 2], [1, 2]])
        losses, accuracies = preference.ranking_loss(jnp.array([[2.0, -1], [0, 0.5]]), ranks)
        close(losses, [-log_sigmoid(3), -log_sigmoid(-0.5)])
        close(accuracies, [1.0, 0.0])

    def test_is_the_mean_over_valid_pairs(self):
        scores = jnp.array([[1.0, 3, 0, 99], [1, 3, 0, 2], [1, 3, 0, 2], [1, 3, 0, 2]])
        ranks = jnp.array([[1, 2, 3, 0], [1, 0, 0, 2], [1, 0, 0, 0], [0, 0, 0, 0]])
        losses, accuracies = preference.ranking_loss(scores, ranks)
        # Differences of the pairs: 1 - 3, 1 - 0 and 3 - 0; 1 - 2; none; none.
        close(losses, [-(log_sigmoid(-2) + log_sigmoid(1) + log_sigmoid(3)) / 3, -log_sigmoid(-1), 0, 0])
        close(accuracies, [2 / 3, 0, 0, 0])

    def test_ties_form_no_pair(self):
        scores, ranks = jnp.array([[[1.0, 3, 0, 2]], [[1.0, 3, 0, 2]]]), jnp.array([[[1, 2, 2, 2]], [[1, 1, 2, 0]]])
        losses, accuracies = preference.ranking_loss(scores, ranks)
        close(losses[0], [-(log_sigmoid(-2) + log_sigmoid(1) + log_sigmoid(-1)) / 3])
        close(losses[1], [-(log_sigmoid(1) + log_sigmoid(3)) / 2])
        close(accuracies, [[1 / 3], [1]])

    def test_gradients_of_absent_completions_are_0(self):
        ranks = jnp.array([[1, 2, 0]])
        gradient = jax.grad(lambda s: preference.ranking_loss(s, ranks)[0][0])(jnp.array([[0.0, 0.0, 5.0]]))
        close(gradient, [[-0.5, 0.5, 0.0]])

    def test_equal_scores_count_as_misranked(self):
        assert preference.ranking_loss(jnp.zeros((1, 3)), jnp.array([[1, 2, 3]]))[1] == 0


class TestExplainedVariance:
    def test_by_hand(self):
        # Returns 1, 2, 3 (variance 2/3); residuals 0, 1, 1 (variance 2/9). The last has weight 0.
        returns, values = jnp.array([[1.0, 2], [3, 50]]), jnp.array([[1.0, 1], [2, -50]])
        close(policy_gradient.explained_variance(values, returns, jnp.array([[1, 1], [1, 0]])), 1 - (2 / 9) / (2 / 3))

    def test_is_1_for_the_returns_and_0_for_a_constant(self):
        close(policy_gradient.explained_variance(REWARDS, REWARDS, MASK), 1.0)
        close(policy_gradient.explained_variance(jnp.full_like(REWARDS, 3.0), REWARDS, MASK), 0.0)
        assert policy_gradient.explained_variance(-REWARDS, REWARDS, MASK) < 0

    def test_is_0_where_all_returns_are_equal_or_ignored(self):
        equal = jnp.full_like(REWARDS, 100.1)
        close(policy_gradient.explained_variance(REWARDS, equal, MASK), 0.0)
        close(policy_gradient.explained_variance(VALUES, REWARDS, jnp.zeros_like(REWARDS)), 0.0)


MASKED = {
    "penalised_rewards": lambda x, y, mask: policy_gradient.penalised_rewards(x[:, 0], x, y, mask, 0.1),
    "gae": lambda x, y, mask: policy_gradient.gae(x, y, mask, 0.9, 0.8),
    "whiten": lambda x, y, mask: policy_gradient.whiten(x, mask),
    "whiten, mean kept": lambda x, y, mask: policy_gradient.whiten(y, mask, shift_mean=False),
    "explained_variance": lambda x, y, mask: policy_gradient.explained_variance(y, x, mask),
    "grpo": lambda x, y, mask: policy_gradient.token_weights(mask, "grpo"),
    "dr_grpo": lambda x, y, mask: policy_gradient.token_weights(mask, "dr_grpo", 5),
    "dapo": lambda x, y, mask: policy_gradient.token_weights(mask, "dapo"),
}
UNMASKED = {
    "kl_k1": lambda x, y, mask: policy_gradient.kl_k1(x, y),
    "kl_k3": lambda x, y, mask: policy_gradient.kl_k3(x, y),
    "entropy": lambda x, y, mask: policy_gradient.entropy(x),
    "policy_loss": lambda x, y, mask: policy_gradient.policy_loss(x, y, y, 0.2),
    "value_loss": lambda x, y, mask: policy_gradient.value_loss(x, y, y, 0.2),
    "group_advantages": lambda x, y, mask: policy_gradient.group_advantages(x),
    "dpo_loss": lambda x, y, mask: preference.dpo_loss(x, y, y, x, 0.1, 0.1),
    "ranking_loss": lambda x, y, mask: preference.ranking_loss(x, mask * np.arange(1, 7)[None]),
}


@pytest.mark.parametrize("name", MASKED)
class TestMasks:
    def test_contents_of_padding_change_nothing(self, name):
        clean = MASKED[name](REWARDS, VALUES, MASK)
        dirty = [np.where(MASK, x, np.nan) for x in (REWARDS, VALUES)]
        dirty[0][:, 0] = REWARDS[:, 0]  # penalised_rewards reads the scores from it
        jax.tree.map(np.testing.assert_array_equal, clean, MASKED[name](*dirty, MASK))

    def test_more_padding_changes_nothing(self, name):
        def wider(x):
            return jnp.pad(x, ((0, 0), (0, 3)), constant_values=0)

        clean, padded = MASKED[name](REWARDS, VALUES, MASK), MASKED[name](*map(wider, (REWARDS, VALUES, MASK)))
        jax.tree.map(lambda a, b: close(b, wider(a) if a.ndim else a), clean, padded)

    def test_masks_may_be_bool_or_numbers(self, name):
        clean, numbers = (MASKED[name](REWARDS, VALUES, mask) for mask in (MASK, MASK.astype(np.float32)))
        jax.tree.map(np.testing.assert_array_equal, clean, numbers)


@pytest.mark.parametrize("name", [*MASKED, *UNMASKED])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_jitted_and_in_float32(name, dtype):
    """For any input dtype: bfloat16 converts to float32 exactly, so only arithmetic in bfloat16 would differ."""
    function = (MASKED | UNMASKED)[name]
    arrays = [jnp.asarray(x, dtype) for x in (REWARDS, VALUES)]
    expected = function(*(x.astype(jnp.float32) for x in arrays), MASK)
    jax.tree.map(close, jax.jit(function)(*arrays, MASK), expected)
