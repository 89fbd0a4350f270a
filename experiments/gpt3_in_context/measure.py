"""Measures the runs of the sweep on the task files, and writes results.json and the figure.

python -m experiments.gpt3_in_context.measure --sweep=runs/gpt3_in_context --episodes=runs/episodes
"""

import math
from pathlib import Path

from absl import app, flags

from experiments.gpt3_in_context.episodes import FAMILIES, SHOTS
from experiments.study import Claim, Panel, report
from gptjax.comparison.runs import read_runs
from gptjax.evaluation.run_tasks import Options, evaluate

SWEEP = flags.DEFINE_string("sweep", None, "Directory of the sweep.", required=True)
EPISODES = flags.DEFINE_string("episodes", None, "Directory of the task files.", required=True)
RESULTS = flags.DEFINE_string("results", str(Path(__file__).parent), "Directory of results.json and the figure.")

Accuracies = dict[str, dict[str, dict[int, dict[int, float]]]]  # family -> size -> shots -> seed -> accuracy


def measure() -> tuple[Accuracies, list[Path]]:
    """Evaluates every run of the sweep, as `python -m gptjax.evaluate` does."""
    files = {(family, shots): Path(EPISODES.value, f"{family}_{shots}.jsonl") for family in FAMILIES for shots in SHOTS}
    found: Accuracies = {family: {} for family in FAMILIES}
    workdirs = []
    for run in read_runs([Path(SWEEP.value)], print):
        workdirs.append(Path(SWEEP.value, run.name))
        scores = evaluate(workdirs[-1], Options(tasks=tuple(map(str, files.values())), batch_size=32))
        size = f"{run.config.model.num_layers}x{run.config.model.embed_dim}"
        for (family, shots), path in files.items():
            accuracy = scores["results"][path.stem]["metrics"]["accuracy"]["value"]
            found[family].setdefault(size, {}).setdefault(shots, {})[run.config.seed] = accuracy
    return found, workdirs


def claims_of(found: Accuracies) -> list[Claim]:
    claims, fewest, most = [], min(SHOTS), max(SHOTS)
    for family, sizes in found.items():
        small, *_, large = sorted(sizes, key=lambda size: math.prod(map(int, size.split("x"))))
        seeds = sorted(sizes[large][most])
        gained = [sizes[large][most][seed] - sizes[large][fewest][seed] for seed in seeds]
        grown = [sizes[large][most][seed] - sizes[small][most][seed] for seed in seeds]
        claims.append(Claim(f"{family}: accuracy at {most} examples minus that at {fewest}, {large}", gained, 0.3))
        claims.append(Claim(f"{family}: accuracy at {most} examples, {large} minus {small}", grown))
    return claims


def main(_: list[str]) -> None:
    found, workdirs = measure()
    panels = [
        Panel(
            family,
            {size: [(n, list(shots[n].values())) for n in SHOTS] for size, shots in sizes.items()},
            "examples in context",
            "accuracy",
            log2=True,
        )
        for family, sizes in found.items()
    ]
    report(Path(RESULTS.value), claims_of(found), panels, workdirs)


if __name__ == "__main__":
    app.run(main)
