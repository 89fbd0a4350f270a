"""Reads the runs of the sweep, and writes results.json and the figure.

python -m experiments.gpt1_transfer.measure --sweep=runs/gpt1_transfer
"""

import re
from pathlib import Path

from absl import app, flags

from experiments.study import Claim, Panel, report
from gptjax.comparison.runs import Quantity, Run, read_runs

SWEEP = flags.DEFINE_string("sweep", None, "Directory of the sweep.", required=True)
OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "Directory of results.json and the figure.")

ACCURACY = Quantity("validation", "accuracy")


def setting(run: Run) -> tuple[int, str, bool]:
    """The number of labelled rows, what is transferred, and whether the auxiliary loss is on."""
    found = re.search(r"train_(\d+)\.jsonl", run.config.data.source)
    assert found is not None, run.config.data.source
    layers = run.config.init_layers
    start = "scratch" if run.config.init_from is None else "all" if layers is None else f"{layers} layers"
    return int(found[1]), start, run.config.task.lm_weight > 0


def main(_: list[str]) -> None:
    runs = read_runs([Path(SWEEP.value)], print)
    found: dict[tuple[int, str, bool], dict[int, float]] = {}
    for run in runs:
        accuracy = run.final(ACCURACY)
        assert accuracy is not None, run.name
        found.setdefault(setting(run), {})[run.config.seed] = accuracy
    counts = sorted({rows for rows, *_ in found})
    most = counts[-1]

    def minus(first: tuple[int, str, bool], second: tuple[int, str, bool]) -> list[float]:
        return [found[first][seed] - found[second][seed] for seed in sorted(found[first])]

    gains = {rows: minus((rows, "all", True), (rows, "scratch", True)) for rows in counts}
    claims = [Claim(f"transfer minus scratch, {rows} rows: accuracy", gains[rows]) for rows in counts]
    fewest_minus_most = [a - b for a, b in zip(gains[counts[0]], gains[most], strict=True)]
    claims.append(Claim(f"transfer gains more with {counts[0]} rows than with {most}", fewest_minus_most))
    claims.append(
        Claim(f"all layers minus embeddings only, {most} rows", minus((most, "all", True), (most, "0 layers", True)))
    )
    claims.append(Claim(f"auxiliary loss minus none, {most} rows", minus((most, "all", True), (most, "all", False))))
    by_rows = {
        name: [(rows, list(found[rows, start, True].values())) for rows in counts]
        for name, start in (("pretrained", "all"), ("scratch", "scratch"))
    }
    by_rows["pretrained, no auxiliary loss"] = [(most, list(found[most, "all", False].values()))]
    partial = sorted(start for _, start, _ in found if start.endswith(" layers"))
    order = [*partial, "all"]
    by_layers = [(i, list(found[most, start, True].values())) for i, start in enumerate(order)]
    scratch = list(found[most, "scratch", True].values())
    lines = {"pretrained": by_layers, "scratch": [(x, scratch) for x, _ in by_layers]}
    panels = [
        Panel("labelled rows", by_rows, "labelled rows", "accuracy", log2=True),
        Panel(f"transferred layers, {most} rows", lines, "transferred layers", "accuracy"),
    ]
    report(Path(OUTPUT.value), claims, panels, [Path(SWEEP.value, run.name) for run in runs])


if __name__ == "__main__":
    app.run(main)
