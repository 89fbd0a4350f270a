"""Trains one tiny model on several meshes: `train_on_meshes.py OUT.json data=8 fsdp=4,data=2 ...`.

Writes {"one" or mesh: {"losses": [...], "share": of the feed-forward kernel that a device holds, "sample": text,
"counts": how often a step does each kind of collective, "gathered": bytes of the largest array that devices gather,
"resumes": whether a checkpoint of the state gives it back, laid out alike; null where an earlier run had that layout}}.
A change may follow the mesh, as in `fsdp=8+offload`. Also {"objectives": {objective:
result of `on_both_meshes`}}.
"""

import json
import sys
import tempfile
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.position import Position
from gptjax.checkpoint.state import TrainState, abstract_state, create_state, state_shardings
from gptjax.parallel.mesh import batch_sharding, make_mesh
from gptjax.planning.program_text import collectives
from gptjax.stages import registry
from gptjax.stages.builders import build
from gptjax.training.step import loss_and_gradient, make_train_step

ROWS, LENGTH, WIDTH = 16, 32, 32  # of a microbatch: more numbers than any parameter has


def config(directory: Path) -> c.Config:
    for i in range(60):
        (directory / f"{i:02}.txt").write_text(f"document {i} says: " + f"{i} and {i + 1} are neighbours. " * 9)
    return c.Config(
        model=c.GPTConfig(
            vocab_size=264,  # the byte tokenizer's 257, rounded up to divide over the tensor axis
            context_length=LENGTH,
            num_layers=2,
            num_heads=4,
            embed_dim=WIDTH,
            attention_pattern=("dense", "banded"),
            band_width=8,
            dtype="float32",
        ),
        data=c.DataConfig(
            source=f"text:{directory}/*.txt", tokenizer="bytes", packing="segment", cache_dir=str(directory / "cache")
        ),
        batch=c.BatchConfig(total_tokens=10_000, tokens_per_batch=2 * ROWS * LENGTH, microbatch_size=ROWS),
        optimizer=c.OptimizerConfig(peak_lr=1e-2, schedule="constant"),
        evaluation=c.EvaluationConfig(sample_tokens=0, sample_temperature=0.0),
    )


CHANGES = {
    "dropout": {"model": {"residual_dropout": 0.1}},
    "offload": {"optimizer": {"offload": True}, "model": {"remat": "offload"}},  # moments and activations to the host
    "sample": {"evaluation": {"sample_tokens": 4}},
    "muon": {"optimizer": {"name": "muon"}},
    "adafactor": {"optimizer": {"name": "adafactor", "min_factored_dim": 8}},
}


def resumes(config: c.Config, mesh: jax.sharding.Mesh, state: TrainState, workdir: Path) -> bool:
    """Whether a checkpoint of `state` gives it back, laid out alike."""
    workdir.mkdir()
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        checkpoints.save(int(state.step), state, Position(), None)
    with Checkpoints(workdir, config.checkpoint) as checkpoints:
        restored, _ = checkpoints.restore(abstract_state(registry.parameters(config.completed(264)), mesh))
    equal = jax.tree.map(lambda a, b: a.sharding == b.sharding and np.array_equal(a, b), restored, state)
    return jax.tree.all(equal)


def layout_of(state: TrainState) -> str:
    """Describes what each device holds of each array."""

    def describe(x: jax.Array) -> tuple[Any, ...]:
        sharding = x.sharding
        return x.shape, str(x.dtype), sharding.shard_shape(x.shape), sharding.num_devices, sharding.memory_kind

    return repr(jax.tree.map(describe, state))


