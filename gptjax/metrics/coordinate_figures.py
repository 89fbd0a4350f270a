"""The figure of a coordinate check: the change of activations against width and depth, a column for each kind."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.metrics.figures import GRID_COLOR

DPI = 150


def draw_coordinates(changes: Mapping[str, Mapping[str, Mapping[int, np.ndarray]]], axis: str, path: Path) -> None:
    """Draws mean absolute changes since the initialisation, with a line for each step, to a PNG file.

    Args:
      changes: parametrization -> kind of activations -> width or number of layers -> float (steps + 1,).
      axis: "width" or "layers".
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    kinds = list(next(iter(changes.values())))
    figure = Figure(figsize=(2.6 * len(kinds), 2.8 * len(changes)), layout="constrained")
    panels: Any = figure.subplots(len(changes), len(kinds), sharex=True, sharey="row", squeeze=False)
    for row, (parametrization, by_kind) in zip(panels, changes.items(), strict=True):
        for axes, (kind, by_size) in zip(row, by_kind.items(), strict=True):
            sizes = list(by_size)
            steps = len(next(iter(by_size.values())))
            for step in range(1, steps):
                color = mpl.colormaps["viridis"](step / steps)
                axes.plot(sizes, [by_size[size][step] for size in sizes], marker="o", markersize=3, color=color)
            axes.set(xscale="log", yscale="log")
            axes.set_xticks(sizes, [str(size) for size in sizes])
            axes.minorticks_off()
            axes.set_title(f"{kind.replace('_', ' ')}, {parametrization}", fontsize=9, loc="left")
            axes.grid(color=GRID_COLOR, linewidth=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        row[0].set_ylabel(f"mean |change|, steps 1 to {steps - 1}")
    for axes in panels[-1]:
        axes.set_xlabel(axis)
    figure.savefig(path, dpi=DPI)
