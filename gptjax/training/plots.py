"""Figures of a run, drawn from its metrics.jsonl."""

import io
import os
from pathlib import Path
from typing import Any

from gptjax.files import expand, write_whole
from gptjax.metrics.figures import GRID_COLOR, TRAIN_COLOR, VALIDATION_COLOR, make_axes, make_panels
from gptjax.training.metrics_file import read_metrics

# The first share EARLY of the tokens is ignored when the limits of an axis are set, if its values would make the axis
# more than SQUASHED times as long as the later values need.
EARLY = 0.1
SQUASHED = 2.5
LOSSES = ("loss", "perplexity", "bits_per_byte")  # of validation records, whose other values are metrics
METRICS = ("f1", "exact_match", "accuracy", "matthews", "pearson", "spearman", "bleu")  # the first one that is found

Points = list[tuple[float, float]]  # (tokens, value)


def plot_loss(workdir: Path, log_tokens: bool = False) -> Path:
    """Draws the training and validation curves of the quantity that both measure, over tokens seen.

    It is the reward of a policy, the task's loss of a fine-tuning run, whose training loss has the language model's
    too, and else the loss. Where validations have a metric, such as accuracy, it gets a second panel.

    Args:
      workdir: of a run with metrics.jsonl.
      log_tokens: use a logarithmic token axis, on which power laws are lines.

    Returns:
      The picture, `<workdir>/loss.png`.

    Raises:
      UserError: as `read_metrics`.
    """
    header, records = read_metrics(workdir)
    metric = _metric(header, records)
    figure, panels = make_panels(_title(expand(os.fspath(workdir)), header), 1 if metric is None else 2)
    train, validation, label = _shared_quantity(records)
    _draw(panels[0], {"train": train, "validation": validation}, label, log_tokens)
    if (limits := limits_without_start(train + validation)) is not None:
        panels[0].set_ylim(*limits)
    if metric is not None:
        curves = {split: _points(records, split, metric) for split in ("train", "validation")}
        _draw(panels[1], curves, metric.replace("_", " "), log_tokens)
    panels[-1].set_xlabel("tokens")
    return _save(figure, expand(os.fspath(workdir)) / "loss.png")


def _shared_quantity(records: list[dict[str, Any]]) -> tuple[Points, Points, str]:
    """The points of training and of validation, and the label of their axis."""
    if rewards := _points(records, "rollout", "reward"):
        return rewards, _points(records, "validation", "reward"), "reward (mean over completions)"
    validation = _points(records, "validation", "loss")
    if task := _points(records, "train", "task_loss"):
        return task, validation, "loss of the task"
    unit = "nats per token" if any("perplexity" in record for record in records) else "nats"
    train = _points(records, "train", "cross_entropy") or _points(records, "train", "loss")
    return train, validation, f"loss ({unit})"


def _metric(header: dict[str, Any], records: list[dict[str, Any]]) -> str | None:
    """The metric that chooses the best checkpoint, or else the first of METRICS; None: only losses are measured."""
    measured = {name for record in records if record["split"] == "validation" for name in record}
    chosen = header.get("config", {}).get("evaluation", {}).get("metric")
    if chosen in measured and chosen not in (*LOSSES, "reward"):
        return str(chosen)
    return next((name for name in METRICS if name in measured), None)


def _points(records: list[dict[str, Any]], split: str, name: str) -> Points:
    return [
        (record["tokens"], record[name])
        for record in records
        if record["split"] == split and record.get(name) is not None
    ]


def _draw(axes: Any, curves: dict[str, Points], label: str, log_tokens: bool) -> None:
    """Draws the curves of one quantity."""
    from matplotlib.ticker import EngFormatter

    styles = {
        "train": {"color": TRAIN_COLOR, "linewidth": 1.2},
        "validation": {"color": VALIDATION_COLOR, "linewidth": 1.8, "marker": "o", "markersize": 5},
    }
    for split, points in curves.items():
        shown = [point for point in points if point[0] > 0 or not log_tokens]
        if shown:
            name = f"{split} (first {shown[0][1]:.3f}, last {shown[-1][1]:.3f})"
            axes.plot(*zip(*shown, strict=True), label=name, **styles[split])
    if log_tokens:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_ylabel(label)
    if axes.lines:
        axes.legend(frameon=False, loc="upper right")


def limits_without_start(points: Points) -> tuple[float, float] | None:
    """Returns the limits of an axis that shows the values after the first EARLY of the tokens; None: no limits needed.

    Early in training the loss falls by several nats, and would squash the differences that matter later.
    """
    end = max((tokens for tokens, _ in points), default=0)
    late = [value for tokens, value in points if tokens > EARLY * end]
    if len(late) < 2:
        return None
    low, high = min(late), max(late)
    values = [value for _, value in points]
    if max(values) - min(values) <= SQUASHED * (high - low) or high == low:
        return None
    margin = 0.08 * (high - low)
    return low - margin, high + margin


def plot_reward(workdir: Path) -> Path:
    """Draws the mean reward of a policy over its KL divergence from the reference (nats per completion).

    Gao et al. 2022, figure 1, which has the square root of the KL divergence.

    Args:
      workdir: of a run with records of split "rollout"; later iterations are darker.

    Returns:
      The picture, `<workdir>/reward.png`.

    Raises:
      UserError: as `read_metrics`.
    """
    header, records = read_metrics(workdir)
    axes = make_axes(_title(expand(os.fspath(workdir)), header))
    points = [(record["kl"], record["reward"]) for record in records if record["split"] == "rollout"]
    if points:
        axes.plot(*zip(*points, strict=True), color=GRID_COLOR, linewidth=1, zorder=1)
        shades = [0.25 + 0.75 * (i + 1) / len(points) for i in range(len(points))]
        axes.scatter(*zip(*points, strict=True), color=VALIDATION_COLOR, alpha=shades, s=18, zorder=2)
    axes.set_xlabel("KL of policy and reference (nats per completion)")
    axes.set_ylabel("reward (mean over the completions of an iteration)")
    return _save(axes.figure, expand(os.fspath(workdir)) / "reward.png")


def _save(figure: Any, path: Path) -> Path:
    figure.savefig(image := io.BytesIO(), dpi=150, format="png")
    write_whole(path, image.getvalue())
    return path


def _title(workdir: Path, header: dict[str, Any]) -> str:
    """The workdir's name, the number of parameters, and the devices."""
    parts = [workdir.resolve().name]
    if "parameters" in header:
        parts.append(f"{header['parameters'] / 1e6:,.1f}M parameters")
    if "devices" in header:
        parts.append(str(header["devices"]))
    return " · ".join(parts)
