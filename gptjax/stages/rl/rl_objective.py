"""The objectives of stages "ppo" and "grpo": reinforcement learning on completions that the policy sampled.

A batch has the arrays of `gptjax/data/chat_batches.py`, an element being a prompt with the policy's completions of it,
and further arrays of the same shape (B, R, T) that the stage computed from them. `weights` is the weight of each token
in the loss, 0 outside the completions. The losses do not depend on how the completions are laid out in the rows.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config, require
from gptjax.losses import policy_gradient
from gptjax.losses.cross_entropy import entropies
from gptjax.models import peft
from gptjax.models.gpt import GPT, head_embedding
from gptjax.models.heads import VALUE
from gptjax.stages import policy
from gptjax.stages.definition import Definition
from gptjax.stages.policy import REFERENCE, element_hidden_states, logprobs_of_states, token_logprobs
from gptjax.stages.preference.reward_model import RewardModel
from gptjax.stages.pretrain import next_token_loss
from gptjax.training.objective import Batch, Loss, Measures


def ppo_loss(config: Config) -> Loss:
    """PPO's losses of policy and value function (Schulman et al. 2017); with pretraining text, PPO-ptx.

        loss = mean of policy_loss + mean of value_loss + ppo.pretraining_weight * cross entropy of the text

    The two functions are those of `gptjax/losses/policy_gradient.py`. Policy and value function share no weights, so
    their losses need no relative weight. The third term is that of Ouyang et al. 2022, equation 2. `advantages`,
    `old_logprobs`, `old_values` and `returns` are of the completions as they were sampled; `text_tokens`,
    `text_targets` and `text_weights` (B, rows, S) are the text.
    """
    gpt, value_model, rl, ppo = GPT(config.model), RewardModel(config), config.rl, config.ppo
    text_loss = next_token_loss(config)

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
            measures["text_loss"], *_ = text_loss(params, text, None)
            total += ppo.pretraining_weight * measures["text_loss"]
        return total, _weight(batch), measures

    return loss


def grpo_loss(config: Config) -> Loss:
    """GRPO's loss (Shao et al. 2024, equation 3): the clipped objective and the KL divergence from the reference.

        loss = mean of policy_loss + rl.kl_weight * kl_k3

    The mean is that of `policy_gradient.token_weights` for grpo.loss_type. Its divisor is the sum of `weights`; for
    "dr_grpo" it is the number of completions, those that rl.mask_truncated_completions excludes included.
    """
    gpt, rl = GPT(config.model), config.rl

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        policy_loss, measures = _policy_loss(gpt, params, batch, rl.clip, batch["reference_logprobs"])
        total, weight = policy_loss + rl.kl_weight * measures["reference_kl"], _weight(batch)
        if config.grpo.loss_type == "dr_grpo":
            # The metrics stay means over tokens: the step divides them by the number of completions.
            count = jnp.sum((batch["positions"] == 0) & (batch["segments"] > 0), dtype=jnp.float32)
            measures = {name: measure * count / weight for name, measure in measures.items()}
            weight = count
        return total, weight, measures | {"policy_loss": policy_loss}

    return loss


def _weight(batch: Batch) -> jax.Array:
    """Returns the sum of the weights; above 0 where no token counts, so that loss and gradient are 0 there."""
    return jnp.maximum(jnp.sum(batch["weights"]), 1e-8)


def _policy_loss(
    gpt: GPT, params: Any, batch: Batch, clip: float, reference_BRT: jax.Array | None = None
) -> tuple[jax.Array, Measures]:
    """Returns weighted sums over the tokens: the clipped objective, and its metrics, with a reference the KL too."""
    weights_BRT, old_BRT = batch["weights"], batch["old_logprobs"]
    logprobs_BRT = token_logprobs(gpt, params, batch, None)
    losses_BRT, clipped_BRT = policy_gradient.policy_loss(logprobs_BRT, old_BRT, batch["advantages"], clip)
    measures = {
        "ratio": jnp.sum(weights_BRT * jnp.exp(logprobs_BRT - old_BRT)),
        "clip_fraction": jnp.sum(weights_BRT * clipped_BRT),
        "policy_kl": jnp.sum(weights_BRT * policy_gradient.kl_k3(old_BRT, logprobs_BRT)),
    }
    if reference_BRT is not None:
        measures["reference_kl"] = jnp.sum(weights_BRT * policy_gradient.kl_k3(logprobs_BRT, reference_BRT))
    return jnp.sum(weights_BRT * losses_BRT), measures


def completion_measurer(config: Config) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """Returns (all parameters, batch) -> float32 (B, R, T) arrays of each token of completions just sampled.

    `old_logprobs`: log-probabilities under the policy; `reference_logprobs`: under the reference; `entropy`: of the
    policy's distribution at the token; `old_values`, where there is a value function: its estimates.
    """
    gpt, value_model = GPT(config.model), RewardModel(config)

    def measure(params: Any, batch: Batch) -> dict[str, jax.Array]:
        with peft.applied(config.peft, deterministic=True):
            x_BRTD = element_hidden_states(gpt, params, batch, None)
        logprobs_BRT = logprobs_of_states(gpt, params, batch, x_BRTD)
        rows_NTD = x_BRTD.reshape(-1, *x_BRTD.shape[2:])
        entropy_NT = entropies(rows_NTD, head_embedding(params), gpt.config.precision, gpt.config.logit_soft_cap)
        measured = {
            "old_logprobs": logprobs_BRT,
            "reference_logprobs": token_logprobs(gpt, params[REFERENCE], batch, None),
            "entropy": entropy_NT.reshape(logprobs_BRT.shape),
        }
        if VALUE in params:
            measured["old_values"] = value_model.values(params[VALUE], batch, None)
        return measured

    return measure


def _policy_parameters(config: Config) -> ParameterSpec:
    """The policy and its frozen reference, which reads each completion once, whatever the number of inner epochs."""
    return policy.policy_and_reference(config, reference_passes=1 / config.rl.inner_epochs)


def _ppo_parameters(config: Config) -> ParameterSpec:
    """The policy, its frozen reference, and a value function of its own weights.

    The head of the value function is initialised to zeros: unless it starts as the reward model, its first estimates
    are 0 and not random numbers, from which the first advantages would be computed.
    """
    spec = _policy_parameters(config)

    def init(rng: jax.Array) -> Any:
        value = RewardModel(config).init(jax.random.fold_in(rng, 1))
        value["head"] = jax.tree.map(jnp.zeros_like, value["head"])
        return spec.init(rng) | {VALUE: value}

    reward_model = config.rl.reward.partition(":")[2] if config.ppo.value_init == "reward" else None
    factors = {VALUE: config.ppo.value_lr / config.optimizer.peak_lr}
    return dataclasses.replace(spec, init=init, sources={VALUE: reward_model}, lr_factors=factors)


def _check_rl(config: Config) -> None:
    """Raises UserError when the config has settings that neither PPO nor GRPO supports."""
    policy.check_needs_init_from(config)
    rl, model = config.rl, config.model
    form, _, name = rl.reward.partition(":")
    require(
        rl.reward in ("bleu", "rouge") or (form in ("model", "python") and bool(name)),
        f"rl.reward={rl.reward!r} is no known reward: set it to model:WORKDIR, bleu, rouge or python:MODULE.FUNCTION",
    )
    require(
        rl.prompts_per_iteration % config.sequences_per_batch == 0,
        f"rl.prompts_per_iteration={rl.prompts_per_iteration} is not a multiple of the {config.sequences_per_batch} "
        "prompts of a batch (batch.tokens_per_batch / model.context_length): change one of them",
    )
    require(
        (1 if rl.prompt_tokens is None else rl.prompt_tokens) + rl.response_tokens <= model.context_length,
        f"rl.prompt_tokens={rl.prompt_tokens} and rl.response_tokens={rl.response_tokens} exceed "
        f"model.context_length={model.context_length}: lower them",
    )
    policy.check_computed_as_reference(config)
    require(
        rl.importance_sampling_cap is None or model.dtype != "float32" or model.expert_capacity is not None,
        f"rl.importance_sampling_cap={rl.importance_sampling_cap} has no effect with model.dtype=float32, in which "
        "sampler and trainer compute the same probabilities: unset it",
    )
    for name, default in (("on_corrupt", "error"), ("image_shift", 0.0)):
        require(
            getattr(config.data, name) == default,
            f"data.{name}={getattr(config.data, name)} is not supported by stage {config.stage}, whose completions are "
            f"sampled and trained on with the same images: set it to {default}",
        )
    require(
        config.stability.on_spike != "rewind",
        "stability.on_spike=rewind skips data, and a policy samples its own data: set it to log",
    )


def check_ppo(config: Config) -> None:
    """Raises UserError when the config has settings that PPO does not support."""
    _check_rl(config)
    ppo, reward = config.ppo, config.rl.reward
    require(
        ppo.value_init == "policy" or reward.startswith("model:"),
        f"ppo.value_init=reward needs a reward model, and rl.reward={reward} is not one: set ppo.value_init=policy",
    )
    require(
        (ppo.pretraining_weight > 0) == (config.chat.pretraining_source is not None),
        f"chat.pretraining_source={config.chat.pretraining_source} and ppo.pretraining_weight="
        f"{ppo.pretraining_weight}: set both for PPO-ptx, or neither",
    )
    require(
        config.peft.method in ("none", "lora", "adalora"),
        f"peft.method={config.peft.method} is not supported by stage ppo, whose value function is trained whole: set "
        "it to lora, adalora or none",
    )


def check_grpo(config: Config) -> None:
    """Raises UserError when the config has settings that GRPO does not support."""
    _check_rl(config)
    policy.check_no_pretraining_text(config)
    require(
        config.rl.responses_per_prompt > 1,
        f"rl.responses_per_prompt={config.rl.responses_per_prompt}: stage grpo compares the completions of a prompt "
        "with each other: set it to 2 or more",
    )


PPO = Definition(
    parameters=_ppo_parameters,
    loss=ppo_loss,
    complete=policy.complete,
    check=check_ppo,
    sections=("chat", "rl", "ppo"),
    conversational=True,
    chats=True,
)
GRPO = Definition(
    parameters=_policy_parameters,
    loss=grpo_loss,
    complete=policy.complete,
    check=check_grpo,
    sections=("chat", "rl", "grpo"),
    conversational=True,
    chats=True,
)
