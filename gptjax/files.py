"""Atomic writes, and reads of untrusted files with limited sizes."""

import json
import os
import stat
import uuid
import zipfile
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

MAX_JSON_BYTES = 100_000_000  # size of a JSON file; safetensors limits its header to the same
MAX_ARRAYS_BYTES = 4 * 2**30  # size of the arrays of an .npz file, decompressed


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file atomically: if writing fails (a full disk), an existing file is left unchanged.

    The new file keeps the permissions of the file that it replaces. A symbolic link is replaced, not followed.
    """
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


def unfinished_path(path: Path) -> Path:
    """Returns a unique temporary path in the directory of `path`, to be renamed to `path` when it is complete."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}")


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
    """Expands `~` in a path given by a user. Every command reads its path flags with this function."""
    return Path(os.path.expanduser(path))


def is_plain_name(name: Any) -> bool:
    """Whether `name`, read from an untrusted file, is a plain file name that cannot lead to another directory."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
