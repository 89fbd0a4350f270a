"""Figures of a run, drawn from its metrics.jsonl."""

from pathlib import Path
from typing import Any

from gptjax.metrics.figures import GRID_COLOR, TRAIN_COLOR, VALIDATION_COLOR, make_axes
from gptjax.training.metrics_file import read_metrics


def plot_loss(workdir: Path, log_tokens: bool = False) -> Path:
    """Draws training and validation loss (nats per token) over tokens seen.

    Args:
      workdir: of a run with metrics.jsonl.
      log_tokens: a logarithmic token axis, which shows power laws as lines.

    Returns:
      The picture, `<workdir>/loss.png`.

    Raises:
      UserError: as `read_metrics`.
    """
    from matplotlib.ticker import EngFormatter

    header, records = read_metrics(workdir)
    axes = make_axes(_title(Path(workdir), header))
    for split, style in (
        ("train", {"color": TRAIN_COLOR, "linewidth": 1.2}),
        ("validation", {"color": VALIDATION_COLOR, "linewidth": 1.8, "marker": "o", "markersize": 5}),
    ):
        points = [
            (record["tokens"], record["loss"])
            for record in records
            if record["split"] == split and record.get("loss") is not None and (record["tokens"] > 0 or not log_tokens)
        ]
        if points:
            label = f"{split} (last {points[-1][1]:.3f})"
            axes.plot(*zip(*points, strict=True), label=label, **style)
    if log_tokens:
        axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_xlabel("tokens")
    axes.set_ylabel("loss (nats per token)")
    if axes.lines:
        axes.legend(frameon=False)
    path = Path(workdir) / "loss.png"
    axes.figure.savefig(path, dpi=150)
    return path


def plot_reward(workdir: Path) -> Path:
    """Draws the reward of a policy's answers over how far it has gone from its reference (KL, nats per answer).

    What a policy gains for how much it gives up: Gao et al. 2022, figure 1, which has the square root of the KL.

    Args:
      workdir: of a run with records of split "rollout"; the later an iteration, the darker its point.

    Returns:
      The picture, `<workdir>/reward.png`.

    Raises:
      UserError: as `read_metrics`.
    """
    header, records = read_metrics(workdir)
    axes = make_axes(_title(Path(workdir), header))
    points = [(record["kl"], record["reward"]) for record in records if record["split"] == "rollout"]
    if points:
        axes.plot(*zip(*points, strict=True), color=GRID_COLOR, linewidth=1, zorder=1)
        shades = [0.25 + 0.75 * (i + 1) / len(points) for i in range(len(points))]
        axes.scatter(*zip(*points, strict=True), color=VALIDATION_COLOR, alpha=shades, s=18, zorder=2)
    axes.set_xlabel("KL of policy and reference (nats per answer)")
    axes.set_ylabel("reward (mean over the answers of an iteration)")
    path = Path(workdir) / "reward.png"
    axes.figure.savefig(path, dpi=150)
    return path


def _title(workdir: Path, header: dict[str, Any]) -> str:
    """The workdir's name, and of its header what a reader of the picture asks first."""
    parts = [workdir.resolve().name]
    if "parameters" in header:
        parts.append(f"{header['parameters'] / 1e6:,.1f}M parameters")
    if "devices" in header:
        parts.append(str(header["devices"]))
    return " · ".join(parts)
