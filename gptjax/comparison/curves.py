"""Curves of compared runs: the mean of each group over its seeds, with a band of one standard deviation."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from gptjax.comparison.runs import Group, Quantity, Run
from gptjax.config import UserError
from gptjax.metrics.figures import make_axes
from gptjax.training.plots import limits_without_start

Axis = Literal["tokens", "flops", "seconds"]
FEW = 10  # groups that the categorical colours distinguish
PLOTLY = "plotly is not installed, so there is no interactive page: pip install 'gptjax[sweep]'"


@dataclasses.dataclass(frozen=True)
class Curve:
    """The curve of a group.

    Attributes:
      x, mean: float64 (N,).
      deviation: float64 (N,), the standard deviation over seeds; None: one seed.
    """

    label: str
    x: npt.NDArray[np.float64]
    mean: npt.NDArray[np.float64]
    deviation: npt.NDArray[np.float64] | None


def group_curve(group: Group, quantity: Quantity, axis: Axis) -> Curve | None:
    """Returns the curve of a group over the part of the axis that all its runs have reached; None: there are no values.

    Runs are interpolated linearly at the places of the longest of them; on an axis of tokens these are the same.
    """
    points = [found for run in group.runs.values() if (found := _points(run, quantity, axis))]
    if not points:
        return None
    start, end = max(found[0][0] for found in points), min(found[-1][0] for found in points)
    x = np.array([place for place, _ in max(points, key=len) if start <= place <= end] or [end])
    values = np.stack([np.interp(x, *np.array(found).T) for found in points])
    label = f"{group.label} ({len(points)} seed{'s' if len(points) > 1 else ''})"
    return Curve(label, x, values.mean(0), values.std(0, ddof=1) if len(points) > 1 else None)


def _points(run: Run, quantity: Quantity, axis: Axis) -> list[tuple[float, float]]:
    place = run.x_of(axis)
    return [(place(record), value) for record, value in run.curve(quantity)]


def draw_png(curves: Sequence[Curve], quantity: Quantity, axis: Axis) -> bytes:
    """Draws the curves as a PNG."""
    import matplotlib
    from matplotlib.ticker import EngFormatter

    axes = make_axes(str(quantity))
    palette = matplotlib.colormaps["tab10" if len(curves) <= FEW else "viridis"]
    for i, curve in enumerate(curves):
        color = palette(i) if len(curves) <= FEW else palette(i / (len(curves) - 1))
        axes.plot(curve.x, curve.mean, color=color, linewidth=1.5, label=curve.label)
        if curve.deviation is not None:
            low, high = curve.mean - curve.deviation, curve.mean + curve.deviation
            axes.fill_between(curve.x, low, high, color=color, alpha=0.2, linewidth=0)
    points = [(float(x), float(y)) for curve in curves for x, y in zip(curve.x, curve.mean, strict=True)]
    if (limits := limits_without_start(points)) is not None:
        axes.set_ylim(*limits)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel({"flops": "FLOPs"}.get(axis, axis))
    axes.set_ylabel(quantity.metric.replace("_", " "))
    axes.legend(frameon=False, fontsize=8)
    axes.figure.savefig(image := io.BytesIO(), dpi=150, format="png")
    return image.getvalue()


def draw_page(curves: Sequence[Curve], quantity: Quantity, axis: Axis) -> str:
    """Draws the curves as an HTML page, which holds all of its code and so works without a network.

    Raises:
      UserError: plotly is not installed.
    """
    try:
        import plotly.graph_objects as go
        from plotly.colors import qualitative
    except ImportError:
        raise UserError(PLOTLY) from None
    figure = go.Figure()
    for i, curve in enumerate(curves):
        color = qualitative.D3[i % len(qualitative.D3)]
        shared: dict[str, Any] = {"legendgroup": curve.label, "line": {"color": color}}
        if curve.deviation is not None:
            x = np.concatenate([curve.x, curve.x[::-1]])
            y = np.concatenate([curve.mean - curve.deviation, (curve.mean + curve.deviation)[::-1]])
            band = {"fill": "toself", "fillcolor": color, "opacity": 0.2, "hoverinfo": "skip", "showlegend": False}
            figure.add_scatter(x=x.tolist(), y=y.tolist(), mode="lines", **(shared | {"line": {"width": 0}}), **band)
        figure.add_scatter(x=curve.x.tolist(), y=curve.mean.tolist(), name=curve.label, mode="lines+markers", **shared)
    figure.update_layout(
        title=str(quantity),
        xaxis_title={"flops": "FLOPs"}.get(axis, axis),
        yaxis_title=quantity.metric.replace("_", " "),
        template="plotly_white",
        hovermode="x unified",
    )
    page: str = figure.to_html(include_plotlyjs=True, full_html=True)
    return page
