"""The tables of a comparison: for a terminal, and as CSV.

Without `speed` a table has no measured times. Then it is a function of the configs, seeds and data alone, since runs
resume exactly, and two executions of a sweep give the same bytes.
"""

import csv
import io
from collections.abc import Sequence

from gptjax.comparison.paired import Difference, difference
from gptjax.comparison.runs import Group, Quantity
from gptjax.config import UserError, nearest
from gptjax.metrics.measurement import Measurement


def comparison_table(
    groups: Sequence[Group], quantity: Quantity, *, speed: bool = True, baseline: str | None = None
) -> str:
    """Returns a row for each group: its config, seeds, tokens, final and best values; and the paired differences.

    Args:
      speed: whether to show tokens per second, which are measured times.
      baseline: label of the group from which differences are taken; None: the one with the best final mean.

    Raises:
      UserError: there is no such group.
    """
    better = "lower" if quantity.lower_is_better else "higher"
    keys = list(groups[0].settings)
    header = [*keys, "seeds", "tokens", "final", "best", *(["tokens/s"] if speed else [])]
    rows = [_row(group, quantity, speed) for group in groups]
    title = f"{quantity}, {better} is better: mean ± standard error over seeds"
    lines = [title, "", *_aligned([header, *rows], len(keys))]
    lines += ["", *_differences(groups, quantity, baseline)] if len(groups) > 1 else []
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _row(group: Group, quantity: Quantity, speed: bool) -> list[str]:
    tokens = sorted({run.tokens for run in group.runs.values()})
    cells = [
        *group.settings.values(),
        str(len(group.runs)),
        f"{tokens[0]:,}" if len(tokens) == 1 else f"{tokens[0]:,} to {tokens[-1]:,}",
        _measured(group.measured(lambda run: run.final(quantity))),
        _measured(group.measured(lambda run: run.best(quantity))),
    ]
    if speed:
        rate = group.measured(lambda run: run.speed())
        cells.append("" if rate is None else f"{rate.value:,.0f}")
    return cells


def _measured(measured: Measurement | None) -> str:
    if measured is None:
        return ""
    return f"{measured.value:.4f}" + ("" if measured.stderr is None else f" ± {measured.stderr:.4f}")


def _aligned(rows: list[list[str]], left: int) -> list[str]:
    """Aligns columns: the first `left` to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def choose_baseline(groups: Sequence[Group], quantity: Quantity, label: str | None) -> Group:
    """Returns the group with a label, or by default the one with the best final mean; UserError if there is none."""
    if label is not None:
        found = {group.label: group for group in groups}
        if label not in found:
            raise UserError(f"--baseline={label} is none of the groups{nearest(label, found)}")
        return found[label]

    def score(group: Group) -> float:
        final = group.measured(lambda run: run.final(quantity))
        if final is None:
            return float("inf")
        return final.value if quantity.lower_is_better else -final.value

    return min(groups, key=score)


def _differences(groups: Sequence[Group], quantity: Quantity, label: str | None) -> list[str]:
    """A line for each group but the baseline: the paired difference of the final values, with its tests."""
    baseline = choose_baseline(groups, quantity, label)
    which = "" if label is not None else ", the best mean"
    lines = [f"differences of the final values from {baseline.label}{which}; paired over equal seeds, 95 % interval"]
    others = [group for group in groups if group is not baseline]
    width = max(len(group.label) for group in others)
    for group in others:
        found = difference(group, baseline, quantity)
        lines.append(f"  {group.label:<{width}}  {_described(found)}")
    lengths = {run.tokens for group in groups for run in group.runs.values()}
    if len(lengths) > 1:
        lines.append("  note: the runs have not all seen the same number of tokens: some are running, or shorter")
    return lines


def _described(found: Difference | None) -> str:
    if found is None:
        return "no seed in common: no test"
    if found.interval is None:
        return f"{found.value:+.4f}, one seed in common: no estimate of the noise"
    low, high = found.interval
    verdict = "  WITHIN NOISE" if found.within_noise else ""
    return (
        f"{found.value:+.4f} [{low:+.4f}, {high:+.4f}]  {found.seeds} seeds, t test p={found.t_test:.3g}, "
        f"permutation p={found.permutation:.3g}{verdict}"
    )


def runs_csv(groups: Sequence[Group], quantity: Quantity, *, speed: bool = True) -> str:
    """Returns a line for each run, with all digits."""
    keys = list(groups[0].settings)
    columns = ["run", *keys, "seed", "tokens", "final", "best", *(["tokens_per_second"] if speed else [])]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for group in groups:
        for seed, run in group.runs.items():
            values = [run.tokens, run.final(quantity), run.best(quantity), *([run.speed()] if speed else [])]
            cells = ["" if value is None else value for value in values]
            writer.writerow([run.name, *group.settings.values(), seed, *cells])
    return text.getvalue()
