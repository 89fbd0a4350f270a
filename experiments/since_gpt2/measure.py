"""Reads the runs of the sweep, prints the table, and writes results.json and the figure.

python -m experiments.since_gpt2.measure --sweep=runs/since_gpt2

A run's time is its tokens divided by the speed of its variant: that which a tenth of the training records of all its
seeds exceed. Compilation and evaluation are no part of it, and little of what other processes took away.
"""

from pathlib import Path

import numpy as np
from absl import app, flags

from experiments.study import Claim, Panel, report, runs_by, summary, workdirs
from gptjax.comparison.runs import Quantity, Run

SWEEP = flags.DEFINE_string("sweep", None, "Directory of the sweep.", required=True)
OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "Directory of results.json and the figure.")

LOSS, SPEED = Quantity("validation", "loss"), Quantity("train", "tokens_per_second")
NOT_INGREDIENTS = ("modern", "gpt2", "experts")
TITLES = {
    "gpt2": "GPT-2",
    "experts": "8 experts, 2 active",
    "no_biases": "with biases",
    "untied_head": "with a tied head",
}


def speed(runs: dict[int, Run]) -> float:
    """Tokens per second of a variant."""
    return float(np.percentile([value for run in runs.values() for _, value in run.curve(SPEED)], 90))


def loss_at(run: Run, seconds: float, tokens_per_second: float) -> float:
    """The held-out loss after so many seconds of training, linear between the evaluations before and after."""
    points = [(record["tokens"] / tokens_per_second, loss) for record, loss in run.curve(LOSS)]
    return float(np.interp(seconds, *np.array(points).T))


def main(_: list[str]) -> None:
    runs = runs_by(Path(SWEEP.value), "variant")
    seeds, speeds = sorted(runs["modern"]), {name: speed(of) for name, of in runs.items()}
    at_tokens: dict[str, list[float]] = {}
    at_time: dict[str, list[float]] = {}
    for name, of in runs.items():
        # The slower of both is read where the faster ended; its schedule is not over there.
        end = runs["modern"][seeds[0]].tokens / max(speeds[name], speeds["modern"])
        pairs = [((of[s], speeds[name]), (runs["modern"][s], speeds["modern"])) for s in seeds]
        at_time[name] = [loss_at(a, end, fast) - loss_at(b, end, base) for (a, fast), (b, base) in pairs]
        at_tokens[name] = [(a.final(LOSS) or 0.0) - (b.final(LOSS) or 0.0) for (a, _), (b, _) in pairs]
    ingredients = [name for name in runs if name not in NOT_INGREDIENTS]
    without_muon = [
        a - max(at_tokens[n][i] for n in ingredients if n != "muon") for i, a in enumerate(at_tokens["muon"])
    ]
    claims = [
        Claim("GPT-2 minus modern, equal tokens, nats per token", at_tokens["gpt2"], 0.3),
        Claim("GPT-2 minus modern, equal time, nats per token", at_time["gpt2"], 0.1),
        Claim("without Muon minus without the next in importance, equal tokens", without_muon),
        Claim(
            "without the ingredient that gives least, minus modern, equal tokens",
            [min(at_tokens[name][i] for name in ingredients) for i in range(len(seeds))],
        ),
        Claim("modern minus its mixture of experts, equal tokens", [-value for value in at_tokens["experts"]]),
        Claim("modern minus its mixture of experts, equal time", [-value for value in at_time["experts"]]),
    ]
    order = sorted((name for name in runs if name != "modern"), key=lambda name: -np.mean(at_tokens[name]))
    rows = [TITLES.get(name, f"without {name.replace('_', ' ')}") for name in order]
    for name, row in zip(order, rows, strict=True):
        cells = [
            "{:+.3f} [{:+.3f}, {:+.3f}]".format(s["mean"], *s["interval"])
            for s in (summary(at_tokens[name]), summary(at_time[name]))
        ]
        print(f"| {row} | {cells[0]} | {speeds[name] / speeds['modern']:.2f} | {cells[1]} |")
    lines = {
        label: [(float(i), values[name]) for i, name in enumerate(order)]
        for label, values in (("equal tokens", at_tokens), ("equal time (noisy)", at_time))
    }
    panel = Panel(
        "What the modern recipe loses without each ingredient",
        lines,
        "variant",
        "loss minus modern's, nats per token",
        rows=rows,
    )
    report(Path(OUTPUT.value), claims, [panel], workdirs(Path(SWEEP.value), runs))


if __name__ == "__main__":
    app.run(main)
