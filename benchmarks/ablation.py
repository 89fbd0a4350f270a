"""Measures what each ingredient of configs/gpt_modern.py gives at the size of the demo.

    python -m benchmarks.ablation --workdir=runs/ablation
    python -m benchmarks.ablation --workdir=runs/ablation --variants=modern,gpt2,experts --seeds=1 --tokens=200000

Trains the modern model, the modern model without each ingredient, GPT-2, and a mixture of experts with as many active
parameters as the modern model, each with several seeds. Prints for each the held-out loss after all tokens ("equal
tokens"), and the loss at the time at which the fastest variant has read all tokens ("equal time"), interpolated
between evaluations; the learning-rate schedule of slower variants is not over by then. Differences from the modern
model are paired over seeds, with a 95 % interval (Student's t). Writes WORKDIR/ablation.json; finished runs are not
repeated.
"""

import dataclasses
import itertools
import json
import math
import runpy
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags

from benchmarks.measuring import held_out_curve, interval
from gptjax import config as c
from gptjax.run import run

MODERN = "configs/gpt_modern.py"
INGREDIENTS = list(runpy.run_path(MODERN)["INGREDIENTS"])
# Name -> the config file and its argument.
VARIANTS = {
    "modern": (MODERN, "runlocal"),
    **{f"without {name}": (MODERN, f"runlocal,without={name}") for name in INGREDIENTS},
    "gpt2": ("configs/gpt2.py", "runlocal"),
    "experts": (MODERN, "runlocal,experts=8"),
}

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the runs and the table.", required=True)
SEEDS = flags.DEFINE_integer("seeds", 3, "Number of seeds of each variant.", lower_bound=1)
TOKENS = flags.DEFINE_integer("tokens", None, "Training tokens of each run. Default: those of runlocal.")
NAMES = flags.DEFINE_list("variants", list(VARIANTS), f"Some of: {', '.join(VARIANTS)}.")


def main(_: list[str]) -> None:
    for name in NAMES.value:
        c.choose(VARIANTS, name, "variants")
    # Seeds in the outer loop: an interrupted benchmark has compared all variants with the first seeds.
    curves: dict[str, list[dict[str, list[float]]]] = {name: [] for name in NAMES.value}
    for seed, name in itertools.product(range(SEEDS.value), NAMES.value):
        curves[name].append(train(name, seed))
    budget = min(curve["seconds"][-1] for seeds in curves.values() for curve in seeds)
    table = {name: summary(seeds, curves.get("modern"), budget) for name, seeds in curves.items()}
    Path(WORKDIR.value, "ablation.json").write_text(json.dumps({"curves": curves, "table": table}, indent=2) + "\n")
    print_table(table, budget)


def train(name: str, seed: int) -> dict[str, list[float]]:
    """Trains a variant unless that is done; returns its held-out losses with tokens and seconds of training."""
    file, argument = VARIANTS[name]
    config = c.resolve(runpy.run_path(file)["get_config"](argument))
    changes: dict[str, Any] = {"evaluation": {"sample_tokens": 0}, "logging": {"tensorboard": False}}
    if TOKENS.value is not None:
        every = max(1, TOKENS.value // 5)
        changes |= {"batch": {"total_tokens": TOKENS.value}, "checkpoint": {"every_tokens": TOKENS.value}}
        changes["evaluation"] |= {"every_tokens": every}
    workdir = Path(WORKDIR.value) / f"{name.replace(' ', '_')}-{seed}"
    run(c.replace(dataclasses.replace(config, seed=seed), changes), workdir)
    return held_out_curve(workdir)


def summary(
    seeds: list[dict[str, list[float]]], modern: list[dict[str, list[float]]] | None, budget: float
) -> dict[str, Any]:
    """Means over seeds, and the paired differences from the modern model with their intervals."""
    last = [curve["loss"][-1] for curve in seeds]
    timed = [float(np.interp(budget, curve["seconds"], curve["loss"])) for curve in seeds]
    row: dict[str, Any] = {
        "equal_tokens": float(np.mean(last)),
        "equal_time": float(np.mean(timed)),
        "seconds": float(np.mean([curve["seconds"][-1] for curve in seeds])),
    }
    if modern is not None:
        row["tokens_difference"] = interval([a - b["loss"][-1] for a, b in zip(last, modern, strict=True)])
        modern_timed = [float(np.interp(budget, curve["seconds"], curve["loss"])) for curve in modern]
        row["time_difference"] = interval([a - b for a, b in zip(timed, modern_timed, strict=True)])
    return row


def print_table(table: dict[str, dict[str, Any]], budget: float) -> None:
    print(f"held-out loss, nats per token; equal time is {budget:.0f} s of training steps; differences from modern")
    print(f"{'variant':<26}{'equal tokens':>14}{'difference':>18}{'equal time':>12}{'difference':>18}{'seconds':>9}")
    for name, row in table.items():
        differences = [
            "{:+.3f} ± {:.3f}".format(*row.get(key, (math.nan, math.nan)))
            for key in ("tokens_difference", "time_difference")
        ]
        print(
            f"{name:<26}{row['equal_tokens']:>14.3f}{differences[0]:>18}{row['equal_time']:>12.3f}"
            f"{differences[1]:>18}{row['seconds']:>9.0f}"
        )


if __name__ == "__main__":
    app.run(main)
