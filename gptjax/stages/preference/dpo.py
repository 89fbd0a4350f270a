"""Stage "dpo": direct preference optimization, without a reward model (Rafailov et al. 2023).

A batch has the arrays of `gptjax/data/chat_batches.py`: an element is P prompts with G completions each, best first,
laid out in R rows of T positions; X = R T.
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
    """Log-probability of each completion given its prompt, float32 (B, P, G); arbitrary where there is none."""
    logprobs_BRT = token_logprobs(gpt, params, batch, rng) * batch["weights"]
    logprobs_BX = logprobs_BRT.reshape(len(logprobs_BRT), -1)
    segments_BX = batch["segments"].reshape(len(logprobs_BRT), -1)
    numbers_BPG = at_ends(batch["segments"], batch["ends"])
    mask_BPGX = segments_BX[:, None, None] == numbers_BPG[..., None]
    return jnp.sum(jnp.where(mask_BPGX, logprobs_BX[:, None, None], 0), axis=-1)


def dpo_loss(config: Config) -> Loss:
    """The loss of Rafailov et al. 2023, equation 7: the mean over the pairs of a prompt's completions.

    It measures `accuracy`, the share of a prompt's pairs whose implicit rewards are ranked correctly, and
    `margin`, the difference of the implicit rewards: beta times the difference of the log-ratios to the reference.
    """
    gpt, settings = GPT(config.model), config.dpo

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        # Both get the dropout key, so that both are the same computation; `check` refuses dropout.
        policy_BPG = completion_logprobs(gpt, params, batch, rng)
        reference_BPG = jax.lax.stop_gradient(completion_logprobs(gpt, params[REFERENCE], batch, rng))
        better, worse, valid_BPJ = preference.ranked_pairs(batch["ranks"])
        losses_BPJ, margins_BPJ = preference.dpo_loss(
            policy_BPG[..., better],
            policy_BPG[..., worse],
            reference_BPG[..., better],
            reference_BPG[..., worse],
            settings.beta,
            settings.label_smoothing,
        )

        def total(values_BPJ: jax.Array) -> jax.Array:
            return jnp.sum(preference.mean_where(values_BPJ, valid_BPJ))

        measures = {"accuracy": total(margins_BPJ > 0), "margin": total(margins_BPJ)}
        return total(losses_BPJ), jnp.sum(jnp.any(valid_BPJ, axis=-1), dtype=jnp.float32), measures

    return loss


def check(config: Config) -> None:
    """Raises UserError when the config has settings that DPO does not support."""
    policy.check_needs_init_from(config)
    policy.check_no_pretraining_text(config)
    policy.check_computed_as_reference(config)


DEFINITION = Definition(
    parameters=policy.policy_and_reference,
    loss=dpo_loss,
    complete=policy.complete,
    check=check,
    sections=("chat", "dpo"),
    conversational=True,
    chats=True,
)
