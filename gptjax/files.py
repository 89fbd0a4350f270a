"""Files that are whole whenever a process dies, and files that may be anybody's."""

import json
import os
import uuid
from pathlib import Path
from typing import Any


def write_whole(path: Path, content: str | bytes) -> None:
    """Writes a file that appears whole or not at all: where that fails (a full disk), an older one stays as it was."""
    temporary = unfinished_path(path)
    try:
        with temporary.open("wb") as file:
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


def is_plain_name(name: Any) -> bool:
    """Whether `name`, as a file that may be anybody's gives it, is that of a file beside it, and no way elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & {"/", "\\", "\0"}
