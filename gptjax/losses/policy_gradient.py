"""Losses of PPO and GRPO, as pure functions of arrays.

All functions compute and return float32, whatever the input dtype, and work under `jax.jit`. pi is the policy that is
trained, pi_old the policy that sampled the tokens, pi_ref the frozen reference policy. All are the trainer's;
`truncated_importance_weights` corrects for the sampler, which computes pi_old by other programs.

Shapes: P prompts with G sampled completions each; N completions of T positions. A mask is bool, or 0 and 1: true at the
tokens that the policy sampled.
"""

from typing import Literal

import jax
import jax.numpy as jnp

Aggregation = Literal["grpo", "dr_grpo", "dapo"]


def kl_k1(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """The k1 estimator of KL(pi || pi_ref) for tokens sampled from pi (Schulman 2020).

        k1 = log pi - log pi_ref

    Unbiased, but the gradient of its mean does not estimate the gradient of the divergence: use it in rewards, not as a
    loss. http://joschu.net/blog/kl-approx.html

    Args:
      logprobs: log pi of the tokens, of any shape.
      reference: log pi_ref of the tokens, of the same shape.
    """
    return _float32(logprobs) - _float32(reference)


def kl_k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """The k3 estimator of KL(pi || pi_ref) for tokens sampled from pi (Schulman 2020; DeepSeekMath, equation 4).

        k3 = pi_ref / pi - 1 - log(pi_ref / pi)

    Unbiased, never negative, and of lower variance than k1. Arguments are those of `kl_k1`.
    """
    log_ratio = _float32(reference) - _float32(logprobs)
    return jnp.expm1(log_ratio) - log_ratio


def entropy(logits: jax.Array) -> jax.Array:
    """Entropy of the categorical distribution softmax(logits), in nats.

        H = -sum_v p(v) log p(v)

    Args:
      logits: (..., V); -inf is a probability of 0.

    Returns:
      Shape (...).
    """
    log_p = jax.nn.log_softmax(_float32(logits), axis=-1)
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)


def penalised_rewards(
    rewards_N: jax.Array, logprobs_NT: jax.Array, reference_NT: jax.Array, mask_NT: jax.Array, coefficient: float
) -> jax.Array:
    """Per-token rewards with a KL penalty (Ouyang et al. 2022, equation 2).

        r_t = [t is the last token] score - coefficient (log pi_old(a_t) - log pi_ref(a_t))

    Args:
      rewards_N: score of each completion.
      logprobs_NT: log pi_old of the tokens.
      reference_NT: log pi_ref of the tokens.
      mask_NT: the completion's tokens. A completion without tokens loses its score.
      coefficient: beta, the KL penalty coefficient.

    Returns:
      (N, T), 0 outside the mask.
    """
    mask_NT = mask_NT.astype(bool)
    remaining_NT = jnp.cumsum(mask_NT[:, ::-1], axis=1)[:, ::-1]  # tokens from this one to the end, inclusive
    last_NT = mask_NT & (remaining_NT == 1)
    penalties_NT = coefficient * kl_k1(logprobs_NT, reference_NT)
    return jnp.where(mask_NT, jnp.where(last_NT, _float32(rewards_N)[:, None], 0.0) - penalties_NT, 0.0)


