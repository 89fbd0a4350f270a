"""Reinforcement learning of a policy from rewards: the equations of PPO and GRPO, as pure functions of arrays.

Everything is computed and returned in float32, whatever the input dtype, and works under `jax.jit`. pi is the policy
being trained, pi_old the policy that sampled the tokens, pi_ref the reference policy of the KL penalty.

Shapes: B prompts, G completions sampled for each; N rows of T positions. A mask is bool, or 0 and 1: true at the tokens
that the policy sampled.
"""

import jax
import jax.numpy as jnp


def kl_k1(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """log pi - log pi_ref of each token drawn from pi: on average KL(pi || pi_ref) (Schulman 2020, k1).

    http://joschu.net/blog/kl-approx.html. Its gradient does not estimate the divergence's: it belongs into rewards.
    """
    return _float32(logprobs) - _float32(reference)


def kl_k3(logprobs: jax.Array, reference: jax.Array) -> jax.Array:
    """pi_ref / pi - 1 - log(pi_ref / pi) of each token drawn from pi (Schulman 2020, k3; DeepSeekMath, equation 4).

    On average KL(pi || pi_ref) too, but never negative, and of less variance.
    """
    log_ratio = _float32(reference) - _float32(logprobs)
    return jnp.expm1(log_ratio) - log_ratio


def entropy(logits: jax.Array) -> jax.Array:
    """-sum_v p(v) log p(v) in nats, of logits (..., V); a logit of -inf is an entry that is never drawn."""
    log_p = jax.nn.log_softmax(_float32(logits), axis=-1)
    p = jnp.exp(log_p)
    return -jnp.sum(p * jnp.where(p > 0, log_p, 0.0), axis=-1)


def penalised_rewards(
    rewards_N: jax.Array, logprobs_NT: jax.Array, reference_NT: jax.Array, mask_NT: jax.Array, coefficient: float
) -> jax.Array:
    """The reward of each token, (N, T): a penalty at every one, the score at the last (Ouyang et al. 2022, equation 2).

        r_t = -coefficient (log pi(a_t) - log pi_ref(a_t)) + [t is the last token] score

    Args:
      rewards_N: the score of each whole response.
      logprobs_NT: log pi_old of the tokens, as they were drawn.
      reference_NT: log pi_ref of the tokens.
      mask_NT: the response's tokens; rewards are 0 elsewhere. A row without any loses its score.
      coefficient: beta, of the penalty.
    """
    mask_NT = mask_NT.astype(bool)
    still_to_come_NT = jnp.cumsum(mask_NT[:, ::-1], axis=1)[:, ::-1]  # tokens from here to the end, this one too
    last_NT = mask_NT & (still_to_come_NT == 1)
    penalties_NT = coefficient * kl_k1(logprobs_NT, reference_NT)
    return jnp.where(mask_NT, jnp.where(last_NT, _float32(rewards_N)[:, None], 0.0) - penalties_NT, 0.0)


def gae(
    rewards_NT: jax.Array, values_NT: jax.Array, mask_NT: jax.Array, discount: float, gae_lambda: float
) -> tuple[jax.Array, jax.Array]:
    """Generalised advantage estimates (Schulman et al. 2016, equations 11 to 16), and what they say of the returns.

        delta_t  = r_t + discount V_{t+1} - V_t            the surprise at t: temporal-difference error
        A_t      = delta_t + discount gae_lambda A_{t+1}
        return_t = A_t + V_t                               what the value function should have said

    Beyond the last token both V and A are 0. With gae_lambda 1, return_t is the discounted sum of the rewards to come,
    and A_t what V_t fell short of it; with gae_lambda 0, A_t is delta_t.

    Args:
      rewards_NT: of each token.
      values_NT: V_t, what was expected before token t was drawn.
      mask_NT: the tokens of a response, which lie side by side; a gap ends it.

    Returns:
      Advantages and returns (N, T), 0 outside the mask.
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
    nothing_N = jnp.zeros(len(mask_NT), jnp.float32)
    by_time = rewards_NT.T, values_NT.T, mask_NT.T
    _, advantages_TN = jax.lax.scan(step, (nothing_N, nothing_N), by_time, reverse=True)
    advantages_NT = advantages_TN.T
    return advantages_NT, jnp.where(mask_NT, advantages_NT + values_NT, 0.0)


def whiten(x_NT: jax.Array, mask_NT: jax.Array, *, shift_mean: bool = True) -> jax.Array:
    """(x - mean) / standard deviation over all tokens of the mask, 0 elsewhere.

    The variance is the sample's, of n - 1 in the denominator.

    Args:
      shift_mean: whether the mean becomes 0; else it stays what it was.
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
    """PPO's clipped objective, of each token, to be made small (Schulman et al. 2017, equation 7).

        ratio = pi(a) / pi_old(a)
        loss  = -min(ratio A, clip(ratio, 1 - clip, 1 + clip) A)

    An action better than expected (A > 0) is made likelier until ratio reaches 1 + clip; a worse one less likely until
    it is 1 - clip. There the gradient ends. It does not where the ratio is on the wrong side: a mistake is mended from
    any distance. At ratio 1 the gradient is the policy gradient, -A grad log pi.

    Args:
      logprobs: log pi of the tokens, of any shape; what alone is differentiated.
      old_logprobs: log pi_old of the same tokens.
      advantages: of the same tokens.
      clip: epsilon, how far the ratio may gain.

    Returns:
      Loss of each token, and 1.0 where clipping has cut it off from its gradient, 0.0 elsewhere.
    """
    advantages = jax.lax.stop_gradient(_float32(advantages))
    ratio = jnp.exp(_float32(logprobs) - jax.lax.stop_gradient(_float32(old_logprobs)))
    free = -ratio * advantages
    bounded = -jnp.clip(ratio, 1 - clip, 1 + clip) * advantages
    return jnp.maximum(free, bounded), _float32(bounded > free)


def value_loss(
    values: jax.Array, old_values: jax.Array, returns: jax.Array, clip: float
) -> tuple[jax.Array, jax.Array]:
    """Half the squared error of each value, which stops to pull when V is `clip` away from what it was, in PPO's way.

        loss = 1/2 max((V - return)^2, (clip(V, V_old - clip, V_old + clip) - return)^2)

    As OpenAI's PPO has it (baselines/ppo2; the paper has no such clip).

    Args:
      values: V, of any shape; what alone is differentiated.
      old_values: V_old, from which the advantages were computed.
      returns: of `gae`.

    Returns:
      Loss of each token, and 1.0 where clipping has cut it off from its gradient, 0.0 elsewhere.
    """
    values = _float32(values)
    old_values, returns = jax.lax.stop_gradient((_float32(old_values), _float32(returns)))
    free = (values - returns) ** 2
    bounded = (jnp.clip(values, old_values - clip, old_values + clip) - returns) ** 2
    return jnp.maximum(free, bounded) / 2, _float32(bounded > free)


def group_advantages(rewards_BG: jax.Array, *, by_std: bool = True, eps: float = 1e-4) -> jax.Array:
    """How much better each of G responses is than its group, those to the same prompt (DeepSeekMath, section 4.1.2).

        A_i = (r_i - mean(r)) / (std(r) + eps)

    Every token of a response has the response's advantage. Equal rewards teach nothing: their advantages are 0.

    Args:
      rewards_BG: scores of G responses to each of B prompts.
      by_std: whether to divide by the group's standard deviation (of n - 1). Without it, prompts that are nearly always
        or nearly never answered well do not weigh more than others (Liu et al. 2025, Dr. GRPO).
    """
    rewards_BG = _float32(rewards_BG)
    # Counted from the first, so that equal rewards are exactly their mean: what rounding left would be divided by eps.
    rewards_BG -= rewards_BG[:, :1]
    above_BG = rewards_BG - jnp.mean(rewards_BG, axis=1, keepdims=True)
    if not by_std:
        return above_BG
    variance_B1 = jnp.sum(above_BG**2, axis=1, keepdims=True) / max(rewards_BG.shape[1] - 1, 1)
    return above_BG / (jnp.sqrt(variance_B1) + eps)


def token_weights(mask_NT: jax.Array, aggregation: str, max_tokens: int) -> jax.Array:
    """Weights of the tokens of N completions in the loss of GRPO, by the name of the loss.

        grpo     w_t = 1 / length      the sum is divided by N: the mean over completions of the mean over their tokens
                                       (DeepSeekMath, equation 3)
        dr_grpo  w_t = 1 / max_tokens  the sum is divided by N: no completion's weight depends on its length (Liu et al.
                                       2025, section 3.1)
        dapo     w_t = 1               the sum is divided by the number of tokens: the mean over all tokens (Yu et al.
                                       2025, equation 12)

    For "grpo" and "dapo" the divisor is the sum of the weights.

    Args:
      mask_NT: the tokens of the completions that count.
      max_tokens: the longest that a completion can be.

    Returns:
      float32 (N, T), 0 outside the mask.

    Raises:
      ValueError: an unknown name.
    """
    weights_NT = _float32(mask_NT)
    if aggregation == "grpo":
        return weights_NT / jnp.maximum(jnp.sum(weights_NT, axis=1, keepdims=True), 1)
    if aggregation == "dr_grpo":
        return weights_NT / max_tokens
    if aggregation == "dapo":
        return weights_NT
    raise ValueError(f"no aggregation of this name: {aggregation}")


def explained_variance(values: jax.Array, returns: jax.Array, weights: jax.Array) -> jax.Array:
    """1 - Var(return - V) / Var(return): 1 where V knows, 0 where it is a constant, less where it misleads.

    Args:
      values, returns, weights: of one shape; weight 0 leaves a token out.

    Returns:
      A scalar; 0 where all returns are equal, so that there is nothing to explain.
    """
    values, returns, weights = _float32(values), _float32(returns), _float32(weights)
    counts = weights > 0
    total = jnp.maximum(jnp.sum(weights), 1e-8)

    def variance(x: jax.Array) -> jax.Array:
        x = jnp.where(counts, x, 0.0)
        return jnp.sum(weights * (x - jnp.sum(weights * x) / total) ** 2) / total

    # Not by a variance of 0: equal numbers can differ from their mean by its rounding.
    differ = jnp.max(returns, initial=-jnp.inf, where=counts) > jnp.min(returns, initial=jnp.inf, where=counts)
    unexplained = variance(returns - values) / jnp.where(differ, variance(returns), 1.0)
    return jnp.where(differ, 1 - unexplained, 0.0)


def _float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
