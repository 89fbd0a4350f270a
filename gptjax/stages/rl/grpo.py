"""Stage "grpo": group relative policy optimization, without a value function (Shao et al. 2024, DeepSeekMath)."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data.tokenizers import Tokenizer
from gptjax.losses import policy_gradient
from gptjax.stages.rl.completions import Arrays, Completions
from gptjax.stages.rl.policy_stage import build_rl
from gptjax.training.objective import Objective
from gptjax.training.stage import Stage


def build(
    config: Config, mesh: Mesh, tokenizer: Tokenizer | None, make_objective: Callable[[Config], Objective]
) -> Stage:
    """Builds the stage on `mesh`; arguments and errors are those of `build_rl`."""
    return build_rl(config, mesh, tokenizer, make_objective, loss_arrays)


def loss_arrays(config: Config, completions: Completions) -> tuple[Arrays, dict[str, float]]:
    """Returns what the loss reads of each token: group-relative advantages, and weights that depend on grpo.loss_type.

    And the metric `informative_groups`: the share of groups whose completions differ in reward; the advantages of the
    other groups are 0.
    """
    mask_NT, group = completions.loss_mask_NT(config), config.rl.responses_per_prompt
    rewards_PG = completions.rewards_N.reshape(-1, group)
    advantages_PG = policy_gradient.group_advantages(jnp.asarray(rewards_PG), by_std=config.grpo.divide_by_std)
    advantages_N1 = np.asarray(advantages_PG).reshape(-1, 1)
    weights_NT = policy_gradient.token_weights(jnp.asarray(mask_NT), config.grpo.loss_type, config.rl.response_tokens)
    arrays = {
        "weights": np.asarray(weights_NT),
        "advantages": np.where(mask_NT, advantages_N1 * completions.importance_weights_NT(config), 0).astype(
            np.float32
        ),
        **{name: completions.arrays[name] for name in ("old_logprobs", "reference_logprobs")},
    }
    return arrays, {"informative_groups": float(np.mean(np.ptp(rewards_PG, axis=1) > 0))}
