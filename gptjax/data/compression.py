"""Opens files, decompressed where their names end in .gz, .zst, .bz2 or .xz."""

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
                    yield gzip.GzipFile(fileobj=file)
                case "zstd":
                    yield io.BufferedReader(_ZstdReader(file))
                case "bzip2":
                    yield bz2.BZ2File(file)
                case "xz":
                    yield lzma.LZMAFile(file)  # noqa: SIM115 (`file` is closed above)
                case _:
                    yield file
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise UserError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from None


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
