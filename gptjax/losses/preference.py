"""Learning from rankings of completions: the losses of reward models and of DPO, as pure functions of arrays.

Everything is computed and returned in float32, whatever the input dtype, and works under `jax.jit`.

Shapes: B prompts, K ranked completions of each, J pairs of those.
"""

import jax
import jax.numpy as jnp
import numpy as np


def ranked_pairs(levels_BK: jax.Array) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """The pairs of ranked answers, which may have leading axes of any number.

    Args:
      levels_BK: int, 1 the best, rising along K; 0: there is no such answer.

    Returns:
      better (J,) and worse (J,), places in K of all pairs; and there_BJ: which of them say that the first is the better
      one. Answers of one level say nothing of each other.
    """
    better, worse = np.triu_indices(levels_BK.shape[-1], 1)
    return better, worse, (levels_BK[..., better] > 0) & (levels_BK[..., better] < levels_BK[..., worse])


def ranking_loss(scores_BK: jax.Array, levels_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How badly scores order answers that stand best first (Ouyang et al. 2022, equation 1).

        loss = -1 / (K choose 2)  sum over pairs i before j of  log sigmoid(score_i - score_j)

    Where answers are equally good, or not there, the mean is over the pairs that are left.

    Args:
      scores_BK: with leading axes of any number.
      levels_BK: of `ranked_pairs`.

    Returns:
      losses_B in nats, and accuracies_B: the share of the pairs of which the better one has the higher score. Both are
      the mean over a prompt's pairs, 0 where it has none.
    """
    scores_BK = _float32(scores_BK)
    better, worse, there_BJ = ranked_pairs(levels_BK)
    margins_BJ = scores_BK[..., better] - scores_BK[..., worse]
    return mean_where(-jax.nn.log_sigmoid(margins_BJ), there_BJ), mean_where(margins_BJ > 0, there_BJ)


def dpo_loss(
    better_BJ: jax.Array,
    worse_BJ: jax.Array,
    reference_better_BJ: jax.Array,
    reference_worse_BJ: jax.Array,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Direct preference optimization (Rafailov et al. 2023, equation 7), of log-probabilities of whole answers.

        margin = beta ((log pi(better) - log ref(better)) - (log pi(worse) - log ref(worse)))
        loss = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)

    Args:
      beta: how dear it is to leave the reference.
      label_smoothing: e, the share of pairs taken to be the wrong way round (Mitchell 2023, "A note on DPO with noisy
        preferences").

    Returns:
      The losses in nats and the margins, (B, J) each.
    """
    log_ratio_better_BJ = _float32(better_BJ) - _float32(reference_better_BJ)
    log_ratio_worse_BJ = _float32(worse_BJ) - _float32(reference_worse_BJ)
    margins_BJ = beta * (log_ratio_better_BJ - log_ratio_worse_BJ)
    right_BJ, wrong_BJ = jax.nn.log_sigmoid(margins_BJ), jax.nn.log_sigmoid(-margins_BJ)
    return -(1 - label_smoothing) * right_BJ - label_smoothing * wrong_BJ, margins_BJ


def mean_where(values_BJ: jax.Array, there_BJ: jax.Array) -> jax.Array:
    """The mean along the last axis of what is there, float32 (B,); 0 where nothing is."""
    count_B = jnp.sum(there_BJ, axis=-1)
    return jnp.sum(jnp.where(there_BJ, values_BJ, 0), axis=-1, dtype=jnp.float32) / jnp.maximum(count_B, 1)


def _float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
