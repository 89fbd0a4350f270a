"""Opens local and remote files, decompressing those whose names end in .gz, .zst, .bz2 or .xz.

The sizes of lines, and of files that are read into memory as a whole, are limited.
"""

import bz2
import contextlib
import gzip
import hashlib
import io
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, cast

from gptjax.config import UserError
from gptjax.data.remote_files import DataFile, RemoteFile, open_binary

MAX_BYTES = 2**30  # of a line, or of a file read as a whole, after decompression; streamed corpora may be larger
_CHUNK = 512  # compressed bytes decompressed at once: zstd expands each to up to 32 KiB
_FORMATS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
# Archives, including the tar within a .tar.gz, are not text.
_UNSUPPORTED = (
    ".zip",
    ".7z",
    ".rar",
    ".tar",
    ".tgz",
    ".tbz2",
    ".txz",
    ".tzst",
    ".lz4",
    ".lzma",
    ".br",
    ".z",
)
_ZSTD_WINDOW = 128 * 2**20  # bytes: the limit of the zstd command, and zstandard's default


def compression(path: DataFile) -> str | None:
    """Returns the compression format of a file by its suffix (case-insensitive): gzip, zstd, bzip2, xz or None."""
    return _FORMATS.get(path.suffix.lower())


def base_name(name: str) -> str:
    """Removes the suffix of the compression from a file's name."""
    path = Path(name)
    return name if compression(path) is None else name[: -len(path.suffix)]


def check_name(path: DataFile) -> None:
    """Raises UserError for a file whose suffix is that of an unsupported format."""
    suffix = Path(base_name(path.name)).suffix.lower()
    if suffix in _UNSUPPORTED:
        raise UserError(
            f"{path} is a {suffix} file, which is not supported: unpack it; supported are text and "
            f"{', '.join(_FORMATS)}"
        )
    if suffix == ".parquet":
        raise UserError(f"{path} is a .parquet file, not text: write parquet:{path}")


@contextlib.contextmanager
def opened(path: DataFile) -> Iterator[io.BufferedIOBase]:
    """Opens a file for reading, decompressed according to its suffix.

    Raises:
      UserError: the file cannot be read at any point, or its suffix is that of an unsupported format.
    """
    check_name(path)
    try:
        with open_binary(path) as file:
            match compression(path):
                case "gzip":
                    yield LimitedReader(gzip.GzipFile(fileobj=file))
                case "zstd":
                    yield LimitedReader(_ZstdReader(file))
                case "bzip2":
                    yield LimitedReader(bz2.BZ2File(file))
                case "xz":
                    yield LimitedReader(lzma.LZMAFile(cast(IO[bytes], file)))  # noqa: SIM115 (`file` is closed above)
                case _:
                    yield LimitedReader(file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


class LimitedReader(io.BufferedReader):
    """Buffered reader that raises OSError when a line or the whole content exceeds MAX_BYTES (a decompression bomb).

    Args:
      raw: a readable binary stream.
    """

    def __init__(self, raw: Any) -> None:
        super().__init__(raw, 1 << 16)

    def readline(self, size: int | None = -1) -> bytes:  # also called by iteration
        if size is not None and size >= 0:
            return super().readline(size)
        line = super().readline(MAX_BYTES + 1)
        if len(line) > MAX_BYTES:
            raise OSError(f"it has a line of more than {MAX_BYTES:,} bytes")
        return line

    def read(self, size: int | None = -1) -> bytes:
        if size is not None and size >= 0:
            return super().read(size)
        content = bytearray()
        while chunk := super().read(1 << 20):
            content += chunk
            if len(content) > MAX_BYTES:
                raise OSError(f"it has more than {MAX_BYTES:,} bytes, but is read as a whole: split it")
        return bytes(content)


class _ZstdReader(io.RawIOBase):
    """Decompresses the zstd frames of a file. zstandard's own reader does not detect truncated files."""

    def __init__(self, file: io.BufferedIOBase) -> None:
        self._file = file
        self._compressed = b""  # read, but not yet passed to a frame
        self._frame: Any = None  # decompressor of the current frame, None between frames
        self._text = memoryview(b"")  # decompressed, but not yet returned

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._text:
            chunk = self._compressed or self._file.read(_CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the zstd frame is truncated")
                return 0
            if self._frame is None:
                self._frame = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW).decompressobj()
            try:
                self._text = memoryview(self._frame.decompress(chunk))
            except zstandard.ZstdError as error:
                if "too much memory" in str(error):
                    raise OSError(
                        f"its zstd window is larger than the limit of {_ZSTD_WINDOW // 2**20} MiB: "
                        "compress it again with --long=27 or less"
                    ) from None
                raise OSError(error) from None
            self._compressed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        count = min(len(buffer), len(self._text))
        buffer[:count] = self._text[:count]
        self._text = self._text[count:]
        return count


def file_digest(path: DataFile) -> str:
    """Returns the SHA-256 of a file's bytes, in hex; raises UserError if it cannot be read.

    A remote file with a known version is not read: the digest is that of its size and version.
    """
    if isinstance(path, RemoteFile) and path.version is not None:
        return hashlib.sha256(f"{path.size} {path.version}".encode()).hexdigest()
    try:
        with open_binary(path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def file_state(path: Path) -> tuple[int, ...] | None:
    """Returns size, modification time and inode, which change when a file is written or replaced; None if missing."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
