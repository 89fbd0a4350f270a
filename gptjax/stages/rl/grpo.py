"""Stage "grpo": group relative policy optimization, which needs no value function (Shao et al. 2024, DeepSeekMath)."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data.tokenizers import Tokenizer
from gptjax.losses import policy_gradient
from gptjax.stages.rl.completions import Answers, Arrays
from gptjax.stages.rl.policy_stage import build_rl
from gptjax.training.objective import Objective
from gptjax.training.stage import Stage


def build(config: Config, mesh: Mesh, tokenizer: Tokenizer | None, define: Callable[[Config], Objective]) -> Stage:
    """The stage on `mesh`; arguments and errors as of `build_rl`."""
    return build_rl(config, mesh, tokenizer, define, learn)


def learn(config: Config, answers: Answers) -> tuple[Arrays, dict[str, float]]:
    """What the loss reads of each token: an answer's advantage over its group, and its tokens' share of the answer.

    And `informative_groups`: the share of the groups whose answers differ in reward, which alone teach something.
    """
    mask_NT, group = answers.mask_NT, config.rl.responses_per_prompt
    rewards_PG = answers.rewards_N.reshape(-1, group)
    advantages_PG = policy_gradient.group_advantages(jnp.asarray(rewards_PG), by_std=config.grpo.divide_by_std)
    advantages_N1 = np.asarray(advantages_PG).reshape(-1, 1)
    arrays = {
        "weights": (mask_NT / mask_NT.sum(axis=1, keepdims=True)).astype(np.float32),
        "advantages": np.where(mask_NT, advantages_N1, 0).astype(np.float32),
        **{name: answers.arrays[name] for name in ("old_logprobs", "reference_logprobs")},
    }
    return arrays, {"informative_groups": float(np.mean(np.ptp(rewards_PG, axis=1) > 0))}
