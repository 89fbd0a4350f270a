"""The printed table of an evaluation, and the entries of its scores in the JSON file."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.metrics.measurement import Measurement
from gptjax.metrics.resampling import bootstrap_interval, paired_test

CONTROL = "choices only"  # the column of the scores of `gptjax/evaluation/choice_controls.py:choices_only`


def score_entry(
    measured: Measurement, baselines: Mapping[str, float] | None = None, control: Measurement | None = None
) -> dict[str, Any]:
    """Returns the JSON fields of a score, with None for infinity and NaN, which JSON lacks.

    Args:
      baselines: scores that it is compared with, by name.
      control: the same score without the question, on the same examples.
    """
    entry: dict[str, Any] = {"value": _finite(measured.value), "stderr": _finite(measured.stderr), "n": measured.n}
    interval = None if measured.sample is None else bootstrap_interval(measured.sample)
    if interval is not None:
        entry["interval"] = list(interval)
    if baselines:
        entry["baselines"] = dict(baselines)
    if control is not None and measured.sample is not None and control.sample is not None:
        found = paired_test(measured.sample, control.sample)
        entry["choices_only"] = score_entry(control) | {
            "gain": {"value": found.value, "interval": found.interval, "p_value": found.p_value, "test": found.test}
        }
    return entry


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


# Keys of a task's entry that are printed below the table.
_STATED = (
    *("num_fewshot", "fewshot_seed", "stride", "context_length", "concatenated", "first_token_scored"),
    *("documents", "tokens", "bytes", "detokenizer", "original_tokens", "detokenizer_restored_lines"),
    *("examples", "examples_available", "truncated_requests"),
    *("prompts", "prompts_available", "left_out", "max_new_tokens", "bleu_signature", "reward_model"),
    *("samples", "temperature", "top_p", "sampling_seed", "truncated_prompts", "isolation"),
    *("judge", "opponent"),
)


def table(report: dict[str, Any]) -> str:
    """Formats the report's scores as a table, with notes and the settings of each task below."""
    scores = [
        (name, metric, measured)
        for name, entry in report["results"].items()
        for metric, measured in entry["metrics"].items()
    ]
    baselines = list(dict.fromkeys(key for _, _, measured in scores for key in _compared(measured)))
    rows = [["task", "metric", "value", "95 % interval", "stderr", *baselines, "n"]]
    for name, metric, measured in scores:
        found = _compared(measured)
        rows.append(
            [
                *(
                    name,
                    metric,
                    number_text(measured["value"]),
                    interval_text(measured),
                    number_text(measured["stderr"]),
                ),
                *(number_text(found[key]) if key in found else "" for key in baselines),
                f"{measured['n']:,}",
            ]
        )
    lines = aligned(rows, 2)
    lines.insert(1, "-" * len(lines[0]))
    lines.append("")
    lines += [note for name, metric, measured in scores for note in _notes(name, metric, measured)]
    for name, entry in report["results"].items():
        stated = ", ".join(f"{key} {_plain(entry[key])}" for key in _STATED if entry.get(key) is not None)
        lines.append(f"{name}: {stated}")
    lines.append(f"step {report['step']} of {report['workdir']}, {report['model']['dtype']}, {report['device']}")
    return "\n".join(line.rstrip() for line in lines)


def _compared(measured: Mapping[str, Any]) -> dict[str, float]:
    """What a score is compared with, by the name of its column."""
    control = {CONTROL: measured["choices_only"]["value"]} if "choices_only" in measured else {}
    return measured.get("baselines", {}) | control


def _notes(name: str, metric: str, measured: Mapping[str, Any]) -> list[str]:
    """States what a score cannot be distinguished from, at the confidence of its interval."""
    notes = []
    if "interval" in measured:
        low, high = measured["interval"]
        baselines = measured.get("baselines", {})
        inside = [f"{key} {number_text(value)}" for key, value in baselines.items() if low <= value <= high]
        if inside:
            notes.append(f"note: {name} {metric}: the interval contains the baseline {' and '.join(inside)}")
    if "choices_only" in measured:
        gain = measured["choices_only"]["gain"]
        if gain["interval"] is None or gain["interval"][0] <= 0:
            notes.append(
                f"note: {name} {metric}: no better than without the question: gain {number_text(gain['value'])} "
                f"{interval_text(gain)}, p={gain['p_value']:.3g}"
            )
    return notes


def interval_text(measured: Mapping[str, Any]) -> str:
    """Returns the interval of a score's entry as "[low, high]"; "-" without one."""
    if measured.get("interval") is None:
        return "-"
    return f"[{', '.join(map(number_text, measured['interval']))}]"


def aligned(rows: Sequence[Sequence[str]], left: int) -> list[str]:
    """Aligns columns: the first `left` to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def number_text(value: float | None) -> str:
    """Returns a score with four decimals, large ones with one."""
    return "-" if value is None else f"{value:.4f}" if abs(value) < 1000 else f"{value:,.1f}"


def _plain(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}" if isinstance(value, float) else str(value)
