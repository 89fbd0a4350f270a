"""Files read as they are, or decompressed: .gz and .zst."""

import contextlib
import gzip
import hashlib
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config import UserError


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The content of a file, decompressed; UserError, naming it, when reading fails at any point."""
    try:
        with open(path, "rb") as file:
            if path.suffix == ".gz":
                yield gzip.GzipFile(fileobj=file)
            elif path.suffix == ".zst":
                yield io.BufferedReader(_ZstdReader(file))
            else:
                yield file
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"cannot read {path}: {error}") from None


class _ZstdReader(io.RawIOBase):
    """Decompresses the zstd frames of a file. zstandard's own reader takes a file cut short for a whole one."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._compressed = b""  # read, but not yet given to a frame
        self._frame: Any = None  # the decompressor within a frame, None between frames
        self._text = memoryview(b"")  # decompressed, but not yet read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._text:
            chunk = self._compressed or self._file.read(1 << 16)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the zstd frame is cut short")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor().decompressobj()
            try:
                self._text = memoryview(self._frame.decompress(chunk))
            except zstandard.ZstdError as error:
                raise OSError(error) from None
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count


def file_digest(path: Path) -> str:
    """SHA-256 of a file as it is; UserError, naming it, when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from None


def file_state(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written to or replaced; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
