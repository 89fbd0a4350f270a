"""Stage "reward": a model of which answers people prefer, InstructGPT's second step (Ouyang et al. 2022, 3.5)."""

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
from gptjax.parallel import preemption
from gptjax.parallel.rows import global_array, process_rows
from gptjax.training.loop import Stage
from gptjax.training.preferences import RewardModel, present
from gptjax.training.stages.ranked import build_ranked

SCALE_FILE = "reward.json"  # of a workdir of this stage: what is subtracted from its scores


def build(config: Config, mesh: Mesh, tokenizer: Tokenizer | None) -> Stage:
    """The stage on `mesh`; arguments and errors as of `build_ranked`."""
    return build_ranked(config, mesh, tokenizer, _conclude)


def _conclude(config: Config, read: Callable[[], Iterator[Microbatch]], mesh: Mesh) -> Callable[[Any, Path], str]:
    """Measures the mean score of the best answers, so that what reads the rewards can make it 0."""
    model, size = RewardModel(config), config.sequences_per_microbatch

    @jax.jit
    def sums_of(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        with peft.applied(config.peft, deterministic=True):
            scores_B, there_B = model.scores(params, batch)[:, 0], present(batch)[:, 0]
        return jnp.sum(jnp.where(there_B, scores_B, 0)), jnp.sum(there_B)

    def conclude(params: Any, workdir: Path) -> str:
        rows, total, count = process_rows(mesh, size), 0.0, 0
        for local in read():
            preemption.check()
            batch = {name: global_array(mesh, rows, array, size) for name, array in local.arrays.items()}
            of_batch = jax.device_get(sums_of(params, batch))
            total, count = total + float(of_batch[0]), count + int(of_batch[1])
        mean = total / count
        if jax.process_index() == 0:
            try:
                write_whole(workdir / SCALE_FILE, json.dumps({"mean": mean}) + "\n")
            except OSError as error:
                raise UserError(f"cannot write in --workdir={workdir}: {error.strerror}") from None
        return f"the best answers score {mean:.3f} on average, which is taken from all rewards: {workdir / SCALE_FILE}"

    return conclude
