"""Opens files, decompressed where their names end in .gz, .zst, .bz2 or .xz.

What is read whole, a line or a file, has a limited size.
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
from typing import Any

from gptjax.config import UserError

MAX_BYTES = 2**30  # of a line, or of a file that is read whole, after decompression; corpora may be larger
_CHUNK = 512  # compressed bytes that are decompressed at once: zstd makes up to 32 KiB of each
_FORMATS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bzip2", ".xz": "xz"}
# Read as text, an archive is noise, and so is the tar within a .tar.gz.
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
    ".parquet",
)
_ZSTD_WINDOW = 128 * 2**20  # bytes: the limit of zstd's own command, and zstandard's default


def compression(path: Path) -> str | None:
    """The compression format that a file's name states, in any case: gzip, zstd, bzip2 or xz; None: it has none."""
    return _FORMATS.get(path.suffix.lower())


def base_name(name: str) -> str:
    """A file's name without the suffix of its compression."""
    path = Path(name)
    return name if compression(path) is None else name[: -len(path.suffix)]


def check_name(path: Path) -> None:
    """Raises UserError for a file whose name states a format that is not supported."""
    suffix = Path(base_name(path.name)).suffix.lower()
    if suffix in _UNSUPPORTED:
        raise UserError(
            f"{path} is a {suffix} file, which is not read: unpack it; read are text and {', '.join(_FORMATS)}"
        )


@contextlib.contextmanager
def opened(path: Path) -> Iterator[io.BufferedIOBase]:
    """The content of a file, decompressed by its name.

    Raises:
      UserError: reading fails at any point, or the name states an unsupported format; it names the file.
    """
    check_name(path)
    try:
        with open(path, "rb") as file:
            match compression(path):
                case "gzip":
                    yield LimitedReader(gzip.GzipFile(fileobj=file))
                case "zstd":
                    yield LimitedReader(_ZstdReader(file))
                case "bzip2":
                    yield LimitedReader(bz2.BZ2File(file))
                case "xz":
                    yield LimitedReader(lzma.LZMAFile(file))  # noqa: SIM115 (`file` is closed above)
                case _:
                    yield LimitedReader(file)
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


class LimitedReader(io.BufferedReader):
    """A buffered reader whose lines and whole content have up to MAX_BYTES; OSError beyond, as of a decompression bomb.

    Args:
      raw: a readable binary stream.
    """

    def __init__(self, raw: Any) -> None:
        super().__init__(raw, 1 << 16)

    def readline(self, size: int | None = -1) -> bytes:  # which iteration calls, too
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
                raise OSError(f"it has more than {MAX_BYTES:,} bytes, and is read whole: split it")
        return bytes(content)


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
            chunk = self._compressed or self._file.read(_CHUNK)
            if not chunk:
                if self._frame is not None:
                    raise EOFError("the zstd frame is cut short")
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


def file_digest(path: Path) -> str:
    """SHA-256 of a file as it is; UserError, naming it, when it cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


def file_state(path: Path) -> tuple[int, ...] | None:
    """Size, time and inode, which change when a file is written to or replaced; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_size, stat.st_mtime_ns, stat.st_ino
