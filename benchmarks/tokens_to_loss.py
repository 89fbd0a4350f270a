"""Compares how fast configs, and the code of others, reduce the held-out loss on the same batches, by tokens and time.

    python -m benchmarks.tokens_to_loss --workdir=runs/race --config=configs/gpt_modern.py:runlocal \
        --config=configs/gpt2.py:runlocal --peer=nanochat:/path/to/nanochat --peer_python=/path/to/python

Writes the training and held-out batches of the first config to a file, trains every config, and every peer with its
own model, optimizer and learning rates at the first config's sizes, on these batches in this order. Prints the final
losses (mean and 95 % interval over seeds), the tokens after which each reaches the final loss of the last config, and
the seconds of training at the median rate, without compilation and evaluation. Peers are checkouts of
karpathy/nanochat and karpathy/nanoGPT; --peer_python has torch. Writes WORKDIR/tokens_to_loss.json and .png; finished
runs are not repeated.
"""

import dataclasses
import itertools
import json
import math
import subprocess
from pathlib import Path
from typing import Any

import matplotlib.figure
import numpy as np
from absl import flags

from benchmarks.measuring import held_out_curve, interval
from benchmarks.peer_training import PEERS, SIZES
from gptjax import cli
from gptjax import config as c
from gptjax.data.mixture import open_mixture
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages import builders
from gptjax.stages.reading import reader

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the batches, the runs and the table.", required=True)
CONFIGS = flags.DEFINE_multi_string(
    "config", ["configs/gpt_modern.py:runlocal", "configs/gpt2.py:runlocal"], "FILE[:ARGUMENTS]; repeatable."
)
OVERRIDES = flags.DEFINE_multi_string("set", [], "KEY=VALUE of all configs, such as data.source=shakespeare.")
NAMED_PEERS = flags.DEFINE_multi_string("peer", [], f"NAME:CHECKOUT with NAME one of {', '.join(PEERS)}; repeatable.")
PEER_PYTHON = flags.DEFINE_string("peer_python", "python3", "Interpreter with torch, for the peers.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of each side.", lower_bound=1)
EVALUATIONS = flags.DEFINE_integer("evaluations", 14, "Evaluations during a run.", lower_bound=1)

Curve = dict[str, list[float]]  # "tokens", "seconds" and held-out "loss", in nats, one for each evaluation


def main() -> None:
    peers = [named.partition(":")[::2] for named in NAMED_PEERS.value]
    for name, _ in peers:
        c.choose(PEERS, name, "peer")
    configs = {spec: load(spec) for spec in CONFIGS.value}
    folder = Path(WORKDIR.value)
    folder.mkdir(parents=True, exist_ok=True)
    curves: dict[str, list[Curve]] = {name: [] for name in [*configs, *(name for name, _ in peers)]}
    # Seeds in the outer loop: an interrupted benchmark has compared all sides with the first seeds.
    for seed in range(SEEDS.value):
        sides = {spec: dataclasses.replace(config, seed=seed) for spec, config in configs.items()}
        batches = {
            spec: export(config, folder / f"batches-{i}-{seed}.npz") for i, (spec, config) in enumerate(sides.items())
        }
        for spec, config in sides.items():
            check_equal(batches[spec], batches[CONFIGS.value[0]], spec)
            curves[spec].append(train(config, folder / f"{list(sides).index(spec)}-{seed}"))
        for name, checkout in peers:
            curves[name].append(
                train_peer(name, checkout, batches[CONFIGS.value[0]], folder / f"{name}-{seed}.json", seed)
            )
    (folder / "tokens_to_loss.json").write_text(json.dumps(curves, indent=2) + "\n")
    print_table(curves, CONFIGS.value[-1])
    plot(curves, folder / "tokens_to_loss.png")


def load(spec: str) -> c.Config:
    """The config of FILE[:ARGUMENTS] with the overrides, evaluated so many times and without samples."""
    config = c.load_config(spec, dict(item.partition("=")[::2] for item in OVERRIDES.value))
    assert config.batch.total_tokens is not None, "one pass of so many tokens"
    every = config.batch.total_tokens // EVALUATIONS.value
    return c.replace(
        config, {"evaluation": {"sample_tokens": 0, "every_tokens": every}, "logging": {"tensorboard": False}}
    )


