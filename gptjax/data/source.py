"""`Source`, the documents of a corpus in a fixed order, and `FileSource`, those of files."""

import abc
import concurrent.futures
import copy
import functools
import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar

import numpy as np
import numpy.typing as npt
from absl import logging

from gptjax.config import UserError
from gptjax.data.compression import compression, file_digest, file_state
from gptjax.data.remote_files import DataFile, RemoteFile
from gptjax.data.text_files import InvalidUtf8, Utf8
from gptjax.data.tokenizers import Tokenizer

MAX_LOGGED = 10  # skipped files, lines and records that are logged; further ones are only counted

OnCorrupt = Literal["error", "skip"]
Document: TypeAlias = str | npt.NDArray[np.int32]  # a text, or its token ids
D = TypeVar("D", bound=Document)


class Source(abc.ABC):
    """Documents in a fixed order.

    Attributes:
      spec: the argument of `open_source`.
      size_bytes: size of the text (for jsonl with its JSON syntax), for a progress bar; None if it is not known without
        reading, as for compressed files.
      replaced_bytes: bytes that are not UTF-8, replaced so far by the latest call of `documents`.
      replaced_documents: documents with such bytes.
      skipped: files, lines and examples skipped so far by the latest call of `documents`.
      on_corrupt: see `open_source`.
    """

    size_bytes: int | None = None
    on_corrupt: OnCorrupt = "error"
    skipped, _may_be_empty = 0, False

    def __init__(self, spec: str, invalid_utf8: InvalidUtf8) -> None:
        self.spec = spec
        self._invalid_utf8 = invalid_utf8
        self._utf8 = self._new_utf8()

    def _new_utf8(self) -> Utf8:
        return Utf8(self._invalid_utf8, "data.invalid_utf8=replace")

    @property
    def replaced_bytes(self) -> int:
        return self._utf8.replaced_bytes

    @property
    def replaced_documents(self) -> int:
        return self._utf8.replaced_texts

    def fingerprint(self) -> str:
        """Returns a hash of the content, 64 hex digits. Reads all files once; of tensorflow-datasets only metadata.

        Raises:
          UserError: the content cannot be read.
        """
        return self._fingerprint

    @functools.cached_property
    def _fingerprint(self) -> str:
        # A cached corpus with replaced bytes must not be used where such bytes are an error.
        return _hash([self._content(), self._invalid_utf8, *(["skip"] if self.on_corrupt == "skip" else [])])

    @abc.abstractmethod
    def _content(self) -> list[Any]:
        """Returns everything that determines the documents, as JSON values."""

    def _changed(self) -> DataFile | None:
        """Returns a file whose content has changed since `_content` read it; None if there is none or it is unknown."""
        return None

    def documents(self) -> Iterator[str]:
        """Yields the documents, one in memory at a time, without those that are empty or only white space.

        Raises:
          UserError: a file or record is damaged or lacks the field, bytes are not UTF-8 and the policy is "error", or
            there are no documents; or, at the end, the content has changed since `fingerprint` was computed.
        """
        yield from self._checked(self._documents())

    def documents_for(self, tokenizer: Tokenizer) -> Iterator[Document]:
        """Yields the documents as `documents` does; as token ids where the source has those instead of text.

        Args:
          tokenizer: that made the token ids, which must be in its vocabulary.
        """
        yield from self.documents()

    def _checked(self, documents: Iterator[D]) -> Iterator[D]:
        self._utf8, self.skipped = self._new_utf8(), 0
        empty = True
        for document in documents:
            if len(document) and not (isinstance(document, str) and document.isspace()):
                empty = False
                yield document
        self.check_unchanged()
        if empty and not self._may_be_empty:
            damaged = f", and {self.skipped} were skipped as damaged" if self.skipped else ""
            raise UserError(f"source {self.spec} has no text: all its documents are empty{damaged}")

    def check_unchanged(self) -> None:
        """Raises UserError if the content has changed since `fingerprint` was computed, as far as that is known."""
        if "_fingerprint" in self.__dict__ and (changed := self._changed()) is not None:
            raise UserError(f"{changed} was changed while it was read: run the same command again")

    def divide(self, size: int) -> "list[Source]":
        """Returns sources of about `size` bytes of consecutive files, which may lack text; without files, this one."""
        return [self]

    @abc.abstractmethod
    def _documents(self) -> Iterator[str]: ...

    def _skip(self, error: UserError) -> None:
        """Counts and logs a skipped item; raises `error` unless on_corrupt is "skip"."""
        if self.on_corrupt == "error":
            raise error
        self.skipped += 1
        if self.skipped <= MAX_LOGGED:
            logging.warning("skipped: %s", error)


class FileSource(Source):
    """Files in sorted order.

    Args:
      spec, invalid_utf8: see `open_source`.
      find: returns the files.
    """

    _layout: tuple[str | None, ...]  # the options that, together with the files' bytes, determine the documents
    # State and digest of each local file when the fingerprint was computed.
    _found: list[tuple[DataFile, tuple[int, ...] | None, str]]

    def __init__(self, spec: str, invalid_utf8: InvalidUtf8, find: Callable[[], Sequence[DataFile]]) -> None:
        super().__init__(spec, invalid_utf8)
        self._find, self._paths = find, find()
        sizes = [_size(path) for path in self._paths]
        known = [size for size in sizes if size is not None]
        if all(compression(path) is None for path in self._paths) and len(known) == len(sizes):
            self.size_bytes = sum(known)

    def _content(self) -> list[Any]:
        # Names are relative, so that a corpus keeps its fingerprint when its folder is moved.
        root = os.path.commonpath([path.absolute().parent for path in self._paths])
        names = [os.path.relpath(path.absolute(), root) for path in self._paths]
        states = [file_state(path) if isinstance(path, Path) else None for path in self._paths]
        with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
            digests = list(pool.map(self._digest, self._paths))
        self._found = list(zip(self._paths, states, digests, strict=True))
        return [self._layout, names, digests]

    def _changed(self) -> DataFile | None:
        if any(isinstance(path, RemoteFile) for path in self._paths):
            now = set(self._find())  # with their versions
            return next((path for path in self._paths if path not in now), None)
        # The digest is compared too, as the modification time alone may change.
        changed = (
            path
            for path, state, digest in self._found
            if isinstance(path, Path) and file_state(path) != state and self._digest(path) != digest
        )
        return next(changed, None)

    def divide(self, size: int) -> list[Source]:
        starts = itertools.accumulate((_size(path) or 0 for path in self._paths), initial=0)
        groups = itertools.groupby(zip(starts, self._paths, strict=False), lambda pair: pair[0] // size)
        return [self._only([path for _, path in group]) for _, group in groups]

    def _only(self, paths: list[DataFile]) -> Source:
        source = copy.copy(self)
        source.__dict__.pop("_fingerprint", None)
        source._paths, source._may_be_empty = paths, True
        return source

    def _digest(self, path: DataFile) -> str:
        try:
            return file_digest(path)
        except UserError:
            if self.on_corrupt == "error":
                raise
            return "unreadable"

    def _documents(self) -> Iterator[str]:
        for path in self._paths:
            try:
                yield from self._file_documents(path)
            except UserError as error:
                self._skip(error)

    @abc.abstractmethod
    def _file_documents(self, path: DataFile) -> Iterator[str]: ...


def _size(path: DataFile) -> int | None:
    return path.size if isinstance(path, RemoteFile) else path.stat().st_size


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()
