"""Results of the studies: intervals over seeds, results.json and the figure of a study, and RESULTS.md of all.

    python -m experiments.study

writes experiments/RESULTS.md from the results.json of every study.
"""

import dataclasses
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app

from gptjax.comparison.paired import paired_difference
from gptjax.files import write_whole
from gptjax.training.metrics_file import read_metrics

FOLDER = Path(__file__).parent
RESULTS = "results.json"
FIGURE = "figure.png"


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim about a mean over seeds: it held if the whole 95 % interval is above `least`.

    Attributes:
      text: the claim.
      values: by seed, such as paired differences.
    """

    text: str
    values: Sequence[float]
    least: float = 0.0

    def record(self) -> dict[str, Any]:
        found = summary(self.values)
        low = found["interval"][0] if found["interval"] else None
        return {"claim": self.text, "at_least": self.least, **found, "held": low is not None and low > self.least}


def command_line() -> str:
    """The command that this process runs, as a user types it."""
    module = getattr(sys.modules["__main__"], "__spec__", None)
    return shlex.join(["python", "-m", module.name if module else sys.argv[0], *sys.argv[1:]])


def summary(values: Sequence[float]) -> dict[str, Any]:
    """Returns the values by seed, their mean and its 95 % interval (Student's t); None: a single seed has none."""
    interval = paired_difference(values).interval
    return {"seeds": list(values), "mean": statistics.mean(values), "interval": interval and list(interval)}


@dataclasses.dataclass(frozen=True)
class Panel:
    """A plot of a figure: lines by label, each a list of (x, values by seed)."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]]
    x_label: str
    y_label: str
    log2: bool = False


def report(folder: Path, claims: Sequence[Claim], panels: Sequence[Panel], workdirs: Sequence[Path]) -> None:
    """Prints the claims of a study with what was found, and writes results.json and the figure.

    Args:
      workdirs: the runs that were measured; their wall-clock seconds of training are summed.
    """
    found = [claim.record() for claim in claims]
    seconds = [max(record["seconds"] for record in read_metrics(workdir)[1]) for workdir in workdirs]
    content = {
        "commit": _commit(),
        "command": command_line(),
        "machine": {"cores": os.cpu_count(), "python": platform.python_version(), **_versions()},
        "runs": len(workdirs),
        "seconds_of_runs": round(sum(seconds)),
        "claims": found,
        "figures": {
            panel.title: {
                line: [{panel.x_label: x, **summary(values)} for x, values in points]
                for line, points in panel.lines.items()
            }
            for panel in panels
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_whole(folder / RESULTS, json.dumps(content, indent=1) + "\n")
    plot(folder / FIGURE, panels)
    for claim in found:
        print(described(claim))


def _commit() -> str:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=FOLDER, capture_output=True, text=True, check=False)
    return commit.stdout.strip() or "unknown"


def _versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}


def described(claim: Mapping[str, Any]) -> str:
    """A claim in one line, with the mean and the interval over seeds."""
    low, high = claim["interval"] or (float("nan"), float("nan"))
    verdict = "held" if claim["held"] else "DID NOT HOLD"
    numbers = f"{claim['mean']:.3f} [{low:.3f}, {high:.3f}]"
    return f"{verdict}: {claim['claim']}: {numbers}, {len(claim['seeds'])} seeds; needs more than {claim['at_least']}"


def plot(path: Path, panels: Sequence[Panel]) -> None:
    """Draws panels next to each other; error bars are 95 % intervals over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2 * len(panels), 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for label, points in panel.lines.items():
            means = [statistics.mean(values) for _, values in points]
            intervals = [
                paired_difference(values).interval or (m, m) for m, (_, values) in zip(means, points, strict=True)
            ]
            errors = [[m - low for m, (low, _) in zip(means, intervals, strict=True)]]
            errors.append([high - m for m, (_, high) in zip(means, intervals, strict=True)])
            axes.errorbar([x for x, _ in points], means, yerr=errors, marker="o", capsize=3, label=label)
        if panel.log2:
            axes.set_xscale("symlog", base=2, linthresh=1)
            ticks = sorted({x for points in panel.lines.values() for x, _ in points})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
        axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)


def results_page() -> str:
    """RESULTS.md: the claims of all studies."""
    lines = [
        "# Results",
        "",
        "What each study claims and measured, from its results.json by `python -m experiments.study`. A claim held if",
        "its whole 95 % interval over seeds (Student's t) is above the bound.",
        "",
        "| study | claim | mean [interval] | bound | seeds | held |",
        "|---|---|---|---|---|---|",
    ]
    pictures = []
    for path in sorted(FOLDER.glob(f"*/{RESULTS}")):
        name, content = path.parent.name, json.loads(path.read_text())
        pictures += ["", f"## {name}", "", f"![{name}]({name}/{FIGURE})"]
        for claim in content["claims"]:
            low, high = claim["interval"]
            verdict = "yes" if claim["held"] else "**no**"
            lines.append(
                f"| [{name}]({name}/README.md) | {claim['claim']} | {claim['mean']:.3f} [{low:.3f}, {high:.3f}] | "
                f"{claim['at_least']:g} | {len(claim['seeds'])} | {verdict} |"
            )
    return "\n".join([*lines, *pictures, ""])


def main(_: list[str]) -> None:
    (FOLDER / "RESULTS.md").write_text(results_page())


if __name__ == "__main__":
    app.run(main)
