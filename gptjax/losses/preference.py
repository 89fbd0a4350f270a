"""Losses on ranked completions: the pairwise loss of reward models, and DPO, as pure functions of arrays.

All functions compute and return float32, whatever the input dtype, and work under `jax.jit`.

Shapes: B prompts, G ranked completions of each, J pairs of those. B stands for any number of leading axes.
"""

import jax
import jax.numpy as jnp
import numpy as np


def ranked_pairs(ranks_BG: jax.Array) -> tuple[np.ndarray, np.ndarray, jax.Array]:
    """Returns all pairs of a prompt's ranked completions, and which of them have a strict order.

    Args:
      ranks_BG: int ranks, 1 the best, ascending along G; 0 marks an absent completion.

    Returns:
      better (J,) and worse (J,): indices along G of all J = G (G - 1) / 2 pairs. valid_BJ: bool, whether both
      completions are present and of different ranks; ties form no pair.
    """
    better, worse = np.triu_indices(ranks_BG.shape[-1], 1)
    return better, worse, (ranks_BG[..., better] > 0) & (ranks_BG[..., better] < ranks_BG[..., worse])


def ranking_loss(scores_BG: jax.Array, ranks_BG: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Pairwise ranking loss of a reward model (Bradley-Terry; Ouyang et al. 2022, equation 1).

        loss = -1 / J  sum over pairs (better, worse) of  log sigmoid(score_better - score_worse)

    J is the number of valid pairs of the prompt: (G choose 2) where no completion is absent or tied.

    Args:
      scores_BG: the reward model's scores.
      ranks_BG: as in `ranked_pairs`.

    Returns:
      losses_B in nats, and accuracies_B, the fraction of pairs whose better completion has the higher score. Both are
      means over a prompt's valid pairs, 0 for a prompt without any.
    """
    scores_BG = _float32(scores_BG)
    better, worse, valid_BJ = ranked_pairs(ranks_BG)
    margins_BJ = scores_BG[..., better] - scores_BG[..., worse]
    return mean_where(-jax.nn.log_sigmoid(margins_BJ), valid_BJ), mean_where(margins_BJ > 0, valid_BJ)


def dpo_loss(
    better_BJ: jax.Array,
    worse_BJ: jax.Array,
    reference_better_BJ: jax.Array,
    reference_worse_BJ: jax.Array,
    beta: float,
    label_smoothing: float = 0.0,
) -> tuple[jax.Array, jax.Array]:
    """Direct preference optimization (Rafailov et al. 2023, equation 7).

        margin = beta ((log pi(better) - log pi_ref(better)) - (log pi(worse) - log pi_ref(worse)))
        loss   = -(1 - e) log sigmoid(margin) - e log sigmoid(-margin)

    Args:
      better_BJ, worse_BJ: log pi of the whole completions of each pair.
      reference_better_BJ, reference_worse_BJ: their log pi_ref, of the frozen reference.
      beta: KL penalty coefficient.
      label_smoothing: e, the assumed fraction of pairs with flipped labels (conservative DPO: Mitchell 2023, "A note on
        DPO with noisy preferences").

    Returns:
      Losses in nats, and margins: the differences of the implicit rewards. (B, J) each.
    """
    log_ratio_better_BJ = _float32(better_BJ) - _float32(reference_better_BJ)
    log_ratio_worse_BJ = _float32(worse_BJ) - _float32(reference_worse_BJ)
    margins_BJ = beta * (log_ratio_better_BJ - log_ratio_worse_BJ)
    kept_BJ, flipped_BJ = jax.nn.log_sigmoid(margins_BJ), jax.nn.log_sigmoid(-margins_BJ)
    return -(1 - label_smoothing) * kept_BJ - label_smoothing * flipped_BJ, margins_BJ


def mean_where(values_BJ: jax.Array, valid_BJ: jax.Array) -> jax.Array:
    """Mean of the valid entries along the last axis, float32 (B,); 0 where none is valid."""
    count_B = jnp.sum(valid_BJ, axis=-1)
    return jnp.sum(jnp.where(valid_BJ, values_BJ, 0), axis=-1, dtype=jnp.float32) / jnp.maximum(count_B, 1)


def _float32(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.float32)
