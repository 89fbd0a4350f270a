"""Stage "reward": a reward model of human preferences, InstructGPT's second step (Ouyang et al. 2022, section 3.5)."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.config import Config, UserError
from gptjax.data.pipeline import Microbatch
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import write_whole
from gptjax.models import peft
from gptjax.stages.preference.ranked import build_ranked
from gptjax.stages.preference.reward_model import SCALE_FILE, RewardModel
from gptjax.training.held_out import held_out_means
from gptjax.training.objective import Batch, Measures, Objective
from gptjax.training.stage import Stage


def build(
    config: Config, mesh: Mesh, tokenizer: Tokenizer | None, make_objective: Callable[[Config], Objective]
) -> Stage:
    """The stage on `mesh`; arguments and errors are those of `build_ranked`."""
    return build_ranked(config, mesh, tokenizer, make_objective, _conclude)


def _conclude(config: Config, read: Callable[[], Iterator[Microbatch]], mesh: Mesh) -> Callable[[Any, int, Path], str]:
    """Measures the mean score of the best completions, which readers of the rewards subtract."""
    model = RewardModel(config)

    def best_scores(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        with peft.applied(config.peft, deterministic=True):
            scores_BP, valid_BP = model.scores(params, batch, rng)[..., 0], batch["ranks"][..., 0] > 0
        return jnp.sum(jnp.where(valid_BP, scores_BP, 0)), jnp.sum(valid_BP), {}

    measure = held_out_means(best_scores, read, config.sequences_per_microbatch, mesh)

    def conclude(params: Any, step: int, workdir: Path) -> str:
        mean = measure(params)["loss"]
        if jax.process_index() == 0:
            try:
                write_whole(workdir / SCALE_FILE, json.dumps({"mean": mean, "step": step}) + "\n")
            except OSError as error:
                raise UserError(f"cannot write in --workdir={workdir}: {error.strerror}") from None
        return f"mean score of the best completions {mean:.3f}, subtracted from all rewards: {workdir / SCALE_FILE}"

    return conclude
