"""Reads the runs of the sweep, and writes results.json and the figure.

python -m experiments.evolution.measure --sweep=runs/evolution
"""

import itertools
import math
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments.study import Claim, Panel, report, runs_by, workdirs
from gptjax.comparison.runs import Quantity, Run

SWEEP = flags.DEFINE_string("sweep", None, "Directory of the sweep.", required=True)
OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "Directory of results.json and the figure.")

BITS = Quantity("validation", "bits_per_byte")
NAMES = {"gpt1": "GPT-1, 2018", "gpt2": "GPT-2, 2019", "gpt3": "GPT-3, 2020", "gpt_oss": "gpt-oss, 2025"}
TITLE, UNIT = "Five GPT recipes at one compute budget (4 layers of width 64, 3 seeds)", 1e11


def curve(run: Run) -> list[tuple[float, float]]:
    """(training FLOPs, held-out loss in nats per byte) of every evaluation."""
    place = run.x_of("flops")
    return [(place(record) / UNIT, bits * math.log(2)) for record, bits in run.curve(BITS)]


def compute_to_reach(points: list[tuple[float, float]], loss: float) -> float:
    """The FLOPs at which a curve first has a loss, linear between evaluations; infinite: it never has."""
    for (x, y), (next_x, next_y) in itertools.pairwise(points):
        if next_y <= loss:
            return float(np.interp(-loss, (-y, -next_y), (x, next_x)))
    return math.inf


def main(_: list[str]) -> None:
    runs = runs_by(Path(SWEEP.value), "generation")
    curves = {name: {seed: curve(run) for seed, run in sorted(of.items())} for name, of in runs.items()}
    last = {name: {seed: points[-1][1] for seed, points in of.items()} for name, of in curves.items()}
    seeds = sorted(last["modern"])

    def minus(first: str, second: str) -> list[float]:
        return [last[first][seed] - last[second][seed] for seed in seeds]

    others = [name for name in last if name != "modern"]
    lead = [min(last[name][seed] - last["modern"][seed] for name in others) for seed in seeds]
    factors = [
        curves["gpt2"][seed][-1][0] / compute_to_reach(curves["modern"][seed], last["gpt2"][seed]) for seed in seeds
    ]
    claims = [
        Claim("GPT-1 minus GPT-2, nats per byte", minus("gpt1", "gpt2")),
        Claim("GPT-2 minus GPT-3, nats per byte", minus("gpt2", "gpt3")),
        Claim("GPT-3 minus gpt-oss, nats per byte", minus("gpt3", "gpt_oss")),
        Claim("GPT-2 minus modern, nats per byte", minus("gpt2", "modern"), 0.05),
        Claim("best of the others minus modern, nats per byte", lead),
        Claim("compute of GPT-2 over that with which modern reaches its loss", factors, 2.0),
    ]
    lines = {
        NAMES.get(name, name): [(points[0][0], [y for _, y in points]) for points in zip(*of.values(), strict=True)][1:]
        for name, of in curves.items()
    }
    panel = Panel(TITLE, lines, "training compute, 1e11 FLOPs", "held-out loss, nats per byte", bands=True)
    report(Path(OUTPUT.value), claims, [panel], workdirs(Path(SWEEP.value), runs))


if __name__ == "__main__":
    app.run(main)
