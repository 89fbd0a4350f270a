"""Compares optimizers: held-out loss after the same data, time of a step, and memory of the moments.

    python -m benchmarks.optimizers [--config=configs/gpt2.py:runlocal] [--run=adamw@3e-3 --run=muon@3e-3 ...]
        [--tokens=200000] [--warmup_tokens=20000] [--rounds=5] [--steps=4] [--output=optimizers.json]

A run is NAME[,KEY=VALUE,...]@LEARNING_RATE, such as muon,first_moment_dtype=bfloat16@6e-3, KEY of OptimizerConfig.
Each run trains from the config's seed on the config's batches, and reports the held-out loss at the end. Before that,
steps of the optimizers alternate on random tokens, which measures their relative time; the size of the moments is
printed too.
"""

import ast
import statistics
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import jax
from absl import flags

from benchmarks.checkpoint import Trainer, loaded_config
from benchmarks.measuring import alternate, measured_on, ratio, seconds, write_json
from gptjax import cli
from gptjax import config as c
from gptjax.config import UserError
from gptjax.parallel.mesh import make_mesh
from gptjax.run import train_stage
from gptjax.stages.builders import build

RUNS = (
    *("adamw@7.5e-4", "adamw@1.5e-3", "adamw@3e-3", "adamw@6e-3", "adamw,first_moment_dtype=bfloat16@3e-3"),
    *("adafactor@1.5e-3", "adafactor@3e-3", "muon@3e-3", "muon@6e-3", "muon@12e-3"),
)


def parse(text: str) -> dict[str, Any]:
    """Parses a run into the fields of OptimizerConfig that it changes; UserError if it is malformed."""
    what, _, rate = text.partition("@")
    name, *changes = what.split(",")
    fields: dict[str, Any] = {"name": name}
    for change in changes:
        key, _, value = change.partition("=")
        c.check_key(f"optimizer.{key}")
        fields[key] = _value(value)
    try:
        return fields | {"peak_lr": float(rate)}
    except ValueError:
        raise UserError(f"--run={text!r} is not NAME[,KEY=VALUE,...]@LEARNING_RATE") from None


def _value(text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def step_times(config: c.Config, rounds: int, steps: int) -> list[dict[str, Any]]:
    """Measures the step times of each optimizer of the runs."""
    changes = {text.partition("@")[0]: parse(text) for text in flags.FLAGS.run}
    vocab_size = config.model.vocab_size or flags.FLAGS.vocab_size
    rows = []
    print(f"{'':40} {'ms a step':>10} {'times the first':>16} {'bytes of moments':>17}")
    with jax.set_mesh(make_mesh(config.mesh)):
        config = c.replace(config, {"model": {"vocab_size": vocab_size}})
        trainers = {name: Trainer(c.replace(config, {"optimizer": fields})) for name, fields in changes.items()}
        sides = {name: partial(seconds, partial(trainer.train, steps)) for name, trainer in trainers.items()}
        alternate(sides, 1)
        times = alternate(sides, rounds)
    base = next(iter(times.values()))
    for name, values in times.items():
        state = trainers[name].state.opt_state
        size, longer = sum(leaf.nbytes for leaf in jax.tree.leaves(state)), 1 / ratio(values, base)
        print(f"{name:40} {1e3 * statistics.median(values) / steps:>10.1f} {longer:>16.2f} {size:>17,}", flush=True)
        rows.append({"optimizer": name, "seconds": values, "steps": steps, "bytes": size, "times_the_first": longer})
    return rows


def short_run(config: c.Config, tokens: int, warmup_tokens: int) -> c.Config:
    """Returns the config of a run of `tokens` tokens, with evaluation only at the end."""
    return c.replace(
        config,
        {
            "batch": {"total_tokens": tokens, "epochs": None},
            "optimizer": {"warmup_tokens": warmup_tokens, "warmup_fraction": None},
            "evaluation": {"every_tokens": None, "every_epochs": None, "sample_tokens": 0},
            "checkpoint": {"every_tokens": None, "every_epochs": None},
            "logging": {"tensorboard": False},
        },
    )


def held_out_loss(config: c.Config) -> float:
    mesh = make_mesh(config.mesh)
    with tempfile.TemporaryDirectory() as directory:
        return train_stage(build(config, mesh, None), mesh, Path(directory)).validation["loss"]


def main() -> None:
    config = short_run(loaded_config(), max(1, flags.FLAGS.tokens), flags.FLAGS.warmup_tokens)
    runs = {text: c.replace(config, {"optimizer": parse(text)}) for text in flags.FLAGS.run}
    for run in runs.values():
        c.check(run)
    result: dict[str, Any] = {**measured_on(), "steps": [], "runs": []}
    if flags.FLAGS.rounds > 0:
        result["steps"] = step_times(config, flags.FLAGS.rounds, flags.FLAGS.steps)
        write_json(flags.FLAGS.output, result)
    if flags.FLAGS.tokens > 0:
        for text, run in runs.items():
            loss = held_out_loss(run)
            print(f"{text:40} held-out loss {loss:.4f}", flush=True)
            result["runs"].append({"run": text, "loss": loss})
            write_json(flags.FLAGS.output, result)


if __name__ == "__main__":
    flags.DEFINE_multi_string(
        "run", RUNS, "A run, as described above; repeatable. Default: those of benchmarks/LOG.md."
    )
    flags.DEFINE_integer("tokens", 200_000, "Training tokens of each run; 0: only measure step times.", lower_bound=0)
    flags.DEFINE_integer("warmup_tokens", 20_000, "Tokens of the learning-rate warm-up.", lower_bound=0)
    flags.DEFINE_integer("rounds", 5, "Rounds of alternating steps; 0: do not measure step times.", lower_bound=0)
    flags.DEFINE_integer("steps", 4, "Steps of a round.", lower_bound=1)
    flags.DEFINE_integer(
        "vocab_size", 4096, "Vocabulary size of the random tokens, if the config leaves it to the tokenizer."
    )
    flags.DEFINE_string("output", None, "Write the measurements to this JSON file.")
    cli.run(main)
