"""Stage "ppo": proximal policy optimization, InstructGPT's third step (Ouyang et al. 2022, section 3.5, appendix C.4).

With ppo.pretraining_weight it is PPO-ptx, which goes on learning to write text beside.
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
from gptjax.losses import policy_gradient
from gptjax.stages.chat_data import ChatData, pretraining_text
from gptjax.stages.rl.completions import Answers, Arrays
from gptjax.stages.rl.policy_stage import build_rl
from gptjax.training.objective import Objective
from gptjax.training.stage import Stage


def build(config: Config, mesh: Mesh, tokenizer: Tokenizer | None, define: Callable[[Config], Objective]) -> Stage:
    """The stage on `mesh`; arguments and errors as of `build_rl`; or the value function could not read the policy's
    tokens."""
    if config.ppo.value_init == "reward":
        _check_reads_the_same(config, Path(config.rl.reward.partition(":")[2]).expanduser())
    return build_rl(config, mesh, tokenizer, define, learn, _text)


def _check_reads_the_same(config: Config, reward: Path) -> None:
    """Raises UserError unless a reward model reads the tokens that the policy of `config` writes."""
    assert config.init_from is not None
    policy = Path(config.init_from).expanduser()
    given = read_config(reward)
    ways = ("template", "system_format", "user_format", "assistant_format")
    differ = [way for way in ways if getattr(given.chat, way) != getattr(config.chat, way)]
    fingerprints = [tokenizers.load(workdir / "tokenizer").fingerprint for workdir in (policy, reward)]
    if len(set(fingerprints)) > 1:
        differ.append("tokenizer")
    if differ:
        raise UserError(
            f"rl.reward=model:{reward} has another {differ[0]} than the policy, whose tokens a value function that "
            "starts from it would not know: set ppo.value_init=policy"
        )


def learn(config: Config, answers: Answers) -> tuple[Arrays, dict[str, float]]:
    """What the loss reads of each token: advantages and returns, of rewards less the penalty for leaving the reference.

    And `explained_variance`, how much of the returns the value function foresaw, and `penalised_reward`, the mean of an
    answer's reward and penalties together, which is what is made large.
    """
    ppo, mask_NT = config.ppo, jnp.asarray(answers.mask_NT)
    rewards_N = jnp.asarray(answers.rewards_N, jnp.float32)
    measured = ("old_logprobs", "reference_logprobs", "old_values")
    logprobs_NT, reference_NT, values_NT = (jnp.asarray(answers.arrays[name]) for name in measured)
    rewards_NT = policy_gradient.penalised_rewards(rewards_N, logprobs_NT, reference_NT, mask_NT, config.rl.kl_weight)
    penalised = float(np.asarray(rewards_NT).sum(axis=1).mean())
    if ppo.whiten_rewards:
        rewards_NT = policy_gradient.whiten(rewards_NT, mask_NT, shift_mean=False)
    advantages_NT, returns_NT = policy_gradient.gae(rewards_NT, values_NT, mask_NT, ppo.discount, ppo.gae_lambda)
    learned = {
        "weights": mask_NT.astype(jnp.float32),
        "advantages": policy_gradient.whiten(advantages_NT, mask_NT),
        "returns": returns_NT,
        "old_logprobs": logprobs_NT,
        "old_values": values_NT,
    }
    explained = policy_gradient.explained_variance(values_NT, returns_NT, learned["weights"])
    told = {"explained_variance": float(explained), "penalised_reward": penalised}
    return {name: np.asarray(array) for name, array in learned.items()}, told


def _text(data: ChatData[Prompt]) -> Callable[[int, int], ExampleArrays] | None:
    """`ppo.pretraining_rows` rows of text with each prompt; None: PPO without text."""
    count, examples = data.config.ppo.pretraining_rows, pretraining_text(data)
    if examples is None:
        return None

    def text(before: int, prompts: int) -> ExampleArrays:
        rows = [examples[i] for i in range(before * count, (before + prompts) * count)]
        names = ("tokens", "targets", "weights")
        arrays = {f"text_{n}": np.stack([row[n] for row in rows]).reshape(prompts, count, -1) for n in names}
        return arrays | {"text_weights": arrays["text_weights"] / arrays["text_weights"].sum(dtype=np.float64)}

    return text
