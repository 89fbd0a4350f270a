"""Files that are whole whenever a process dies, and names of files that stay in their directory."""

import os
import uuid
from pathlib import Path


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
