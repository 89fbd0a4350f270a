"""The objective of stage "dpo": direct preference optimization, without a reward model (Rafailov et al. 2023).

A batch has the arrays of `gptjax/data/chat_batches.py`: an element is P prompts with K completions each, best first,
laid out in R rows of T positions.
"""

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import Config
from gptjax.losses import preference
from gptjax.models.gpt import GPT
from gptjax.stages import policy
from gptjax.stages.definition import Definition
from gptjax.stages.policy import REFERENCE, token_logprobs
from gptjax.stages.preference.reward_model import at_ends
from gptjax.training.objective import Batch, Loss, Measures


def completion_logprobs(gpt: GPT, params: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """Log-probability of each completion given its prompt, float32 (B, P, K); arbitrary where there is none."""
    learned_BRT = token_logprobs(gpt, params, batch, rng) * batch["weights"]
    learned_BN = learned_BRT.reshape(len(learned_BRT), -1)
    segments_BN = batch["segments"].reshape(len(learned_BRT), -1)
    numbers_BPK = at_ends(batch["segments"], batch["ends"])
    here_BPKN = segments_BN[:, None, None] == numbers_BPK[..., None]
    return jnp.sum(jnp.where(here_BPKN, learned_BN[:, None, None], 0), axis=-1)


def dpo_loss(config: Config) -> Loss:
    """Rafailov et al. 2023, equation 7, over all pairs of a prompt's completions.

    The loss measures `accuracy`, the share of a prompt's pairs whose implicit rewards are ranked correctly, and
    `margin`, the difference of the implicit rewards: beta times the difference of the log-ratios to the reference.
    """
    gpt, settings = GPT(config.model), config.dpo

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        policy_BPK = completion_logprobs(gpt, params, batch, rng)
        reference_BPK = jax.lax.stop_gradient(completion_logprobs(gpt, params[REFERENCE], batch, None))
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


def check(config: Config) -> None:
    """Raises UserError when the config asks for what DPO cannot do."""
    policy.check_needs_init_from(config)
    policy.check_no_pretraining_text(config)


DEFINITION = Definition(
    parameters=policy.policy_and_reference,
    loss=dpo_loss,
    complete=policy.complete,
    check=check,
    conversational=True,
    chats=True,
)
