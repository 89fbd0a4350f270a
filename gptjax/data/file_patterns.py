"""Expands paths, URLs and glob patterns to files."""

import glob
import os
from collections.abc import Iterator
from pathlib import Path

from absl import logging

from gptjax.config import UserError
from gptjax.data.compression import check_name, compression
from gptjax.data.packages import require_package
from gptjax.data.remote_files import DataFile, is_url, matching_urls

_WILD = frozenset("*?")


def matching_files(pattern: str, *, binary: bool = False) -> list[DataFile]:
    """Returns the files that match a glob pattern, sorted; a pattern that begins as a URL as in `matching_urls`.

    `~` is the home directory. `**` descends into all folders except hidden ones, follows symbolic links, and visits
    each real folder once. Leading folders of the pattern, or all of it, are taken literally if they exist under that
    name, so that "runs[1]/a.txt" names that file; elsewhere "[[]" is a literal "[".

    Args:
      pattern: as above.
      binary: the files are not text, and so are not decompressed.

    Raises:
      UserError: no file matches, all are empty, or one cannot be read or is in an unsupported archive format.
    """
    files: list[DataFile] = [*(matching_urls(pattern) if is_url(pattern) else _matching_paths(pattern))]
    for file in files if not binary else ():
        check_name(file)
        if compression(file) == "zstd":
            require_package("zstandard", "pip install zstandard", str(file))
    if all((file.stat().st_size if isinstance(file, Path) else file.size) == 0 for file in files):
        raise UserError(f"{files[0]} is empty" + (", as are all other matching files" if len(files) > 1 else ""))
    return files


def _matching_paths(pattern: str) -> list[Path]:
    matches = [Path(match) for match in expand_pattern(pattern)]
    if not matches:
        raise UserError(f"no file matches {pattern!r}")
    paths = [path for path in matches if not path.is_dir()]
    if not paths:
        raise UserError(f"{matches[0]} is a directory: write {matches[0]}/**/*.txt for the files in it")
    for path in paths:
        if not os.access(path, os.R_OK):
            raise UserError(f"cannot read {path}: it is a broken link, or its permissions forbid it")
    return paths


def split_field(argument: str) -> tuple[str, str | None]:
    """Splits "GLOB#FIELD" at the last "#" that follows a matching pattern, as file names may contain "#"."""
    if is_url(argument):
        pattern, _, field = argument.partition("#")
        return pattern, field or None
    ends = [len(argument), *(i for i in range(len(argument) - 1, -1, -1) if argument[i] == "#")]
    for end in ends:
        if end and expand_pattern(argument[:end]):
            return argument[:end], argument[end + 1 :] or None
    pattern, _, field = argument.partition("#")
    return pattern, field or None


def expand_pattern(pattern: str) -> list[str]:
    """Returns the files and folders that match a pattern as in `matching_files`, sorted; may be empty."""
    pattern = os.path.expanduser(pattern)
    literal = ""
    parts = pattern.split("/")
    for end in range(len(parts), 0, -1):
        head = "/".join(parts[:end])
        if not _WILD & set(head) and os.path.lexists(head):
            literal, parts = head, parts[end:]
            break
    return sorted(set(_expand("/".join([glob.escape(literal), *parts]) if literal else pattern)))


def files_below(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Returns the files below a folder with the given suffixes (case-insensitive), sorted; traverses it like `**`."""
    found = (Path(path) for path in expand_pattern(f"{glob.escape(str(folder))}/**/*"))
    return [path for path in found if path.suffix.lower() in suffixes and path.is_file()]


def _expand(pattern: str) -> Iterator[str]:
    parts = pattern.split("/")
    if "**" not in parts:
        yield from glob.iglob(pattern)
        return
    at = parts.index("**")
    head, rest = "/".join(parts[:at]), "/".join(parts[at + 1 :]) or "*"
    tops = [""] if at == 0 else ["/"] if not head else [top for top in glob.iglob(head) if os.path.isdir(top)]
    for top in tops:
        for folder in _folders(top):
            yield from _expand(os.path.join(glob.escape(folder), rest))


def _folders(top: str) -> Iterator[str]:
    """Yields `top` and the folders below it, each real folder once, preferably by a path without symbolic links."""
    seen: set[str] = set()
    folders, links = [top], list[str]()
    while folders or links:
        folder = folders.pop() if folders else links.pop(0)
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        yield folder
        try:
            names = sorted(os.listdir(folder or "."))
        except OSError as error:
            logging.warning("skipped the folder %s: %s", folder, error.strerror)
            continue
        for name in names:
            path = os.path.join(folder, name)
            if not name.startswith(".") and os.path.isdir(path):
                (links if os.path.islink(path) else folders).append(path)
