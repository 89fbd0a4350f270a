"""The directory of a preparation: what each step writes, and how it appears whole.

OUTPUT/recipe.json      settings and fingerprint of the source
       work/            results of the steps, removed at the end; one directory for each part or task of a step
       tokenizer/, train-*, validation-*, metadata.json, report.json, ...: the corpus
"""

import contextlib
import dataclasses
import functools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import zstandard

from gptjax.config import UserError
from gptjax.corpus.recipe import Recipe
from gptjax.data.prepared_directories import sync
from gptjax.files import read_arrays, read_json, unfinished_path


class Part(NamedTuple):
    """Consecutive documents of the source, in one file.

    Attributes:
      number: of the part, from 0.
      path: of its file.
      start: number of its first document in the source, from 0.
      documents: number of documents.
    """

    number: int
    path: Path
    start: int
    documents: int


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Paths of the results of a preparation; a process of any machine that sees the directory can open it.

    Attributes:
      recipe: the settings.
      output: directory of the corpus.
      cache_dir: directory of OpenAI's vocabularies.
    """

    recipe: Recipe
    output: Path
    cache_dir: Path

    def result(self, step: str, item: int | None = None) -> Path:
        """Returns the directory of the results of a step, or of one of its items."""
        directory = self.output / "work" / step
        return directory if item is None else directory / f"{item:06d}"

    @property
    def is_complete(self) -> bool:
        """Whether the corpus is prepared: its metadata.json is written last."""
        return (self.output / "metadata.json").exists()

    @functools.cached_property
    def parts(self) -> list[Part]:
        """The parts of the source, in order; the source must have been read."""
        parts, start = list[Part](), 0
        for unit in sorted(self.result("read").glob("[0-9]*"), key=lambda path: int(path.name)):
            for piece, documents in enumerate(read_json(unit / "index.json")["parts"]):
                parts.append(Part(len(parts), unit / f"{piece:06d}.npz", start, documents))
                start += documents
        return parts

    @property
    def num_documents(self) -> int:
        """Number of documents of the source."""
        return sum(part.documents for part in self.parts)


@contextlib.contextmanager
def committed(directory: Path) -> Iterator[Path]:
    """Yields an empty directory that is renamed to `directory` when it is complete.

    If `directory` exists then, another process has written the same content, which stays.
    """
    directory.parent.mkdir(parents=True, exist_ok=True)
    unfinished = unfinished_path(directory)
    unfinished.mkdir()
    try:
        yield unfinished
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)
        try:
            unfinished.rename(directory)
        except OSError:
            if not directory.exists():
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def write_part(path: Path, texts: list[bytes]) -> None:
    """Writes the UTF-8 texts of a part."""
    text = zstandard.ZstdCompressor(level=1).compress(b"".join(texts))
    np.savez(path, lengths=np.array(list(map(len, texts)), np.int64), text=np.frombuffer(text, np.uint8))


def read_part(part: Part) -> Iterator[str]:
    """Yields the documents of a part."""
    arrays = load(part.path)
    ends = np.cumsum(arrays["lengths"]).tolist()
    text = zstandard.ZstdDecompressor().decompress(arrays["text"].tobytes())
    begin = 0
    for end in ends:
        yield text[begin:end].decode()
        begin = end


def load(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Reads the arrays of an .npz file of the workspace; raises UserError if it is damaged."""
    try:
        return read_arrays(path)
    except ValueError as error:
        raise UserError(f"{path} is damaged, remove its directory and run the same command again: {error}") from None


def write_json(path: Path, value: Any) -> None:
    """Writes indented JSON."""
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
