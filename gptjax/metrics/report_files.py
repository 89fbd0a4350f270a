"""Output files of an evaluation on labelled examples: the plot of the confusion matrix, and the predictions."""

import io
import json
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.files import write_whole
from gptjax.metrics.figures import DARK_COLOR, GRID_COLOR, TRAIN_COLOR

# Inches of a label's cell and of the longer side of the figure, and the smallest legible font size in points
MIN_CELL, MAX_CELL, MAX_SIDE, MIN_POINTS = 0.3, 0.8, 24.0, 5.0
LONGEST_LABEL = 24  # characters


def plot_confusion(path: Path, confusion: npt.NDArray[np.int64], labels: Sequence[str]) -> Path:
    """Plots a confusion matrix, coloured by the share of each row, with the counts other than 0.

    The file is replaced atomically.

    Args:
      path: of the PNG.
      confusion: int (labels, labels), rows: gold, columns: predicted.
      labels: their names. Characters that no installed font has are drawn as boxes.

    Returns:
      `path`.

    Raises:
      UserError: `path` cannot be written.
    """
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure

    n, total = len(labels), int(confusion.sum())
    cell = min(max(min(MAX_CELL, 12 / n), MIN_CELL), MAX_SIDE / n)
    share = confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    figure = Figure(figsize=(n * cell + 2.5, n * cell + 2), layout="constrained")
    axes = figure.subplots()
    colors = LinearSegmentedColormap.from_list("share", ["white", TRAIN_COLOR, DARK_COLOR])
    axes.imshow(share, cmap=colors, vmin=0, vmax=1)
    points = min(10.0, cell * 72 * 0.7)
    # Labels may contain $, as the tags of the Brown corpus do, which is not mathematics.
    names = [name if len(name) <= LONGEST_LABEL else name[: LONGEST_LABEL - 1] + "…" for name in labels]
    text: dict[str, Any] = {"fontsize": points, "parse_math": False}
    rotated: dict[str, Any] = {
        "rotation": 45 if n <= 12 else 90,
        "rotation_mode": "anchor",
        "ha": "right",
        "va": "center",
    }
    axes.set_xticks(range(n), names, **rotated, **text)
    axes.set_yticks(range(n), names, **text)
    digits = len(str(int(confusion.max(initial=0))))
    points = min(10.0, cell * 72 * 0.85 / (0.64 * digits))  # a digit is 0.64 of its height wide
    if points >= MIN_POINTS:
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if share[row, column] > 0.6 else "black"
            axes.text(column, row, confusion[row, column], ha="center", va="center", fontsize=points, color=color)
    axes.set_xticks(np.arange(1, n) - 0.5, minor=True)
    axes.set_yticks(np.arange(1, n) - 0.5, minor=True)
    axes.grid(which="minor", color=GRID_COLOR, linewidth=0.6)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_color(GRID_COLOR)
    axes.set_xlabel("predicted")
    axes.set_ylabel("gold")
    axes.set_title(f"{int(np.trace(confusion)):,} of {total:,} correct", fontsize=11, loc="left")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure.savefig(image := io.BytesIO(), dpi=150, format="png")
        write_whole(path, image.getvalue())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return path


def write_predictions(path: Path, records: Iterable[Mapping[str, Any]]) -> int:
    """Writes records as JSON lines, atomically: `path` is replaced once everything is written.

    Args:
      path: its directory is created if it is missing.
      records: dicts of strings, finite numbers (also numpy's), arrays, lists and dicts.

    Returns:
      The number of records.

    Raises:
      UserError: `path` cannot be written.
    """
    # json does not serialise numpy's scalars and arrays.
    lines = [
        json.dumps(record, ensure_ascii=False, allow_nan=False, default=lambda value: value.tolist()) + "\n"
        for record in records
    ]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Lone surrogates, which UTF-8 cannot encode, are escaped as JSON does.
        write_whole(path, "".join(lines).encode(errors="backslashreplace"))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error}") from None
    return len(lines)
