"""Learning from rewards of what a policy wrote: the losses of PPO and of GRPO, and what is measured of answers first.

A batch has the arrays of `gptjax/data/chat_batches.py`, an element being a prompt with the policy's answers to it, and
others of the same shape (B, R, T), which the stage has made of them. `weights` says how much a token counts, 0 outside
the answers. Nothing here depends on how the answers lie in the rows.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.checkpoint.state import Batch, Loss, Measures
from gptjax.config import Config
from gptjax.losses import policy_gradient
from gptjax.losses.cross_entropy import entropies
from gptjax.models import peft
from gptjax.models.gpt import GPT, head_embedding
from gptjax.models.heads import VALUE
from gptjax.stages.preference.objective import REFERENCE, RewardModel, logprobs_of_states, read_elements, token_logprobs


def ppo_loss(config: Config, loss_of_text: Loss) -> Loss:
    """PPO's losses of policy and value function (Schulman et al. 2017), and of text where there is some: PPO-ptx.

        loss = mean of policy_gradient.policy_loss + mean of policy_gradient.value_loss + ppo.pretraining_weight * nats a token of text

    The two functions share no weights, so it does not matter how the losses are weighted against each other. The third
    is that of Ouyang et al. 2022, equation 2. `advantages`, `old_logprobs`, `old_values` and `returns` are those of the
    answers as they were written; `text_tokens`, `text_targets` and `text_weights` (B, rows, S) the text.

    Args:
      loss_of_text: that of stage "pretrain".
    """
    gpt, value_model, rl, ppo = GPT(config.model), RewardModel(config), config.rl, config.ppo

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        policy_loss, measures = _policy_loss(gpt, params, batch, rl.clip)
        values_BRT = value_model.values(params[VALUE], batch, None)
        values = policy_gradient.value_loss(values_BRT, batch["old_values"], batch["returns"], ppo.value_clip)
        value_loss, measures["value_clip_fraction"] = (jnp.sum(batch["weights"] * of_token) for of_token in values)
        measures |= {"policy_loss": policy_loss, "value_loss": value_loss}
        total = policy_loss + value_loss
        if ppo.pretraining_weight > 0:
            names = ("tokens", "targets", "weights")
            text = {name: batch[f"text_{name}"].reshape(-1, batch[f"text_{name}"].shape[-1]) for name in names}
            measures["text_loss"], *_ = loss_of_text(params, text, None)
            total += ppo.pretraining_weight * measures["text_loss"]
        return total, jnp.sum(batch["weights"]), measures

    return loss


def grpo_loss(config: Config) -> Loss:
    """GRPO's loss (Shao et al. 2024, equation 3): the clipped objective, and the distance from the reference.

    loss = mean over answers of the mean over their tokens of policy_gradient.policy_loss + rl.kl_weight * policy_gradient.kl_k3
    """
    gpt, rl = GPT(config.model), config.rl

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        policy_loss, measures = _policy_loss(gpt, params, batch, rl.clip, batch["reference_logprobs"])
        distance = measures.pop("distance")
        measures |= {"policy_loss": policy_loss, "reference_kl": distance}
        return policy_loss + rl.kl_weight * distance, jnp.sum(batch["weights"]), measures

    return loss


def _policy_loss(
    gpt: GPT, params: Any, batch: Batch, clip: float, reference_BRT: jax.Array | None = None
) -> tuple[jax.Array, Measures]:
    """Sums over the tokens: of the clipped objective, and of what is measured, with a reference its `distance` too."""
    weights_BRT, old_BRT = batch["weights"], batch["old_logprobs"]
    logprobs_BRT = token_logprobs(gpt, params, batch, None)
    losses_BRT, clipped_BRT = policy_gradient.policy_loss(logprobs_BRT, old_BRT, batch["advantages"], clip)
    measures = {
        "clip_fraction": jnp.sum(weights_BRT * clipped_BRT),
        "policy_kl": jnp.sum(weights_BRT * policy_gradient.kl_k3(old_BRT, logprobs_BRT)),
    }
    if reference_BRT is not None:
        measures["distance"] = jnp.sum(weights_BRT * policy_gradient.kl_k3(logprobs_BRT, reference_BRT))
    return jnp.sum(weights_BRT * losses_BRT), measures


def answer_measurer(config: Config) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """(all parameters, batch) -> float32 (B, R, T) of each token of answers as they were written.

    `old_logprobs`: of the policy; `reference_logprobs`: of the model that it started from; `entropy`: of what the
    policy might have written instead; `old_values`, of stage ppo: what the value function expects.
    """
    gpt, value_model = GPT(config.model), RewardModel(config)

    def measure(params: Any, batch: Batch) -> dict[str, jax.Array]:
        with peft.applied(config.peft, deterministic=True):
            x_BRTD = read_elements(gpt, params, batch, None)
        logprobs_BRT = logprobs_of_states(gpt, params, batch, x_BRTD)
        rows_NTD = x_BRTD.reshape(-1, *x_BRTD.shape[2:])
        entropy_NT = entropies(rows_NTD, head_embedding(params), gpt.config.precision)
        measured = {
            "old_logprobs": logprobs_BRT,
            "reference_logprobs": token_logprobs(gpt, params[REFERENCE], batch, None),
            "entropy": entropy_NT.reshape(logprobs_BRT.shape),
        }
        if config.stage == "ppo":
            measured["old_values"] = value_model.values(params[VALUE], batch, None)
        return measured

    return measure