def gae(
    rewards_NT: jax.Array, values_NT: jax.Array, mask_NT: jax.Array, discount: float, gae_lambda: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimation (Schulman et al. 2016, equations 11 to 16).

        delta_t  = r_t + discount V_{t+1} - V_t            temporal-difference error
        A_t      = delta_t + discount gae_lambda A_{t+1}   advantage
        return_t = A_t + V_t                               target of the value function

    V and A are 0 after the last token. With gae_lambda 1, return_t is the discounted sum of future rewards and A_t that
    sum minus V_t; with gae_lambda 0, A_t is delta_t.

    Args:
      rewards_NT: reward of each token.
      values_NT: V_t, the value estimate before token t is sampled.
      mask_NT: the completion's tokens, which are contiguous: a gap ends a completion, and another may follow.
      discount: gamma, in [0, 1].
      gae_lambda: lambda, in [0, 1].

    Returns:
      Advantages and returns, (N, T) each, 0 outside the mask.
    """

    def step(
        following: tuple[jax.Array, jax.Array], now: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        next_advantage_N, next_value_N = following
        reward_N, value_N, mask_N = now
        delta_N = reward_N + discount * next_value_N - value_N
        advantage_N = jnp.where(mask_N, delta_N + discount * gae_lambda * next_advantage_N, 0.0)
        return (advantage_N, jnp.where(mask_N, value_N, 0.0)), advantage_N

    rewards_NT, values_NT, mask_NT = _float32(rewards_NT), _float32(values_NT), mask_NT.astype(bool)
    zeros_N = jnp.zeros(len(mask_NT), jnp.float32)
    by_time = rewards_NT.T, values_NT.T, mask_NT.T
    _, advantages_TN = jax.lax.scan(step, (zeros_N, zeros_N), by_time, reverse=True)
    advantages_NT = advantages_TN.T
    return advantages_NT, jnp.where(mask_NT, advantages_NT + values_NT, 0.0)


def whiten(x_NT: jax.Array, mask_NT: jax.Array, *, shift_mean: bool = True) -> jax.Array:
    """Normalises the values in the mask to unit variance and, with `shift_mean`, zero mean.

        (x - mean) / standard deviation [+ mean without shift_mean]

    Mean and sample variance (denominator n - 1) are over all tokens of the mask.

    Returns:
      (N, T), 0 outside the mask.
    """
    mask_NT = mask_NT.astype(bool)
    x_NT = jnp.where(mask_NT, _float32(x_NT), 0.0)
    count = jnp.sum(mask_NT)
    mean = jnp.sum(x_NT) / jnp.maximum(count, 1)
    variance = jnp.sum(jnp.where(mask_NT, (x_NT - mean) ** 2, 0.0)) / jnp.maximum(count - 1, 1)
    whitened_NT = (x_NT - mean) * jax.lax.rsqrt(variance + 1e-8)
    return jnp.where(mask_NT, whitened_NT if shift_mean else whitened_NT + mean, 0.0)


def policy_loss(
    logprobs: jax.Array, old_logprobs: jax.Array, advantages: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped surrogate objective, negated, for each token (Schulman et al. 2017, equation 7).

        ratio = pi(a) / pi_old(a)
        loss  = -min(ratio A, clip(ratio, 1 - epsilon, 1 + epsilon) A)

    The gradient is 0 where a positive advantage has raised the ratio above 1 + epsilon or a negative one has lowered it
    below 1 - epsilon. At ratio 1 it is the policy gradient, -A grad log pi.

    Args:
      logprobs: log pi of the tokens, of any shape; the only differentiated argument.
      old_logprobs: log pi_old of the tokens.
      advantages: A of the tokens.
      clip: epsilon, the PPO clip range.

    Returns:
      The loss of each token, and 1.0 where clipping sets its gradient to 0, 0.0 elsewhere.
    """
    advantages = jax.lax.stop_gradient(_float32(advantages))
    ratio = jnp.exp(_float32(logprobs) - jax.lax.stop_gradient(_float32(old_logprobs)))
    unclipped = -ratio * advantages
    clipped = -jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    return jnp.maximum(unclipped, clipped), _float32(clipped > unclipped)


def truncated_importance_weights(old_logprobs: jax.Array, sampler_logprobs: jax.Array, cap: float) -> jax.Array:
    """Truncated importance weights between the trainer's and the sampler's probabilities of the same policy.

        weight = min(pi_old(a) / pi_sampler(a), cap)

    Tokens are drawn from pi_sampler, which differs from pi_old by the rounding of other programs, so they are slightly
    off-policy. The weights correct the expectation of the policy gradient; the cap bounds their variance at the price
    of a bias (Espeholt et al. 2018, IMPALA, section 4.1; Yao et al. 2025, "Your efficient RL framework secretly brings
    you off-policy RL training").

    Args:
      old_logprobs: log pi_old of the tokens by the trainer, of any shape.
      sampler_logprobs: log-probabilities of the tokens that the sampler drew them with, of the same shape.
      cap: the largest weight, at least 1.

    Returns:
      Weights of the same shape, in (0, cap].
    """
    return jnp.minimum(jnp.exp(_float32(old_logprobs) - _float32(sampler_logprobs)), cap)


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array]:
    """PPO's clipped squared error of the value function, for each token.

        loss = 1/2 max((V - return)^2, (clip(V, V_old - epsilon, V_old + epsilon) - return)^2)

    From OpenAI's implementation (baselines/ppo2); the PPO paper does not clip values.

    Args:
      values: V, of any shape; the only differentiated argument.
      old_values: V_old, the values that the advantages were computed from.
      returns: of `gae`.
      clip: epsilon, the value clip range.

    Returns:
      The loss of each token, and 1.0 where clipping sets its gradient to 0, 0.0 elsewhere.
    """
    values = _float32(values)
    old_values, returns = jax.lax.stop_gradient((_float32(old_values), _float32(returns)))
    unclipped = (values - returns) ** 2
    clipped = (jnp.clip(values, old_values - clip, old_values + clip) - returns) ** 2
    return jnp.maximum(unclipped, clipped) / 2, _float32(clipped > unclipped)


