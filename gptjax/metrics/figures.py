"""The common style of figures."""

from typing import Any

TRAIN_COLOR, VALIDATION_COLOR, GRID_COLOR = "#9db8d9", "#c8452d", "#dddddd"
DARK_COLOR = "#1f4e8c"  # TRAIN_COLOR's hue, for the darkest cell of a matrix


def make_axes(title: str) -> Any:
    """Returns the matplotlib axes of a new figure with one plot."""
    from matplotlib.figure import Figure

    axes = Figure(figsize=(8, 4.5), layout="constrained").subplots()
    axes.set_title(title, fontsize=11, loc="left")
    axes.grid(color=GRID_COLOR, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    return axes
