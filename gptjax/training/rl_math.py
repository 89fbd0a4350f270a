"""The equations of learning from preferences, on plain arrays.

Shapes: B prompts, K answers to each, P pairs of them. All results are float32.
"""

import jax
import jax.numpy as jnp
import numpy as np


def ranking_loss(scores_BK: jax.Array, present_BK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How badly scores order answers that stand best first (Ouyang et al. 2022, equation 1).

        loss = -1 / (K choose 2)  sum over pairs i before j of  log sigmoid(score_i - score_j)

    Args:
      present_BK: bool; an answer that is not there is in no pair.

    Returns:
      losses_B in nats, and accuracies_B: the share of the pairs of which the better one has the higher score. Both are
      the mean over a prompt's pairs, 0 where it has none.
    """
    better, worse = np.triu_indices(scores_BK.shape[1], 1)
    margins_BP = scores_BK[:, better] - scores_BK[:, worse]
    there_BP = present_BK[:, better] & present_BK[:, worse]
    return mean_where(-jax.nn.log_sigmoid(margins_BP), there_BP), mean_where(margins_BP > 0, there_BP)


def dpo_loss(
    better_BP: jax.Array,
    worse_BP: jax.Array,
    reference_better_BP: jax.Array,
    reference_worse_BP: jax.Array,
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
      The losses in nats and the margins, (B, P) each.
    """
    margins_BP = beta * ((better_BP - reference_better_BP) - (worse_BP - reference_worse_BP))
    right_BP, wrong_BP = jax.nn.log_sigmoid(margins_BP), jax.nn.log_sigmoid(-margins_BP)
    return -(1 - label_smoothing) * right_BP - label_smoothing * wrong_BP, margins_BP


def mean_where(values_BP: jax.Array, there_BP: jax.Array) -> jax.Array:
    """The mean along the last axis of what is there, float32 (B,); 0 where nothing is."""
    count_B = jnp.sum(there_BP, axis=-1)
    return jnp.sum(jnp.where(there_BP, values_BP, 0), axis=-1, dtype=jnp.float32) / jnp.maximum(count_B, 1)