def group_advantages(rewards_PG: jax.Array, *, by_std: bool = True, eps: float = 1e-4) -> jax.Array:
    """Group-relative advantages of GRPO (DeepSeekMath, section 4.1.2).

        A_i = (r_i - mean(r)) / (std(r) + eps)     over the G completions of a prompt
        A_i =  r_i - mean(r)                       without by_std (Dr. GRPO: Liu et al. 2025, section 3.2)

    All tokens of a completion share its advantage. Where all rewards of a prompt are equal, its advantages are 0.

    Args:
      rewards_PG: rewards of G completions for each of P prompts.
      by_std: whether to divide by the sample standard deviation (denominator G - 1). The division gives larger weight
        to prompts whose completions nearly all succeed or nearly all fail.

    Returns:
      (P, G).
    """
    rewards_PG = _float32(rewards_PG)
    # Relative to the first, so that equal rewards equal their mean exactly: eps would divide a rounding error.
    rewards_PG -= rewards_PG[:, :1]
    centred_PG = rewards_PG - jnp.mean(rewards_PG, axis=1, keepdims=True)
    if not by_std:
        return centred_PG
    variance_P1 = jnp.sum(centred_PG**2, axis=1, keepdims=True) / max(rewards_PG.shape[1] - 1, 1)
    return centred_PG / (jnp.sqrt(variance_P1) + eps)


def token_weights(mask_NT: jax.Array, aggregation: Aggregation, max_tokens: int | None = None) -> jax.Array:
    """Weights that aggregate per-token losses over the N completions of a batch.

        loss = sum_{i,t} weight_{i,t} loss_{i,t} / normaliser

        grpo     weight = 1 / |o_i|        normaliser = N              (Shao et al. 2024, DeepSeekMath, equation 3)
        dr_grpo  weight = 1 / max_tokens   normaliser = N              (Liu et al. 2025, Dr. GRPO, section 3.2)
        dapo     weight = 1                normaliser = sum_i |o_i|    (Yu et al. 2025, DAPO, equation 8)

    |o_i| is the number of tokens of completion i. `grpo` is the mean over each completion's tokens, then over
    completions: tokens of long completions count less. `dr_grpo` divides by a constant instead, which removes that
    length bias; its advantages are those of `group_advantages(by_std=False)`. `dapo` is the mean over all tokens. For
    `grpo` and `dapo` the normaliser is the sum of the weights. Weighted losses and normalisers of a step's microbatches
    are added before the division, so it does not matter how a batch is cut.

    Args:
      mask_NT: the completions' tokens. A completion without tokens is not counted.
      max_tokens: the most tokens that a completion can have; read by "dr_grpo" only.

    Returns:
      (N, T), 0 outside the mask.

    Raises:
      ValueError: unknown aggregation, or "dr_grpo" without a positive max_tokens.
    """
    mask_NT = _float32(mask_NT.astype(bool))
    if aggregation == "grpo":
        return mask_NT / jnp.maximum(jnp.sum(mask_NT, axis=1, keepdims=True), 1)
    if aggregation == "dr_grpo":
        if max_tokens is None or max_tokens < 1:
            raise ValueError(f"aggregation dr_grpo needs a positive max_tokens, not {max_tokens}")
        return mask_NT / max_tokens
    if aggregation == "dapo":
        return mask_NT
    raise ValueError(f"unknown aggregation {aggregation!r}: grpo, dr_grpo or dapo")


def explained_variance(values: jax.Array, returns: jax.Array, weights: jax.Array) -> jax.Array:
    """Explained variance of the value function.

        1 - Var(return - V) / Var(return)

    1 for perfect values, 0 for constant values, negative for values worse than a constant.

    Args:
      values, returns, weights: of one shape; tokens of weight 0 are ignored.

    Returns:
      A scalar; 0 where all returns are equal.
    """
    values, returns, weights = _float32(values), _float32(returns), _float32(weights)
    counts = weights > 0
    total = jnp.maximum(jnp.sum(weights), 1e-8)

    def variance(x: jax.Array) -> jax.Array:
        x = jnp.where(counts, x, 0.0)
        return jnp.sum(weights * (x - jnp.sum(weights * x) / total) ** 2) / total

    # Compares the returns themselves: the computed variance of equal numbers can be a rounding error above 0.
    differ = jnp.max(returns, initial=-jnp.inf, where=counts) > jnp.min(returns, initial=jnp.inf, where=counts)
    unexplained = variance(returns - values) / jnp.where(differ, variance(returns), 1.0)
    return jnp.where(differ, 1 - unexplained, 0.0)


def _float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
