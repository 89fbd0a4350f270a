"""The common style of figures."""

from typing import Any

TRAIN_COLOR, VALIDATION_COLOR, GRID_COLOR = "#9db8d9", "#c8452d", "#dddddd"
DARK_COLOR = "#1f4e8c"  # TRAIN_COLOR's hue, for the darkest cell of a matrix


def make_axes(title: str) -> Any:
    """Returns the matplotlib axes of a new figure with one plot."""
    return make_panels(title, 1)[1][0]


def make_panels(title: str, count: int) -> tuple[Any, list[Any]]:
    """Returns a new matplotlib figure and the axes of its `count` plots, one above the other with the same x axis."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5 if count == 1 else 3 * count), layout="constrained")
    panels = list(figure.subplots(count, sharex=True, squeeze=False)[:, 0])
    panels[0].set_title(title, fontsize=11, loc="left")
    for axes in panels:
        axes.grid(color=GRID_COLOR, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels
