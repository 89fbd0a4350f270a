"""Tables of compared evaluations: for a terminal, as CSV and as JSON."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from gptjax.comparison.evaluations import Comparison, Evaluated
from gptjax.evaluation.result_table import aligned, interval_text, number_text


def evaluation_table(evaluations: Sequence[Evaluated], compared: Sequence[Comparison]) -> str:
    """Returns a row for each score with a column for each workdir, and below it the paired differences."""
    names = [evaluated.name for evaluated in evaluations]
    cells = {(each.task, each.metric, each.name): each for each in compared}
    scores = list(dict.fromkeys((each.task, each.metric) for each in compared))
    random = {(each.task, each.metric): each.entry.get("baselines", {}).get("random") for each in compared}
    has_random = any(value is not None for value in random.values())
    rows = [["task", "score", *names, *(["random"] if has_random else []), "n"]]
    for score in scores:
        found = [cells.get((*score, name)) for name in names]
        expected = random[score]
        rows.append(
            [
                *score,
                *("" if each is None else _scored(each) for each in found),
                *(["" if expected is None else number_text(expected)] if has_random else []),
                f"{next(each.entry['n'] for each in found if each is not None):,}",
            ]
        )
    lines = ["95 % intervals over examples", "", *aligned(rows, 2)]
    if any(each.test is not None for each in compared):
        lines += ["", *_differences(compared)]
    lines += _notes(evaluations)
    return "\n".join(line.rstrip() for line in lines) + "\n"


def _scored(each: Comparison) -> str:
    value = number_text(each.entry["value"])
    return value if each.entry.get("interval") is None else f"{value} {interval_text(each.entry)}"


def _differences(compared: Sequence[Comparison]) -> list[str]:
    baseline = next(each.baseline for each in compared if each.test is not None)
    rows = [["task", "score", "workdir", "difference", "95 % interval", "p", "p (Holm)", "test", ""]]
    for each in compared:
        if each.test is not None:
            test, p_holm = each.test, each.p_holm
            within = test.interval is None or test.interval[0] <= 0 <= test.interval[1]
            interval = "-" if test.interval is None else "[{:+.4f}, {:+.4f}]".format(*test.interval)
            rows.append(
                [
                    *(each.task, each.metric, each.name, f"{test.value:+.4f}", interval),
                    *(f"{test.p_value:.3g}", f"{p_holm:.3g}", test.test, "WITHIN NOISE" if within else ""),
                ]
            )
    title = f"differences from {baseline}, paired over the same examples; p (Holm) counts all {len(rows) - 1} tests"
    return [title, "", *aligned(rows, 3)]


def _notes(evaluations: Sequence[Evaluated]) -> list[str]:
    """Names what the workdirs differ in that a reader would overlook."""
    notes = []
    for task in dict.fromkeys(task for evaluated in evaluations for task in evaluated.tasks):
        steps = {each.name: each.tasks[task].step for each in evaluations if task in each.tasks}
        missing = [each.name for each in evaluations if task not in each.tasks]
        if missing:
            notes.append(f"note: {task} was not evaluated in {', '.join(missing)}")
        tokenizers = {each.tasks[task].tokenizer for each in evaluations if task in each.tasks}
        if len(tokenizers) > 1:
            notes.append(f"note: {task}: the tokenizers differ: scores per token are not comparable")
        if len(set(steps.values())) > 1:
            notes.append(f"note: {task}: steps " + ", ".join(f"{step:,} of {name}" for name, step in steps.items()))
    return ["", *notes] if notes else []


def evaluation_records(compared: Sequence[Comparison]) -> list[dict[str, Any]]:
    """Returns a flat record of each score; None where there is no value."""
    records = []
    for each in compared:
        low, high = each.entry.get("interval") or (None, None)
        test = each.test
        difference_low, difference_high = (None, None) if test is None or test.interval is None else test.interval
        record = {"task": each.task, "score": each.metric, "workdir": each.name, "n": each.entry["n"]}
        record |= {"value": each.entry["value"], "low": low, "high": high}
        record |= {"random": each.entry.get("baselines", {}).get("random")}
        record |= {"difference": None if test is None else test.value}
        record |= {"difference_low": difference_low, "difference_high": difference_high}
        record |= {"p_value": None if test is None else test.p_value, "p_holm": each.p_holm}
        records.append(record | {"test": None if test is None else test.test})
    return records


def evaluation_csv(compared: Sequence[Comparison]) -> str:
    """Returns a line for each score, with all digits."""
    records, text = evaluation_records(compared), io.StringIO()
    writer = csv.DictWriter(text, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def evaluation_json(compared: Sequence[Comparison]) -> str:
    """Returns the records as a JSON list."""
    return json.dumps(evaluation_records(compared), indent=2) + "\n"
