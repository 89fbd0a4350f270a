"""Documents of a text column: of Parquet files, of datasets that `datasets` saved, and of the Hugging Face Hub."""

import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.data import hub
from gptjax.data.arrow_tables import Kind, column_values, saved_files
from gptjax.data.file_patterns import matching_files
from gptjax.data.remote_files import DataFile
from gptjax.data.source import FileSource, Source
from gptjax.data.text_files import InvalidUtf8, Utf8

_SAVED_SPEC = re.compile(r"(?P<directory>.+?)(@(?P<split>[\w.-]+))?(#(?P<field>[^#]+))?")


class ParquetFiles(FileSource):
    """Parquet files; each row is a document."""

    def __init__(self, spec: str, invalid_utf8: InvalidUtf8, pattern: str, field: str) -> None:
        super().__init__(spec, invalid_utf8, lambda: matching_files(pattern, binary=True))
        self._field, self._layout = field, ("parquet", field)
        self.size_bytes = None  # of the files, but the text is one of several columns, and compressed

    def _file_documents(self, path: DataFile) -> Iterator[str]:
        return _documents(path, self._field, "parquet", self._utf8, self._skip)


class SavedDataset(FileSource):
    """A dataset saved by `datasets.save_to_disk`; `argument` is `DIR[@SPLIT][#FIELD]`."""

    def __init__(self, spec: str, invalid_utf8: InvalidUtf8, argument: str) -> None:
        directory, split, field = split_saved(argument)
        super().__init__(spec, invalid_utf8, lambda: saved_files(directory, split))
        self._field = field or "text"
        self._layout = ("arrow", self._field)
        self.size_bytes = None

    def _file_documents(self, path: DataFile) -> Iterator[str]:
        return _documents(path, self._field, "arrow", self._utf8, self._skip)


class HubSource(Source):
    """Parquet files of a dataset on the Hugging Face Hub, downloaded one at a time while they are read."""

    def __init__(self, spec: str, invalid_utf8: InvalidUtf8) -> None:
        super().__init__(spec, invalid_utf8)
        self._given = hub.parse(spec)

    @functools.cached_property
    def _dataset(self) -> hub.HubDataset:
        return hub.resolved(self._given)

    def _content(self) -> list[Any]:
        # A commit names all content: a run that resumes with a prepared corpus needs no network.
        dataset = self._dataset
        return ["hf", dataset.repo, dataset.config, dataset.split, dataset.revision, dataset.field]

    def _documents(self) -> Iterator[str]:
        for path in hub.downloaded(self._dataset):
            try:
                yield from _documents(path, self._given.field or "text", "parquet", self._utf8, self._skip)
            except UserError as error:
                self._skip(error)


def split_saved(argument: str) -> tuple[Path, str | None, str | None]:
    """Splits `DIR[@SPLIT][#FIELD]`; a directory whose name has these characters is found as it is."""
    whole = Path(argument).expanduser()
    if whole.is_dir():
        return whole, None, None
    match = _SAVED_SPEC.fullmatch(argument)
    assert match is not None, argument
    directory = Path(match["directory"]).expanduser()
    if not directory.is_dir():
        raise UserError(f"arrow:{argument} names {directory}, which is not a directory")
    return directory, match["split"], match["field"]


def _documents(path: DataFile, field: str, kind: Kind, utf8: Utf8, skip: Callable[[UserError], None]) -> Iterator[str]:
    for number, raw in enumerate(column_values(path, field, kind)):
        place = f"row {number} of {path}"
        if raw is None:
            skip(UserError(f"{place}: column {field!r} is null; data.on_corrupt=skip leaves such rows out"))
        else:
            yield utf8.decode(raw, place)
