"""Figures of scaling-law fits: losses with the fitted law, residuals, isoFLOP parabolas, and the envelope of curves."""

from pathlib import Path
from typing import Any

import numpy as np

from gptjax.metrics.figures import DARK_COLOR, GRID_COLOR, TRAIN_COLOR, VALIDATION_COLOR, make_axes
from gptjax.scaling.allocations import Allocation
from gptjax.scaling.law_fits import Fit
from gptjax.scaling.laws import SYMBOLS
from gptjax.scaling.run_table import RunTable

DPI = 150
NAMED = 8  # budgets in a legend, at most
EXTRAPOLATED = 10  # the fitted line ends at so many times the largest input


def draw_fit(fit: Fit, runs: RunTable, directory: Path) -> list[Path]:
    """Draws a fitted law; returns the pictures: loss.png and residuals.png."""
    paths = [directory / "loss.png", directory / "residuals.png"]
    _save(_loss_figure(fit, runs), paths[0])
    _save(_residual_figure(fit, runs), paths[1])
    return paths


def draw_allocation(fit: Allocation, runs: RunTable, directory: Path) -> list[Path]:
    """Draws the optima of an approach; returns the picture: isoflop.png or envelope.png."""
    path = directory / f"{fit.approach}.png"
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    losses, sizes = figure.subplots(1, 2)
    for axes in (losses, sizes):
        axes.grid(color=GRID_COLOR, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    (_draw_parabolas if fit.approach == "isoflop" else _draw_envelope)(losses, fit, runs)
    _draw_sizes(sizes, fit)
    _save(figure, path)
    return [path]


def _loss_figure(fit: Fit, runs: RunTable) -> Any:
    """Losses over compute, or over the one input of the law, and the law: at the optimum where it has one."""
    column = fit.law.columns[0] if len(fit.law.columns) == 1 else "flops"
    x = runs.columns[column]
    axes = make_axes(fit.law.equation)
    line = np.geomspace(x.min(), EXTRAPOLATED * x.max(), 100)
    if len(fit.law.columns) == 1:
        axes.scatter(x, runs.columns[fit.law.measured], s=18, color=TRAIN_COLOR, label="runs")
        values, name = fit.law.value(fit.theta, {column: line}), "fit"
    else:
        shown = axes.scatter(
            *(x, runs.columns["loss"]), s=18, c=np.log10(runs.columns["parameters"]), cmap="viridis", label="runs"
        )
        axes.figure.colorbar(shown, ax=axes, label="log10 of parameters")
        optima = [fit.optimum(float(flops)) for flops in line]
        inputs = {name: np.array([each[i] for each in optima]) for i, name in enumerate(("parameters", "tokens"))}
        values, name = fit.law.value(fit.theta, inputs), "fit, compute-optimal"
    axes.plot(line, values, color=VALIDATION_COLOR, linewidth=1.8, label=name)
    axes.set(xscale="log", xlabel=_label(column), ylabel=_measured(fit.law.measured))
    axes.set_axisbelow(True)
    axes.legend(frameon=False)
    return axes.figure


def _residual_figure(fit: Fit, runs: RunTable) -> Any:
    """Relative errors of the fit, over each input."""
    residuals = 100 * (runs.columns[fit.law.measured] / fit.law.value(fit.theta, runs.columns) - 1)
    from matplotlib.figure import Figure

    count = len(fit.law.columns)
    figure = Figure(figsize=(8, 3.2 * count), layout="constrained")
    panels = figure.subplots(count, squeeze=False)[:, 0]
    for axes, column in zip(panels, fit.law.columns, strict=True):
        axes.grid(color=GRID_COLOR, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.axhline(0, color=VALIDATION_COLOR, linewidth=1.2)
        axes.scatter(runs.columns[column], residuals, s=18, color=DARK_COLOR, alpha=0.7)
        axes.set(xscale="log", xlabel=_label(column), ylabel="measured - fit, %")
    panels[0].set_title(
        f"residuals: median of magnitudes {np.median(np.abs(residuals)):.2f} %", fontsize=11, loc="left"
    )
    return figure


def _draw_parabolas(axes: Any, fit: Allocation, runs: RunTable) -> None:
    from matplotlib import colormaps

    every = -(-len(fit.parabolas) // NAMED)
    for number, each in enumerate(fit.parabolas):
        color = colormaps["viridis"](number / max(1, len(fit.parabolas) - 1) * 0.9)
        sizes = runs.columns["parameters"][each.rows]
        line = np.geomspace(sizes.min(), sizes.max(), 100)
        axes.plot(line, each.value(line), color=color, linewidth=1.2)
        name = None if number % every else f"{each.flops:.1e} FLOPs"
        axes.scatter(sizes, runs.columns["loss"][each.rows], s=16, color=color, label=name)
        axes.scatter([each.size], [each.loss], s=60, color=VALIDATION_COLOR, marker="x", zorder=3)
    axes.set(xscale="log", xlabel=_label("parameters"), ylabel=_measured("loss"))
    axes.set_title("isoFLOP profiles and their minima", fontsize=11, loc="left")
    axes.legend(frameon=False, fontsize=8)


def _draw_envelope(axes: Any, fit: Allocation, runs: RunTable) -> None:
    for name in dict.fromkeys(runs.names):
        rows = [i for i, other in enumerate(runs.names) if other == name]
        axes.plot(runs.columns["flops"][rows], runs.columns["loss"][rows], color=TRAIN_COLOR, linewidth=1)
    axes.scatter(fit.points[:, 0], fit.points[:, 3], s=3, color=VALIDATION_COLOR, zorder=3, label="envelope")
    axes.set(xscale="log", xlabel=_label("flops"), ylabel=_measured("loss"))
    axes.set_title("training curves and their envelope", fontsize=11, loc="left")
    axes.legend(frameon=False)


def _draw_sizes(axes: Any, fit: Allocation) -> None:
    """Optimal parameters and tokens over compute, with the power laws."""
    flops = fit.points[:, 0]
    line = np.geomspace(flops.min(), EXTRAPOLATED * flops.max(), 50)
    for place, column, (scale, power), color in (
        (1, "parameters", ("G", "a"), VALIDATION_COLOR),
        (2, "tokens", ("H", "b"), DARK_COLOR),
    ):
        values = fit.parameters
        axes.scatter(flops, fit.points[:, place], s=14, color=color)
        name = f"{column} ~ C^{values[power]:.3f}"
        axes.plot(line, values[scale] * line ** values[power], color=color, linewidth=1.2, label=name)
    axes.set(xscale="log", yscale="log", xlabel=_label("flops"), ylabel="optimal parameters and tokens")
    axes.set_title("power laws of the optima", fontsize=11, loc="left")
    axes.legend(frameon=False)


def _label(column: str) -> str:
    return f"{'training FLOPs' if column == 'flops' else column} ({SYMBOLS[column]})"


def _measured(name: str) -> str:
    return "held-out loss (nats per token)" if name == "loss" else "mean of -log(pass rate)"


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, dpi=DPI)
