"""Precision, recall, F1 and support of labels, as a table for a terminal and as JSON."""

import unicodedata
from typing import NamedTuple


class ScoreRow(NamedTuple):
    """The scores of a label, an entity type or an average."""

    name: str
    precision: float
    recall: float
    f1: float
    support: int


def by_name(rows: list[ScoreRow]) -> dict[str, dict[str, float]]:
    """Returns {name: its scores}."""
    return {
        row.name: {"precision": row.precision, "recall": row.recall, "f1": row.f1, "support": row.support}
        for row in rows
    }


def format_table(title: str, rows: list[ScoreRow], averages: list[ScoreRow]) -> str:
    """Formats rows of precision, recall, F1 and support, and below an empty line the averages."""
    width = max(_width(name) for name in (title, *(row.name for row in (*rows, *averages))))

    def line(row: ScoreRow) -> str:
        name = " " * (width - _width(row.name)) + row.name
        return f"{name}  {row.precision:9.4f}  {row.recall:6.4f}  {row.f1:6.4f}  {row.support:8,}\n"

    header = f"{title:>{width}}  precision  recall      F1   support\n"
    return "".join([header, *map(line, rows), "\n", *map(line, averages)])


def _width(text: str) -> int:
    """Counts terminal columns: wide characters such as Chinese take two, combining accents none."""
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)
