"""Step `read`: copies the documents of the source into parts, which later steps read independently of each other."""

from pathlib import Path

from gptjax.config import UserError
from gptjax.corpus.workspace import Workspace, committed, write_json, write_part


def read_unit(workspace: Workspace, unit: int) -> None:
    """Copies the documents of a unit of the source: consecutive files, or the whole source if it has none.

    Raises:
      UserError: as `Source.documents`, except that a unit may have no text.
    """
    source = workspace.recipe.open_source().divide(workspace.recipe.part_bytes)[unit]
    with committed(workspace.result("read", unit)) as directory:
        counts: list[int] = []
        texts: list[bytes] = []
        size = 0
        for document in source.documents():
            texts.append(document.encode())
            size += len(texts[-1])
            if size >= workspace.recipe.part_bytes:
                _write(directory, texts, counts)
                texts, size = [], 0
        if texts:
            _write(directory, texts, counts)
        read = {name: getattr(source, name) for name in ("replaced_bytes", "replaced_documents", "skipped")}
        write_json(directory / "index.json", {"parts": counts} | read)


def _write(directory: Path, texts: list[bytes], counts: list[int]) -> None:
    write_part(directory / f"{len(counts):06d}.npz", texts)
    counts.append(len(texts))


def check_not_empty(workspace: Workspace) -> None:
    """Raises UserError if the source has no documents."""
    if workspace.num_documents == 0:
        raise UserError(f"source {workspace.recipe.source} has no text: all its documents are empty or damaged")
