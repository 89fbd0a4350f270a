"""Fine-tunes a tiny model on several meshes: `finetune_on_meshes.py OUT.json one+lora fsdp=2,tensor=2+lora ...`.

Each is a mesh and a method. Writes {mesh+method: {"losses": [...], "validation": {...}, "share": of the largest kernel
that a device holds}}.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.state import state_shardings
from gptjax.models import peft
from gptjax.optim.optimizers import schedule
from gptjax.parallel.mesh import batch_sharding, make_mesh
from gptjax.stages.builders import build
from gptjax.stages.start import start_state
from gptjax.training.step import make_train_step
from tests.tiny_tasks import MODEL, run_config, save_pretrained, with_method

STEPS = 6


def train(config: c.Config, mesh: jax.sharding.Mesh, workdir: Path) -> dict[str, Any]:
    """Six steps of the stage of `config`, and what its evaluation says after them."""
    stage = build(config, mesh, None)
    config, parameters, losses = stage.config, stage.objective.parameters, []
    with jax.set_mesh(mesh), Checkpoints(workdir, config.checkpoint) as checkpoints:
        state, _ = start_state(parameters, mesh, checkpoints)
        matrices = peft.count_matrices(state.params)
        step, batches, tokens = (
            make_train_step(stage.objective, state_shardings(parameters, mesh)),
            stage.batches(0, None),
            0,
        )
        for number in range(1, STEPS + 1):
            microbatch = next(batches)
            tokens += microbatch.num_tokens
            batch = {
                name: jax.device_put(array[None], batch_sharding(mesh, None, rank=array.ndim))
                for name, array in microbatch.arrays.items()
            }
            values = schedule(config, number, tokens, stage.total_tokens, matrices)
            state, metrics = step(state, batch, np.int32(1), values)
            losses.append(float(metrics["loss"]))
        params = parameters.join(state.base, state.params)
        validation = stage.evaluate(params)
    kernel = params["layers"]["block_0"]["mlp"]["up"]["kernel"]
    share = kernel.addressable_shards[0].data.size / kernel.size
    return {"losses": losses, "validation": validation, "share": share}


def main() -> None:
    out, *names = sys.argv[1:]
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        # The byte tokenizer's 257, and 4 special tokens more, rounded up to divide over the tensor axis.
        settings = dataclasses.replace(MODEL, vocab_size=258)
        pretrained = save_pretrained(Path(directory) / "pretrained", settings=settings)
        config = run_config(Path(directory), "similarity", pretrained)
        config = c.replace(config, {"batch": {"epochs": STEPS / 2}, "model": {"vocab_size": 262}})
        for name in names:
            axes, method = name.split("+")
            run = with_method(config, method)
            if axes != "one":
                sizes = {"data": 1} | {axis: int(size) for axis, size in (part.split("=") for part in axes.split(","))}
                run = c.replace(run, {"mesh": sizes})
            mesh = make_mesh(run.mesh, jax.devices()[: 1 if axes == "one" else 4])
            results[name] = train(run, mesh, Path(directory) / name)
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
