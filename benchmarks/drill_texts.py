"""The corpora of the drills' runs, and the settings of runs that read one of them, or a mixture of all."""

import json
from pathlib import Path
from typing import Any

# Name -> the sentences of a document, and the number of documents. The last one is so small that a mixture repeats it.
CORPORA = {
    "text": ("{i} squared is {square}. ", 20_000),
    "more": ("the square of {i}: {square}\n", 2_000),
    "few": ("{square} is a square. ", 20),
}
WEIGHTS, LATER_WEIGHTS = (5.0, 3.0, 1.0), (1.0, 3.0, 5.0)


def write_text(directory: Path) -> None:
    """Writes the corpora."""
    for name, (template, documents) in CORPORA.items():
        lines = (json.dumps({"text": template.format(i=i, square=i * i) * 20}) for i in range(documents))
        (directory / f"{name}.jsonl").write_text("\n".join(lines) + "\n")


def data_settings(directory: Path, mixture: bool, middle: int) -> dict[str, Any]:
    """The sources by config key: the first corpus, or a mixture with other weights after `middle` tokens."""
    sources = [f"jsonl:{directory / name}.jsonl" for name in CORPORA]
    if not mixture:
        return {"data.source": sources[0]}
    return {
        "data.mixture": tuple(zip(sources, WEIGHTS, strict=True)),
        "data.mixture_schedule": ((middle, LATER_WEIGHTS),),
    }
