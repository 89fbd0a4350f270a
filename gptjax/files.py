"""Atomic writes, and reads of untrusted files with limited sizes, on local file systems and in buckets.

A path in a bucket (`gptjax/object_store.py`) has the methods of `pathlib.Path`. Operations that differ there are
functions of this module, so that their callers need not ask where a path leads.
"""

import errno
import hashlib
import io
import json
import os
import re
import shutil
import stat
import tempfile
import uuid
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import numpy.typing as npt

from gptjax.bucket_client import COMMIT_FILE
from gptjax.object_store import AppendedObject, BucketPath, bucket_path

_URL = re.compile("[a-z][a-z0-9+.-]*://")
MAX_JSON_BYTES = 100_000_000  # size of a JSON file; safetensors limits its header to the same
MAX_ARRAYS_BYTES = 4 * 2**30  # size of the arrays of an .npz file, decompressed


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: if writing fails (a full disk), an existing file is left unchanged.

    The new file keeps the permissions of the file that it replaces. A symbolic link is replaced, not followed.
    """
    if is_in_bucket(path):
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return
    temporary = unfinished_path(path)
    try:
        with temporary.open("wb") as file:
            if path.is_file() and not path.is_symlink():
                os.fchmod(file.fileno(), stat.S_IMODE(path.stat().st_mode))
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_arrays(path: Path, arrays: dict[str, npt.NDArray[Any]]) -> None:
    """Writes an .npz file and the entry of its directory to the disk, whole or not at all; OSError when that fails."""
    if is_in_bucket(path):
        np.savez(content := io.BytesIO(), **arrays)  # type: ignore[arg-type]
        path.write_bytes(content.getvalue())
        return
    with (part := path.with_suffix(".part")).open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)
    directory = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(directory)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # file systems without directories, such as gcsfuse's
            raise
    finally:
        os.close(directory)


class AppendedFile:
    """A file that grows, of which every write is on disk; opened by `append_to`."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")

    def write(self, text: str) -> None:
        self._file.write(text)
        self._file.flush()

    def sync(self) -> None:
        """Flushes to the disk, so that the text survives a power failure."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def append_to(path: Path) -> AppendedFile | AppendedObject:
    """Opens a text file to append to it; in a bucket it is uploaded every half minute, by `sync` and by `close`."""
    return AppendedObject(cast(BucketPath, path)) if is_in_bucket(path) else AppendedFile(path)


@contextmanager
def written_locally(directory: Path) -> Iterator[Path]:
    """Yields a directory for a library that writes to disks: `directory`, or one that is uploaded to it at the end."""
    if not is_in_bucket(directory):
        directory.mkdir(parents=True, exist_ok=True)
        yield directory
        return
    with tempfile.TemporaryDirectory(prefix="gptjax-") as temporary:
        yield Path(temporary)
        upload(Path(temporary), directory)


def upload(source: Path, directory: Path) -> None:
    """Copies the files below a local directory to a bucket."""
    for path in sorted(source.rglob("*")):
        if path.is_file():
            upload_file(path, directory / path.relative_to(source).as_posix())


def upload_file(source: Path, target: Path) -> None:
    cast(BucketPath, target).upload(source)


def download_file(source: Path, target: Path) -> None:
    cast(BucketPath, source).download(target)


def unfinished_path(path: Path) -> Path:
    """Returns a unique temporary path in the directory of `path`, to be renamed to `path` when it is complete."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}")


def unfinished_name(path: Path) -> str | None:
    """Returns the name that a path from `unfinished_path` was to be renamed to; None: it is no such path."""
    match = re.fullmatch(r"\.(.+)-[0-9a-f]{32}", path.name)
    return None if match is None else match[1]


def read_json(path: Path) -> Any:
    """Reads a JSON file of up to MAX_JSON_BYTES; raises OSError or ValueError if it cannot be read."""
    try:
        return json.loads(read_bytes(path, MAX_JSON_BYTES))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Reads a regular file; raises OSError if it cannot be read, ValueError if it is larger than `max_bytes`."""
    check_size(path, max_bytes)
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)  # bounded, as the file may have grown since it was checked
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return content


def check_size(path: Path, max_bytes: int) -> None:
    """Raises OSError if `path` is not a regular file (a pipe would never end), ValueError if it is too large."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is not a regular file")
    if found.st_size > max_bytes:
        raise ValueError(f"it has {found.st_size:,} bytes, more than {max_bytes:,}")


def read_arrays(file: Path | IO[bytes], max_bytes: int = MAX_ARRAYS_BYTES) -> dict[str, npt.NDArray[Any]]:
    """Reads the arrays of an .npz file; pickled arrays are refused.

    Args:
      file: its path, or the open file.

    Raises:
      ValueError: the file is damaged, has pickled arrays, or has more than `max_bytes` of arrays when decompressed.
      OSError: the file cannot be read.
    """
    try:
        if is_in_bucket(file):
            file = io.BytesIO(read_bytes(cast(Path, file), max_bytes + MAX_JSON_BYTES))
        with zipfile.ZipFile(file) as archive:  # decompresses no member beyond the size stated in the archive
            size = sum(member.file_size for member in archive.infolist())
            if size > max_bytes:
                raise ValueError(f"its arrays have {size:,} bytes, more than {max_bytes:,}")
            # numpy stops reading at the end of an array, before a checksum is compared where a damaged archive says
            # that more follows.
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"its array {damaged.removesuffix('.npy')} does not match its checksum")
        if not isinstance(file, Path):
            file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError):
        raise
    except Exception as error:  # damaged zip files raise many types of errors, and a wrong shape a MemoryError
        raise ValueError(f"it is damaged: {error}") from None


def expand(path: str) -> Path:
    """Expands `~` in a path given by a user; a URL such as gs://bucket/run is a path in a bucket.

    Every command reads its path flags with this function, and every path in a config is opened by it.

    Raises:
      UserError: a URL of another kind than gs://, or its package is not installed.
    """
    if _URL.match(path):
        return cast(Path, bucket_path(path))
    return Path(os.path.expanduser(path))


def followed(path: Path) -> Path:
    """Returns the target of symbolic links, as an absolute path."""
    return path if is_in_bucket(path) else Path(os.path.realpath(path))


def is_in_bucket(path: Any) -> bool:
    """Whether a path leads to a bucket, where files are objects."""
    return isinstance(path, BucketPath)


def local_directory(path: Path) -> Path:
    """Returns `path`; for one in a bucket, the directory of this machine's copies of what is in it."""
    if not is_in_bucket(path):
        return path
    name = hashlib.sha256(str(path).encode()).hexdigest()[:16]
    return Path("~/.cache/gptjax/buckets").expanduser() / name


def is_whole(directory: Path) -> bool:
    """Whether a directory that Orbax wrote is complete: a disk has no others, a bucket states it by an object."""
    return not is_in_bucket(directory) or (directory / COMMIT_FILE).exists()


def free_bytes(directory: Path) -> float:
    """Returns the free space of a directory; FileNotFoundError if it does not exist. Buckets have no limit."""
    return float("inf") if is_in_bucket(directory) else shutil.disk_usage(directory).free


def remove_tree(directory: Path) -> None:
    """Removes a directory if it exists; errors are ignored."""
    if is_in_bucket(directory):
        with suppress(OSError):
            cast(BucketPath, directory).rmtree(missing_ok=True)
    else:
        shutil.rmtree(directory, ignore_errors=True)


def is_plain_name(name: Any) -> bool:
    """Whether `name`, read from an untrusted file, is a plain file name that cannot lead to another directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
