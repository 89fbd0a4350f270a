"""Builds the `Stage` that the training loop runs, from a config, its data and a mesh."""

from collections.abc import Callable

from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data.conversations import Prompt
from gptjax.data.tokenizers import Tokenizer
from gptjax.stages import pretrain, registry, sft
from gptjax.stages.finetune import build as finetune
from gptjax.stages.preference import ranked, reward
from gptjax.stages.rl import grpo, policy_stage, ppo
from gptjax.training.objective import Objective
from gptjax.training.stage import Stage

BUILDERS: dict[str, Callable[[Config, Mesh, Tokenizer | None, Callable[[Config], Objective]], Stage]] = {
    "pretrain": pretrain.build,
    "finetune": finetune.build,
    "sft": sft.build,
    "reward": reward.build,
    "dpo": ranked.build_ranked,
    "ppo": ppo.build,
    "grpo": grpo.build,
}

# Stage -> the held-out prompts with reference completions that evaluation of dialogue uses.
HELD_OUT_PROMPTS: dict[str, Callable[[Config], list[Prompt]]] = {
    "sft": sft.held_out_prompts,
    "reward": ranked.held_out_prompts,
    "dpo": ranked.held_out_prompts,
    "ppo": policy_stage.held_out_prompts,
    "grpo": policy_stage.held_out_prompts,
}


def build(config: Config, mesh: Mesh, tokenizer: Tokenizer | None) -> Stage:
    """Builds the stage of a config on `mesh`.

    Args:
      tokenizer: of the run that resumes; None: the stage finds or trains its own.

    Raises:
      UserError: data that cannot be read, settings of other stages, sizes that do not divide over the mesh.
    """
    return BUILDERS[config.stage](config, mesh, tokenizer, registry.objective)
