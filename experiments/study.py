"""Results of the studies: intervals over seeds, results.json and the figure of a study, and RESULTS.md of all.

    python -m experiments.study

writes experiments/RESULTS.md from the results.json of every study.
"""

import dataclasses
import importlib.metadata
import io
import json
import os
import platform
import re
import shlex
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app

from gptjax.comparison.paired import paired_difference
from gptjax.comparison.runs import Run, read_runs
from gptjax.comparison.sweep_record import read_record
from gptjax.files import write_whole
from gptjax.metrics.figures import GRID_COLOR
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


def runs_by(sweep: Path, argument: str) -> dict[str, dict[int, Run]]:
    """Reads the runs of a sweep, by the value of an argument of their config file and by seed, in the sweep's order."""
    members = (read_record(sweep) or {})["members"]
    found: dict[str, dict[int, Run]] = {}
    for run in read_runs([sweep], print):
        value = re.search(rf"\b{argument}=(\w+)", members[run.name]["config"])
        assert value is not None, run.name
        found.setdefault(value[1], {})[run.config.seed] = run
    return found


def workdirs(sweep: Path, runs: Mapping[str, Mapping[int, Run]]) -> list[Path]:
    """The workdirs of `runs_by`."""
    return [sweep / run.name for by_seed in runs.values() for run in by_seed.values()]


@dataclasses.dataclass(frozen=True)
class Panel:
    """A plot of a figure: lines by label, each a list of (x, values by seed).

    Attributes:
      log2: x is shown on a logarithmic scale.
      rows: names of x = 0, 1, ..., one below the other; the values are then on the horizontal axis.
      bands: intervals are bands around curves, whose labels stand at their ends.
    """

    title: str
    lines: Mapping[str, Sequence[tuple[float, Sequence[float]]]]
    x_label: str
    y_label: str
    log2: bool = False
    rows: Sequence[str] = ()
    bands: bool = False

    def place(self, x: float) -> float | str:
        return self.rows[int(x)] if self.rows else x


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
                line: [{panel.x_label: panel.place(x), **summary(values)} for x, values in points]
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
    """Draws panels next to each other, with 95 % intervals over the seeds."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    large = any(panel.rows or panel.bands for panel in panels)
    width, height = (8.0, 4.6) if large else (4.2, 3.4)
    figure = Figure(figsize=(width * len(panels), height), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        (_draw_rows if panel.rows else _draw_bands if panel.bands else _draw_points)(axes, panel)
    figure.savefig(image := io.BytesIO(), dpi=150 if large else 80)
    Image.open(image).convert("RGB").quantize(128).save(path, optimize=True)  # a third of the size


def _spread(points: Sequence[tuple[float, Sequence[float]]]) -> tuple[list[float], list[float], list[float]]:
    """Means of the points, and the lower and upper ends of their intervals."""
    means = [statistics.mean(values) for _, values in points]
    found = [paired_difference(values).interval or (m, m) for m, (_, values) in zip(means, points, strict=True)]
    return means, [low for low, _ in found], [high for _, high in found]


def _errors(means: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    return [[m - a for m, a in zip(means, low, strict=True)], [b - m for m, b in zip(means, high, strict=True)]]


def _draw_points(axes: Any, panel: Panel) -> None:
    for label, points in panel.lines.items():
        means, low, high = _spread(points)
        axes.errorbar([x for x, _ in points], means, _errors(means, low, high), marker="o", capsize=3, label=label)
    if panel.log2:
        axes.set_xscale("symlog", base=2, linthresh=1)
        ticks = sorted({x for points in panel.lines.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.set(title=panel.title, xlabel=panel.x_label, ylabel=panel.y_label)
    axes.legend(fontsize=8)


def _draw_rows(axes: Any, panel: Panel) -> None:
    for n, (label, points) in enumerate(panel.lines.items()):
        means, low, high = _spread(points)
        y = [x + 0.25 * (n - (len(panel.lines) - 1) / 2) for x, _ in points]
        axes.errorbar(means, y, xerr=_errors(means, low, high), fmt="o", markersize=4, capsize=2, label=label)
    axes.set_yticks(range(len(panel.rows)), panel.rows)
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel=panel.y_label)
    _style(axes, panel)
    axes.legend(frameon=False)


def _draw_bands(axes: Any, panel: Panel) -> None:
    ends = {label: statistics.mean(points[-1][1]) for label, points in panel.lines.items()}
    starts = [statistics.mean(points[0][1]) for points in panel.lines.values()]
    places = _apart(ends, (max(starts) - min(ends.values())) / 18)
    right = max(points[-1][0] for points in panel.lines.values())
    for n, (label, points) in enumerate(panel.lines.items()):
        x = [x for x, _ in points]
        means, low, high = _spread(points)
        axes.plot(x, means, color=f"C{n}", linewidth=2)
        axes.fill_between(x, low, high, color=f"C{n}", alpha=0.2, linewidth=0)
        style = {"color": f"C{n}", "weight": "bold", "va": "center"}
        text, place = f"{label}: {means[-1]:.2f}", (right, places[label])
        axes.annotate(text, place, (6, 0), textcoords="offset points", **style)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    _style(axes, panel)


def _apart(places: Mapping[str, float], gap: float) -> dict[str, float]:
    """Moves places up until they are `gap` apart."""
    moved: dict[str, float] = {}
    for label, place in sorted(places.items(), key=lambda item: item[1]):
        moved[label] = max([place, *(other + gap for other in moved.values())])
    return moved


def _style(axes: Any, panel: Panel) -> None:
    axes.set_title(panel.title, loc="left")
    axes.grid(color=GRID_COLOR, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)


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
