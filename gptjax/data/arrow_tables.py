"""Reads tables of Apache Arrow, row by row: Parquet files, and datasets saved by `datasets.save_to_disk`.

Both are read in batches of rows, so that memory is bounded by the largest batch that was written, not by the file.
"""

import contextlib
import io
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from gptjax.config import UserError
from gptjax.data.remote_files import DataFile, open_binary
from gptjax.data.text_files import Utf8
from gptjax.files import read_json

Kind = Literal["parquet", "arrow"]

_ROWS = 128  # decoded at a time
_BUFFER_BYTES = 2**20  # of a column that is being read
_END_OF_STREAM = b"\xff\xff\xff\xff\x00\x00\x00\x00"  # Arrow specification, section "IPC Streaming Format"


def column_values(path: DataFile, field: str, kind: Kind = "parquet") -> Iterator[bytes | None]:
    """Yields the values of a column of text or bytes, undecoded; None where there is none.

    Raises:
      UserError: the file is damaged or truncated, or has no such column, or one of another type.
    """
    import pyarrow as pa

    with _opened(path, kind) as (schema, batches):
        if field not in schema.names:
            raise UserError(f"{path} has no column {field!r}: choose one with #FIELD: {', '.join(schema.names)}")
        type_ = schema.field(field).type
        values = type_.value_type if pa.types.is_dictionary(type_) else type_
        texts = (pa.string(), pa.large_string(), pa.string_view(), pa.binary(), pa.large_binary(), pa.binary_view())
        if values not in texts:
            raise UserError(f"{path}: column {field!r} is not text but {type_}: choose another with #FIELD")
        for batch in batches([field]):
            yield from batch.column(field).cast(values).cast(pa.large_binary()).to_pylist()


