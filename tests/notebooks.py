"""The notebooks of colab/ as plain text and as .ipynb files, which `python -m tests.notebooks` writes from the text.

Jupytext's format "percent"; outputs are never kept.
"""

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "colab").glob("*.py"))


def of_source(path: Path) -> Any:
    """Reads a notebook from its plain text; cells are numbered, so that their identifiers stay the same."""
    import jupytext

    notebook = jupytext.read(path)
    notebook.metadata = {
        "colab": {"provenance": []},
        "kernelspec": dict(notebook.metadata["kernelspec"]),
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number}"
        cell.metadata.pop("lines_to_next_cell", None)
    return notebook


def written(path: Path) -> str:
    """Returns the content of the .ipynb file of a notebook."""
    import nbformat

    notebook = of_source(path)
    nbformat.validate(notebook)
    return nbformat.writes(notebook) + "\n"


def code_with_tag(notebook: Any, tag: str) -> list[str]:
    """Returns the source of the code cells that have a tag."""
    return [cell.source for cell in notebook.cells if tag in cell.metadata.get("tags", [])]


def assigned(code: str) -> set[str]:
    """Returns the names that lines of code assign at their beginning, as those of a cell of settings."""
    names: set[str] = set()
    for line in code.splitlines():
        if (match := re.match(r"([A-Z][A-Z_]*(?:, [A-Z][A-Z_]*)*) = ", line)) is not None:
            names |= set(match[1].split(", "))
    return names


if __name__ == "__main__":
    for source in SOURCES:
        source.with_suffix(".ipynb").write_text(written(source), encoding="utf-8")