def export(config: c.Config, path: Path) -> Path:
    """Writes the batches of a run, the held-out batches and the model's sizes as an .npz file."""
    if path.exists():
        return path
    mesh = make_mesh(config.mesh)
    stage = builders.build(config, mesh, None)
    complete = stage.config
    tokens_per_step = complete.batch.tokens_per_batch
    steps = math.ceil(stage.total_tokens / tokens_per_step)
    per_step = tokens_per_step // (complete.sequences_per_microbatch * complete.model.context_length)
    found = list(itertools.islice(stage.batches(0, None), steps * per_step))
    mixture = open_mixture(
        config.data, context_length=config.model.context_length, seed=config.seed, tokenizer=stage.tokenizer
    )
    rows = complete.sequences_per_microbatch * complete.model.context_length
    limit = None if config.evaluation.max_tokens is None else math.ceil(config.evaluation.max_tokens / rows)
    held_out = list(itertools.islice(reader(complete, mesh)(mixture.corpora[0].validation, 0), limit))
    arrays: dict[str, Any] = {
        name: np.concatenate([batch.arrays[name] for batch in found]).reshape(steps, -1, complete.model.context_length)
        for name in ("tokens", "targets")
    }
    full = [batch for batch in held_out if np.all(batch.arrays["weights"] == 1)]
    for name in ("tokens", "targets"):
        arrays[f"held_out_{name}"] = np.stack([batch.arrays[name] for batch in full])
    arrays |= {name: np.int64(getattr(complete.model, name)) for name in SIZES}
    assert config.evaluation.every_tokens is not None
    arrays["every"] = np.int64(config.evaluation.every_tokens // tokens_per_step)
    np.savez(path, **arrays)
    return path


def check_equal(path: Path, first: Path, spec: str) -> None:
    """Raises UserError unless two files have the same batches."""
    with np.load(path) as ours, np.load(first) as theirs:
        names = ("tokens", "targets", "held_out_tokens")
        if not all(np.array_equal(ours[name], theirs[name]) for name in names):
            raise c.UserError(
                f"--config={spec} has other batches than the first: give all the same data and batch size"
            )


def train(config: c.Config, workdir: Path) -> Curve:
    """Trains a config unless that is done."""
    run(config, workdir)
    return held_out_curve(workdir)


def train_peer(name: str, checkout: str, batches: Path, output: Path, seed: int) -> Curve:
    """Trains a peer in its own process unless that is done."""
    if not output.exists():
        script = Path(__file__).with_name("peer_training.py")
        subprocess.run([PEER_PYTHON.value, script, name, checkout, batches, output, str(seed)], check=True)
    curve: Curve = json.loads(output.read_text())
    return curve


def tokens_to(loss: float, curve: Curve) -> float:
    """Tokens after which a curve first reaches `loss`, interpolated between evaluations; infinite: it does not."""
    losses, tokens = curve["loss"], curve["tokens"]
    for i in range(1, len(losses)):
        if losses[i] <= loss:
            return float(np.interp(-loss, [-losses[i - 1], -losses[i]], [tokens[i - 1], tokens[i]]))
    return math.inf


def print_table(curves: dict[str, list[Curve]], reference: str) -> None:
    goals = [curve["loss"][-1] for curve in curves[reference]]
    print(f"held-out loss in nats per token, {len(goals)} seeds; goal: the final loss of {reference}")
    print(f"{'side':<40}{'final loss':>18}{'tokens to goal':>18}{'seconds':>10}")
    for name, seeds in curves.items():
        loss, error = interval([curve["loss"][-1] for curve in seeds])
        needed = np.mean([tokens_to(goal, curve) for goal, curve in zip(goals, seeds, strict=True)])
        seconds = np.mean([curve["seconds"][-1] for curve in seeds])
        print(f"{name:<40}{f'{loss:.3f} ± {error:.3f}':>18}{needed:>18,.0f}{seconds:>10.0f}")


def plot(curves: dict[str, list[Curve]], path: Path) -> None:
    """Draws every curve against tokens and against seconds."""
    figure = matplotlib.figure.Figure(figsize=(10, 4), layout="constrained")
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), ("tokens", "seconds"), strict=True):
        for i, (name, seeds) in enumerate(curves.items()):
            for j, curve in enumerate(seeds):
                axes.plot(
                    curve[unit][1:], curve["loss"][1:], color=f"C{i}", label=name if j == 0 else None, linewidth=1
                )
        axes.set_xlabel("training tokens" if unit == "tokens" else "seconds of training")
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("held-out loss (nats per token)")
    figure.axes[0].legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    cli.run(main)
