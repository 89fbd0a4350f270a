"""Trains one tiny model on several meshes: `train_on_meshes.py OUT.json data=8 fsdp=4,data=2 ...`.

Writes {"one" or mesh: {"losses": [...], "share": of the feed-forward kernel that a device holds, "sample": text}}.
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
from gptjax.parallel.mesh import make_mesh
from gptjax.training.stages import pretrain
from gptjax.training.state import create_state, make_train_step, state_shardings


def config(directory: Path) -> c.Config:
    for i in range(60):
        (directory / f"{i:02}.txt").write_text(f"document {i} says: " + f"{i} and {i + 1} are neighbours. " * 9)
    return c.Config(
        model=c.GPTConfig(
            vocab_size=264,  # the byte tokenizer's 257, rounded up to divide over the tensor axis
            context_length=32,
            num_layers=2,
            num_heads=4,
            embed_dim=32,
            attention_pattern=("dense", "banded"),
            band_width=8,
            residual_dropout=0.1,  # the random bits do not depend on the mesh either
            dtype="float32",
        ),
        data=c.DataConfig(
            source=f"text:{directory}/*.txt", tokenizer="bytes", packing="segment", cache_dir=str(directory / "cache")
        ),
        batch=c.BatchConfig(total_tokens=10_000, tokens_per_batch=2 * 8 * 32, microbatch_size=8),
        optimizer=c.OptimizerConfig(peak_lr=1e-2, schedule="constant"),
        evaluation=c.EvaluationConfig(sample_tokens=4, sample_temperature=0.0),
    )


def train(config: c.Config, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    """Losses of 6 steps and the held-out loss."""
    stage = pretrain.build(config, mesh, None)
    config = stage.config
    state = create_state(config, stage.init_params, mesh)
    step = make_train_step(config, stage.loss, mesh, state_shardings(config, stage.init_params, mesh))
    batches, losses = stage.batches(0), []
    with jax.set_mesh(mesh):
        for _ in range(6):
            rows = [next(batches), next(batches)]
            batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
            state, metrics = step(state, batch, np.int32(2), np.float32(1e-2))
            losses.append(float(metrics["loss"]))
        losses.append(stage.evaluate(state.params)["loss"])
        assert stage.sample is not None
        sample = stage.sample(state.params)
    up = state.params["layers"]["block_0"]["mlp"]["up"]["kernel"]
    return {"losses": losses, "share": up.addressable_shards[0].data.size / up.size, "sample": sample}


def main() -> None:
    out, *meshes = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        base = config(Path(directory))
        results = {"one": train(base, make_mesh(c.MeshConfig(), jax.devices()[:1]))}
        for name in meshes:
            axes = {"data": 1} | {axis: int(size) for axis, size in (part.split("=") for part in name.split(","))}
            run = dataclasses.replace(base, mesh=c.MeshConfig(**axes))
            results[name] = train(run, make_mesh(run.mesh))
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
