"""Files that are whole whenever a process dies, and files that may be a stranger's, whose sizes are limited."""

import json
import os
import stat
import uuid
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

MAX_JSON_BYTES = 100_000_000  # of a JSON file, as of the header of a safetensors file
MAX_ARRAYS_BYTES = 4 * 2**30  # of the arrays of an .npz file, decompressed


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all: where that fails (a full disk), an older one stays as it was.

    The new file has the permissions of the one that it replaces. A symbolic link is replaced, not followed.
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
    """A name beside `path` that no other process uses, to be renamed to it when what it names is whole."""
    return path.with_name(f".{path.name}-{uuid.uuid4().hex}")


def read_json(path: Path) -> Any:
    """The value of a JSON file of up to MAX_JSON_BYTES; OSError or ValueError when it cannot be read."""
    try:
        return json.loads(read_bytes(path, MAX_JSON_BYTES))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """The content of a regular file; OSError when it cannot be read, ValueError when it is larger than `max_bytes`."""
    check_size(path, max_bytes)
    with path.open("rb") as file:
        content = file.read(max_bytes + 1)  # no more, should it have grown
    if len(content) > max_bytes:
        raise ValueError(f"it has more than {max_bytes:,} bytes")
    return content


def check_size(path: Path, max_bytes: int) -> None:
    """Raises OSError when `path` is no regular file (a pipe would never end), ValueError when it is too large."""
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path} is not a regular file")
    if found.st_size > max_bytes:
        raise ValueError(f"it has {found.st_size:,} bytes, more than {max_bytes:,}")


def read_arrays(path: Path, max_bytes: int = MAX_ARRAYS_BYTES) -> dict[str, npt.NDArray[Any]]:
    """The arrays of an .npz file; none of them may be pickled.

    Raises:
      ValueError: it is damaged, has pickled arrays, or they have more than `max_bytes` in all when decompressed.
      OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # which decompresses no member beyond the size that is given here
            size = sum(member.file_size for member in archive.infolist())
        if size > max_bytes:
            raise ValueError(f"its arrays have {size:,} bytes, more than {max_bytes:,}")
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError):
        raise
    except Exception as error:  # a damaged zip file raises one of many kinds, and a false shape a MemoryError
        raise ValueError(f"it is damaged: {error}") from None


def expand(path: str) -> Path:
    """A path that a user gives, with `~` as the home directory. Every command reads its path flags by this."""
    return Path(os.path.expanduser(path))


def is_plain_name(name: Any) -> bool:
    """Whether `name`, as a file that may be anybody's gives it, is that of a file beside it, and no way elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
