"""Learning from which answer people prefer: the reward model's loss, and direct preference optimization.

A batch has the arrays of `gptjax/data/chat_batches.py`: an element is P prompts with K answers each, best first, laid
out in R rows of T positions, one row after the other or several answers in a row. Nothing here depends on which.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from gptjax.checkpoint.state import Batch, Loss, Measures
from gptjax.config import Config
from gptjax.losses import preference
from gptjax.losses.cross_entropy import target_logprobs
from gptjax.models.gpt import GPT, head_embedding, hidden_states
from gptjax.models.heads import Head, init_with_head

REFERENCE = "reference"  # the key of the parameters of the model that a policy started from
SCALE_FILE = "reward.json"  # of a workdir of stage "reward": the mean score of the best answers, and at which step


def read_elements(gpt: GPT, params: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """Final hidden states of all positions, (B, R, T, D).

    Args:
      rng: of dropout; None: there is none.
    """
    tokens_BRT = batch["tokens"]
    rows = (batch[name].reshape(-1, tokens_BRT.shape[-1]) for name in ("tokens", "segments", "positions"))
    rngs = None if rng is None else {"dropout": rng}
    x_NTD = hidden_states(gpt, params, *rows, deterministic=rng is None, rngs=rngs)
    return x_NTD.reshape(*tokens_BRT.shape, -1)


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A GPT that says how good an answer is, as one number read at its last token (Ouyang et al. 2022, section 3.5).

    The parameters are the GPT's, and the head's under "head".

    Args:
      config: complete.
    """

    config: Config

    @property
    def gpt(self) -> GPT:
        return GPT(self.config.model)

    @property
    def head(self) -> Head:
        return Head(self.config.model, outputs=1, dropout=0.0)

    def init(self, rng: jax.Array) -> Any:
        """All parameters, boxed."""
        return init_with_head(self.gpt, self.head, rng)

    def values(self, params: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
        """What the head says at every position, float32 (B, R, T)."""
        x_BRTD = read_elements(self.gpt, params, batch, rng)
        return cast(jax.Array, self.head.apply({"params": params["head"]}, x_BRTD, deterministic=True))[..., 0]

    def scores(self, params: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """Of the answers, float32 of the shape of `ends`; of those that are not there, any number."""
        return _at_ends(self.values(params, batch, rng), batch["ends"])

    def loss(self, params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        """Equation 1 of the paper, summed over the prompts; each counts once, however many pairs its answers make.

        Returns:
          The loss, the number of prompts, and `accuracy`: the share of a prompt's pairs that are the right way round.
        """
        levels_BPK = batch["levels"]
        losses_BP, accuracies_BP = preference.ranking_loss(self.scores(params, batch, rng), levels_BPK)
        # An element may have fewer prompts than others, or only fill up the batch.
        count = jnp.sum(jnp.any(levels_BPK > 0, axis=-1), dtype=jnp.float32)
        return jnp.sum(losses_BP), count, {"accuracy": jnp.sum(accuracies_BP)}


def _at_ends(of_positions: jax.Array, ends: jax.Array) -> jax.Array:
    """What of (B, R, T) stands at the last tokens of answers, in the shape of `ends`."""
    flat_BN, ends_BS = of_positions.reshape(len(ends), -1), ends.reshape(len(ends), -1)
    return jnp.take_along_axis(flat_BN, ends_BS, axis=1).reshape(ends.shape)


def token_logprobs(gpt: GPT, params: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """Log-probability of the target of each position, float32 (B, R, T)."""
    return logprobs_of_states(gpt, params, batch, read_elements(gpt, params, batch, rng))


def logprobs_of_states(gpt: GPT, params: Any, batch: Batch, x_BRTD: jax.Array) -> jax.Array:
    """As `token_logprobs`, of final hidden states."""
    rows_NTD, targets_NT = x_BRTD.reshape(-1, *x_BRTD.shape[2:]), batch["targets"].reshape(-1, x_BRTD.shape[2])
    logprobs_NT = target_logprobs(rows_NTD, head_embedding(params), targets_NT, gpt.config.precision)
    return logprobs_NT.reshape(x_BRTD.shape[:3])


def answer_logprobs(gpt: GPT, params: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """Log-probability of each answer given its prompt, float32 (B, P, K); of those that are not there, any number."""
    learned_BRT = token_logprobs(gpt, params, batch, rng) * batch["weights"]
    learned_BN = learned_BRT.reshape(len(learned_BRT), -1)
    segments_BN = batch["segments"].reshape(len(learned_BRT), -1)
    numbers_BPK = _at_ends(batch["segments"], batch["ends"])
    here_BPKN = segments_BN[:, None, None] == numbers_BPK[..., None]
    return jnp.sum(jnp.where(here_BPKN, learned_BN[:, None, None], 0), axis=-1)


def dpo_loss(config: Config) -> Loss:
    """Rafailov et al. 2023, equation 7, over all pairs of a prompt's answers.

    The loss measures `accuracy`, the share of a prompt's pairs whose implicit rewards are the right way round, and
    `margin`, how far they are apart: beta times the difference of the log-ratios to the reference.
    """
    gpt, settings = GPT(config.model), config.dpo

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        policy_BPK = answer_logprobs(gpt, params, batch, rng)
        reference_BPK = jax.lax.stop_gradient(answer_logprobs(gpt, params[REFERENCE], batch, None))
        better, worse, there_BPJ = preference.ranked_pairs(batch["levels"])
        losses_BPJ, margins_BPJ = preference.dpo_loss(
            policy_BPK[..., better],
            policy_BPK[..., worse],
            reference_BPK[..., better],
            reference_BPK[..., worse],
            settings.beta,
            settings.label_smoothing,
        )

        def total(values_BPJ: jax.Array) -> jax.Array:
            return jnp.sum(preference.mean_where(values_BPJ, there_BPJ))

        measures = {"accuracy": total(margins_BPJ > 0), "margin": total(margins_BPJ)}
        return total(losses_BPJ), jnp.sum(jnp.any(there_BPJ, axis=-1), dtype=jnp.float32), measures

    return loss