def rows(
    path: DataFile, utf8: Utf8, unlabelled: object, kind: Kind = "parquet"
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yields (row, place) for each row, as plain Python values by column; a place is "row 17 of reviews.parquet".

    Args:
      utf8: decodes texts with bytes that are not UTF-8.
      unlabelled: the value of a missing class label, and of a list with one.
      kind: of the file.

    Classes that the `datasets` library has declared in the file's metadata are read as their names.

    Raises:
      UserError: the file is damaged or truncated, or has a class without a name.
    """
    with _opened(path, kind) as (schema, batches):
        features = _features(schema)
        number = 0
        for batch in batches(None):
            try:
                found = batch.to_pylist()
            except UnicodeDecodeError:
                columns = {name: batch.column(name) for name in batch.schema.names}
                found = [
                    {name: _decoded(column[i], utf8, f"row {number + i} of {path}") for name, column in columns.items()}
                    for i in range(len(batch))
                ]
            for row in found:
                place = f"row {number} of {path}"
                yield {name: _named(features.get(name), row[name], unlabelled, place) for name in row}, place
                number += 1


@contextlib.contextmanager
def _opened(path: DataFile, kind: Kind) -> Iterator[tuple[Any, Callable[[list[str] | None], Iterator[Any]]]]:
    """Opens a table; yields its schema, and a function (columns, or None for all) -> record batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with open_binary(path) as file:
            if not file.seekable():
                raise UserError(f"cannot read {path}: its server does not send parts of files: download it")
            if kind == "parquet":
                table = pq.ParquetFile(
                    file, buffer_size=_BUFFER_BYTES, pre_buffer=False, page_checksum_verification=True
                )
                yield table.schema_arrow, lambda columns: table.iter_batches(_ROWS, columns=columns, use_threads=False)
            else:
                _check_end(file, path)
                stream = pa.ipc.open_stream(file)
                yield stream.schema, lambda columns: _slices(stream, columns)
    except (pa.ArrowException, OSError, EOFError, ValueError, OverflowError, MemoryError) as error:  # of damaged files
        reason = next(iter(str(error).splitlines()), "") or type(error).__name__
        form = {"parquet": "a whole Parquet file", "arrow": "a whole Arrow stream"}[kind]
        cause = f"it is not {form}: {reason.rstrip('.')}: replace it by an undamaged copy"
        if isinstance(error, OSError) and error.errno:
            cause = reason
        raise UserError(f"cannot read {path}: {cause}") from None


def _check_end(file: io.BufferedIOBase, path: DataFile) -> None:
    """Raises UserError for a truncated stream, which pyarrow reads without an error up to the last whole batch."""
    size = file.seek(0, io.SEEK_END)
    file.seek(max(0, size - len(_END_OF_STREAM)))
    if file.read() != _END_OF_STREAM:
        raise UserError(f"cannot read {path}: it is not a whole Arrow stream: its end is missing: copy it again")
    file.seek(0)


def _slices(stream: Any, columns: list[str] | None) -> Iterator[Any]:
    for batch in stream:
        chosen = batch if columns is None else batch.select(columns)
        chosen.validate(full=True)  # the stream is the memory of the arrays, where damage could point anywhere
        for start in range(0, len(chosen), _ROWS):
            yield chosen.slice(start, _ROWS)


# --- values as `datasets` declares them -------------------------------------------------------------------------------


def _features(schema: Any) -> dict[str, Any]:
    """Returns the features that the `datasets` library has declared; {} for files of other programs."""
    with contextlib.suppress(ValueError, KeyError, TypeError):
        found = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return found if isinstance(found, dict) else {}
    return {}


def _named(feature: Any, value: Any, unlabelled: object, place: str) -> Any:
    """Replaces classes in a value by their names."""
    if isinstance(feature, list) and len(feature) == 1:
        feature = {"_type": "List", "feature": feature[0]}
    if not isinstance(feature, dict) or not feature:
        return value
    kind = feature.get("_type")
    if kind == "ClassLabel" and isinstance(names := feature.get("names"), list):
        if value is None or value == -1:
            return unlabelled
        if not (isinstance(value, int) and 0 <= value < len(names)):
            raise UserError(f"{place} has the class {value}, but only {len(names)} classes have names")
        return names[value]
    if kind in ("Sequence", "List", "LargeList"):
        inner = feature.get("feature")
        if isinstance(value, dict) and isinstance(inner, dict):  # a sequence of dicts is stored as a dict of lists
            lists = {name: {"_type": "List", "feature": part} for name, part in inner.items()}
            return {name: _named(lists.get(name), part, unlabelled, place) for name, part in value.items()}
        if isinstance(value, list):
            parts = [_named(inner, part, unlabelled, place) for part in value]
            return unlabelled if any(part is unlabelled for part in parts) else parts
    if not isinstance(kind, str) and isinstance(value, dict):
        return {name: _named(feature.get(name), part, unlabelled, place) for name, part in value.items()}
    return value


def _decoded(scalar: Any, utf8: Utf8, place: str) -> Any:
    """Converts an Arrow scalar to a Python value, where texts may have bytes that are not UTF-8."""
    import pyarrow as pa

    if not scalar.is_valid:
        return None
    if isinstance(scalar, pa.StructScalar):
        return {name: _decoded(scalar[name], utf8, place) for name in scalar}
    if isinstance(scalar, pa.ListScalar):
        return [_decoded(part, utf8, place) for part in scalar.values]
    if pa.types.is_string(scalar.type) or pa.types.is_large_string(scalar.type):
        return utf8.decode(scalar.as_buffer().to_pybytes(), place)
    return scalar.as_py()


# --- datasets saved by `datasets.save_to_disk` ------------------------------------------------------------------------


def saved_files(directory: Path, split: str | None) -> list[DataFile]:
    """Returns the files of a dataset saved by `datasets.save_to_disk`, in its order.

    Args:
      directory: that `save_to_disk` wrote.
      split: of a DatasetDict; None: train.

    Raises:
      UserError: the directory was not written by `save_to_disk` or is not whole, or there is no such split.
    """
    splits = _texts(_json(directory / "dataset_dict.json").get("splits"))
    if splits:
        name = split or "train"
        if name not in splits:
            raise UserError(f"{directory} has no split {name!r}: choose one with @SPLIT: {', '.join(splits)}")
        directory = directory / name
    elif split is not None:
        raise UserError(f"{directory} has no splits: remove @{split}")
    entries = _json(directory / "state.json").get("_data_files")
    names = _texts([entry.get("filename") for entry in entries if isinstance(entry, dict)] if entries else None)
    if not names:
        raise UserError(
            f"{directory} is not a dataset saved by datasets.save_to_disk: it has no state.json that names files"
        )
    missing = [name for name in names if Path(name).name != name or not (directory / name).is_file()]
    if missing:
        raise UserError(f"{directory} lacks the file {missing[0]}, which its state.json names: copy it again")
    return [directory / name for name in names]


def _texts(value: Any) -> list[str]:
    """Returns the texts of a list from an untrusted file."""
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def _json(path: Path) -> dict[str, Any]:
    """Returns the JSON object of a file, {} if there is none."""
    try:
        found = read_json(path)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return found if isinstance(found, dict) else {}