def train(config: c.Config, mesh: jax.sharding.Mesh, workdir: Path, checked: set[str]) -> dict[str, Any]:
    """Losses of 10 steps and the held-out loss.

    Args:
      checked: layouts of which a checkpoint was restored; that of this run is added.
    """
    stage = build(config, mesh, None)
    state = create_state(stage.objective.parameters, mesh)
    step = make_train_step(stage.objective, state_shardings(stage.objective.parameters, mesh))
    batches, losses = stage.batches(0, None), []

    def arguments() -> tuple[Any, ...]:
        rows = [next(batches).arrays, next(batches).arrays]
        batch = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
        return state, jax.device_put(batch, batch_sharding(mesh, None)), np.int32(2), {"lr": np.float32(1e-2)}

    with jax.set_mesh(mesh):
        compiled = step.lower(*arguments()).compile()
        batches = stage.batches(0, None)
        for _ in range(10):
            state, metrics = compiled(*arguments())
            losses.append(float(metrics["loss"]))
        losses.append(stage.evaluate(state.params)["loss"])
        sample = stage.sample(state.params) if stage.sample is not None else None
        layout = layout_of(state)
        resumed = None if layout in checked else resumes(config, mesh, state, workdir)
        checked.add(layout)
    up = state.params["layers"]["block_0"]["mlp"]["up"]["kernel"]
    found = collectives(compiled.as_text(), unknown_trip_count=2)
    counts: Counter[str] = Counter()
    for collective in found:
        counts[collective.kind] += collective.count
    return {
        "losses": losses,
        "share": up.addressable_shards[0].data.size / up.size,
        "sample": sample,
        "resumes": resumed,
        "counts": counts,
        "gathered": max((found.payload for found in found if found.kind == "all-gather"), default=0),
    }


def on_both_meshes(config: c.Config) -> dict[str, Any]:
    """{"losses": of a batch, in nats a target, on one device and on eight; "difference": the largest of a gradient;
    "gradient": the largest value of a gradient, of the parameter where that is smallest}.
    """
    one, eight = make_mesh(c.MeshConfig(), jax.devices()[:1]), make_mesh(c.MeshConfig(data=2, fsdp=2, tensor=2))
    stage = build(config, one, None)
    objective, batch = stage.objective, next(stage.batches(0, None)).arrays
    rng, key = np.random.default_rng(0), jax.random.key_data(jax.random.key(0))
    shapes = abstract_state(objective.parameters, one).params
    params = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(leaf.dtype), shapes)
    losses, gradients = [], []
    for mesh in (one, eight):
        placement = state_shardings(objective.parameters, mesh).params
        with jax.set_mesh(mesh):
            rows = jax.device_put(batch, batch_sharding(mesh))
            program = jax.jit(partial(loss_and_gradient, objective, None), out_shardings=(None, placement))
            (total, (weight, _)), gradient = program(jax.device_put(params, placement), rows, key)
        losses.append(float(total / weight))
        gradients.append(jax.tree.map(lambda g, w=weight: np.asarray(g / w), gradient))
    differences = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), *gradients)
    sizes = jax.tree.map(lambda g: float(np.abs(g).max()), gradients[0])
    return {
        "losses": losses,
        "difference": max(jax.tree.leaves(differences)),
        "gradient": min(jax.tree.leaves(sizes)),
    }


def main() -> None:
    out, *meshes = sys.argv[1:]
    with tempfile.TemporaryDirectory() as directory:
        base = config(Path(directory))
        results, checked = {}, set()
        for name in meshes:
            axes, *changes = name.split("+")
            run = base
            for change in changes:
                run = c.replace(run, CHANGES[change])
            if axes != "one":
                sizes = {"data": 1} | {axis: int(size) for axis, size in (part.split("=") for part in axes.split(","))}
                run = c.replace(run, {"mesh": sizes})
            mesh = make_mesh(run.mesh, jax.devices()[:1] if axes == "one" else None)
            results[name] = train(run, mesh, Path(directory) / name, checked)
        causal = c.replace(base, {"model": {"num_layers": 1, "attention_pattern": ("dense",)}})
        results["objectives"] = {
            name: on_both_meshes(c.replace(causal, {"data": {"objective": name}}))
            for name in ("masked", "prefix", "fill_in_the_middle")
        }
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
