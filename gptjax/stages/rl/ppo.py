"""Stage "ppo": proximal policy optimization, InstructGPT's third step (Ouyang et al. 2022, section 3.5, appendix C.4).

With ppo.pretraining_weight > 0 it is PPO-ptx, which adds the language-model loss on pretraining text.
"""

from collections.abc import Callable
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, UserError, read_config
from gptjax.data import tokenizers
from gptjax.data.conversations import Prompt
from gptjax.data.pipeline import ExampleArrays
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import expand
from gptjax.losses import policy_gradient
from gptjax.stages.chat_data import ChatData, pretraining_text
from gptjax.stages.rl.completions import Arrays, Completions
from gptjax.stages.rl.policy_stage import build_rl
from gptjax.training.objective import Objective
from gptjax.training.stage import Stage


def build(
    config: Config, mesh: Mesh, tokenizer: Tokenizer | None, make_objective: Callable[[Config], Objective]
) -> Stage:
    """Builds the stage on `mesh`.

    Arguments are those of `build_rl`.

    Raises:
      UserError: as in `build_rl`; or the value function starts from a reward model of another tokenizer or template.
    """
    if config.ppo.value_init == "reward":
        _check_same_tokens(config, expand(config.rl.reward.partition(":")[2]))
    return build_rl(config, mesh, tokenizer, make_objective, loss_arrays, _text)


def _check_same_tokens(config: Config, reward: Path) -> None:
    """Raises UserError unless a reward model has the tokenizer and the chat template of the policy of `config`."""
    assert config.init_from is not None
    policy = expand(config.init_from)
    given = read_config(reward)
    fields = ("template", "system_format", "user_format", "assistant_format")
    differ = [field for field in fields if getattr(given.chat, field) != getattr(config.chat, field)]
    fingerprints = [tokenizers.load(workdir / "tokenizer").fingerprint for workdir in (policy, reward)]
    if len(set(fingerprints)) > 1:
        differ.append("tokenizer")
    if given.model.reads_images != config.model.reads_images:
        differ.append("model.vision.encoder")
    if differ:
        raise UserError(
            f"rl.reward=model:{reward} has another {differ[0]} than the policy, so that the value function cannot "
            "start from it: set ppo.value_init=policy"
        )


def loss_arrays(config: Config, completions: Completions) -> tuple[Arrays, dict[str, float]]:
    """Returns what the loss reads of each token: advantages and returns of the rewards less the KL penalties.

    And the metrics `explained_variance`, of the returns by the value function, and `penalised_reward`, the mean over
    completions of the reward less the KL penalties, which PPO maximises.
    """
    ppo, sampled_NT = config.ppo, jnp.asarray(completions.mask_NT)
    mask_NT = jnp.asarray(completions.loss_mask_NT(config))
    rewards_N = jnp.asarray(completions.rewards_N, jnp.float32)
    measured = ("old_logprobs", "reference_logprobs", "old_values")
    logprobs_NT, reference_NT, values_NT = (jnp.asarray(completions.arrays[name]) for name in measured)
    rewards_NT = policy_gradient.penalised_rewards(
        rewards_N, logprobs_NT, reference_NT, sampled_NT, config.rl.kl_weight
    )
    penalised = float(np.asarray(rewards_NT).sum(axis=1).mean())
    if ppo.whiten_rewards:
        rewards_NT = policy_gradient.whiten(rewards_NT, mask_NT, shift_mean=False)
    advantages_NT, returns_NT = policy_gradient.gae(rewards_NT, values_NT, mask_NT, ppo.discount, ppo.gae_lambda)
    arrays = {
        "weights": mask_NT.astype(jnp.float32),
        "advantages": policy_gradient.whiten(advantages_NT, mask_NT) * completions.importance_weights_NT(config),
        "returns": returns_NT,
        "old_logprobs": logprobs_NT,
        "old_values": values_NT,
    }
    explained = policy_gradient.explained_variance(values_NT, returns_NT, arrays["weights"])
    metrics = {"explained_variance": float(explained), "penalised_reward": penalised}
    return {name: np.asarray(array) for name, array in arrays.items()}, metrics


def _text(data: ChatData[Prompt]) -> Callable[[int, int], ExampleArrays] | None:
    """Returns the pretraining text, `ppo.pretraining_rows` rows for each prompt; None: PPO without text."""
    count, examples = data.config.ppo.pretraining_rows, pretraining_text(data)
    if examples is None:
        return None

    def text(before: int, prompts: int) -> ExampleArrays:
        rows = [examples[i] for i in range(before * count, (before + prompts) * count)]
        names = ("tokens", "targets", "weights")
        arrays = {f"text_{n}": np.stack([row[n] for row in rows]).reshape(prompts, count, -1) for n in names}
        return arrays | {"text_weights": arrays["text_weights"] / arrays["text_weights"].sum(dtype=np.float64)}

    return text
