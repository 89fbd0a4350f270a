"""Files that are whole whenever a process dies, and files that may be anybody's."""

import json
import os
import stat
import uuid
from pathlib import Path
from typing import Any

from gptjax.config import UserError


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
    """What a JSON file holds; OSError or ValueError when it cannot be read, whatever is in it."""
    try:
        return json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def expand(path: str) -> Path:
    """A path that a user gives, with `~` as the home directory. Every command reads its path flags by this."""
    return Path(os.path.expanduser(path))


def output_file(flag: str, path: str) -> Path:
    """The file that a flag names for output, symbolic links resolved, so that one is written through.

    Raises:
      UserError: it is a directory.
    """
    real = Path(os.path.realpath(expand(path)))
    if real.is_dir():
        raise UserError(f"--{flag}={path} is a directory: name a file in it")
    return real


def is_plain_name(name: Any) -> bool:
    """Whether `name`, as a file that may be anybody's gives it, is that of a file beside it, and no way elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
