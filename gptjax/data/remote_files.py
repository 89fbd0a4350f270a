"""Files named by URLs, in buckets (gs://, s3://), on web servers (https://) and on the Hugging Face Hub (hf://).

They are read through fsspec, in order and without a copy on disk. Each protocol has its own ways to log in and its own
settings, such as AWS_ENDPOINT_URL and STORAGE_EMULATOR_HOST.
"""

import contextlib
import dataclasses
import io
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any, TypeAlias, cast

from absl import logging

from gptjax.bucket_client import check_credentials
from gptjax.config import UserError
from gptjax.data.packages import require_package

# protocol: (import name of the package that fsspec needs for it, how to get access)
_LOG_IN_TO_GOOGLE = "log in by `gcloud auth application-default login`, or set GOOGLE_APPLICATION_CREDENTIALS"
_PROTOCOLS = {
    "gs": ("gcsfs", _LOG_IN_TO_GOOGLE),
    "s3": ("s3fs", "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"),
    "https": ("aiohttp", "use a URL that needs no login, such as a signed one"),
    "http": ("aiohttp", "use a URL that needs no login, such as a signed one"),
    "hf": ("huggingface_hub", "set HF_TOKEN"),
}
_OR_NO = {
    "gs": " or bucket",
    "s3": " or bucket",
    "hf": " or dataset, or it is private: check the name, or set HF_TOKEN",
}
# Keys under which file systems report what changes with the content; hashes of the content first.
_VERSIONS = (
    *("md5Hash", "crc32c", "blob_id", "ETag", "etag", "Content-MD5", "Digest", "generation"),
    *("LastModified", "Last-Modified", "mtime"),
)
_BLOCK_BYTES = 2**23  # of a request; the next one is read ahead by a thread
_BLOCKS = 4  # in memory, of an open file
_CONNECTIONS = 8  # that ask for the states of files
_ATTEMPTS = 5  # to read a block, with exponentially growing pauses in between
_FIRST_PAUSE = 0.5  # seconds


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file named by a URL, with the part of the interface of `pathlib.Path` that readers of data use.

    Attributes:
      url: of the file.
      size: bytes; None: unknown.
      version: a value that changes with the content, such as its hash or the time of its last change; None: unknown.
    """

    url: str
    size: int | None
    version: str | None

    def __str__(self) -> str:
        return self.url

    def absolute(self) -> PurePosixPath:
        """Returns a path of the same components, such as /s3:/bucket/a.txt, without the query of a web address."""
        return PurePosixPath("/" + (self.url.partition("?")[0] if self.url.startswith("http") else self.url))

    @property
    def name(self) -> str:
        return self.absolute().name

    @property
    def suffix(self) -> str:
        return self.absolute().suffix

    @property
    def parent(self) -> PurePosixPath:
        return self.absolute().parent


DataFile: TypeAlias = Path | RemoteFile


class NoSuchFileError(UserError):
    """No file has the URL, or matches the pattern."""


def is_url(pattern: str) -> bool:
    """Whether a path or pattern is a URL."""
    return re.match("[a-z][a-z0-9+]*://", pattern) is not None


def matching_urls(pattern: str) -> list[RemoteFile]:
    """Returns the files that match a URL with wildcards, sorted.

    `**` descends into all folders. The address of a web server may have wildcards where it lists its folders; "?" is
    not a wildcard there.

    Raises:
      NoSuchFileError: no file matches.
      UserError: the server cannot be reached or refuses, or the package for the protocol is missing.
    """
    system, path = _file_system(pattern)
    is_pattern = bool(set("*[" if pattern.startswith("http") else "*?[") & set(path))
    with _reading(pattern):
        system.invalidate_cache()  # of listings, as a file may have been written since
        found = system.glob(path, detail=True) if is_pattern else {path: system.info(path)}
        files = [info for info in found.values() if info["type"] == "file"]
        if is_pattern and pattern.startswith("http"):  # whose lists are links, without sizes and versions
            with ThreadPoolExecutor(_CONNECTIONS) as pool:
                files = list(pool.map(system.info, [info["name"] for info in files]))
    if not files:
        if not found:
            raise NoSuchFileError(f"no file matches {pattern!r}")
        raise UserError(f"{pattern} is a directory: write {pattern.rstrip('/')}/** for the files in it")
    urls = {system.unstrip_protocol(info["name"]): info for info in files}
    return [RemoteFile(url, info.get("size"), _version(info)) for url, info in sorted(urls.items())]


def open_binary(file: DataFile) -> io.BufferedReader:
    """Opens a local or remote file for reading, which raises OSError if it fails; UserError if a package is missing."""
    if isinstance(file, Path):
        return open(file, "rb")
    return io.BufferedReader(_RemoteReader(file), 2**20)


def _version(info: dict[str, Any]) -> str | None:
    return next((f"{key} {info[key]}" for key in _VERSIONS if info.get(key)), None)


def _file_system(url: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a URL, and the path in it."""
    protocol = url.partition("://")[0]
    if protocol not in _PROTOCOLS:
        raise UserError(f"unknown protocol of {url}: known are {', '.join(f'{name}://' for name in _PROTOCOLS)}")
    require_package(_PROTOCOLS[protocol][0], "pip install -e '.[remote]'", url)
    if protocol == "gs":
        check_credentials()
    import fsspec

    options: dict[str, Any] = {}
    if protocol == "hf":  # huggingface_hub reads the variable at import, which may have been before it was set
        options["endpoint"] = os.environ.get("HF_ENDPOINT")
    elif protocol == "gs" and os.environ.get("STORAGE_EMULATOR_HOST"):
        options["token"] = "anon"  # gcsfs would ask the metadata server of Google's machines for credentials
    with _reading(url):
        return cast(tuple[Any, str], fsspec.core.url_to_fs(url, **options))


@contextlib.contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # every protocol has errors of its own
        kind = NoSuchFileError if _status(error) == 404 else UserError
        raise kind(f"cannot read {url}: {_reason(error, url)}") from None


class _RemoteReader(io.RawIOBase):
    """Reads a remote file, and resumes reading after a failed connection."""

    def __init__(self, file: RemoteFile) -> None:
        self._remote, self._position = file, 0
        self._system, self._path = _file_system(file.url)
        self._file: Any = None  # open at `_position`
        self._open()

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return getattr(self._file, "size", None) is not None

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._file.size}[whence]
        self._position = base + offset
        self._file.seek(self._position)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer: Any) -> int:
        content = self._persistently(lambda: self._file.read(len(buffer)))
        self._position += len(content)
        size = self._remote.size
        if not content and size is not None and self._position < size:
            raise OSError(f"it ended after {self._position:,} of {size:,} bytes: it was changed or cut off")
        buffer[: len(content)] = content
        return len(content)

    def close(self) -> None:
        if self._file is not None and not self.closed:
            with contextlib.suppress(Exception):
                self._file.close()
        super().close()

    def _open(self) -> None:
        self._persistently(lambda: None)

    def _persistently(self, read: Any) -> Any:
        """Returns the result of `read`, for which the file is opened again after an error that may be temporary."""
        for attempt in range(_ATTEMPTS):
            try:
                if self._file is None:
                    self._file = self._opened()
                return read()
            except Exception as error:
                reason = _reason(error, self._remote.url)
                with contextlib.suppress(Exception):
                    self._file.close()
                self._file = None
                if _status(error) is not None or attempt == _ATTEMPTS - 1:
                    raise OSError(reason) from None
                logging.warning("reading %s again from byte %d: %s", self._remote, self._position, reason)
                time.sleep(_FIRST_PAUSE * 2**attempt)
        raise AssertionError

    def _opened(self) -> Any:
        file = self._system.open(
            self._path,
            "rb",
            block_size=_BLOCK_BYTES,
            cache_type="background",
            cache_options={"maxblocks": _BLOCKS},
        )
        if self._position and getattr(file, "size", None) is not None:
            file.seek(self._position)
            return file
        skipped = 0
        while skipped < self._position and (chunk := file.read(min(2**20, self._position - skipped))):
            skipped += len(chunk)
        return file


def _status(error: BaseException) -> int | None:
    """Returns the HTTP status of an error that another attempt would meet again: 401, 403 or 404; otherwise None."""
    seen: BaseException | None = error
    while seen is not None:
        name = type(seen).__name__
        if name == "RepositoryNotFoundError":  # of the Hub, with the status 401, as it may be private
            return 404
        response = getattr(seen, "response", None)
        # Of aiohttp, gcsfs and huggingface_hub; `code` of aiohttp is deprecated.
        values = [getattr(seen, "status", None) or getattr(seen, "code", None), getattr(response, "status_code", None)]
        if isinstance(response, dict):  # botocore
            values.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
        for value in values:
            if str(value) in ("401", "403", "404"):
                return int(str(value))
        refused = isinstance(seen, PermissionError) or "Credential" in name or name == "ProfileNotFound"
        if refused or str(seen).startswith("Forbidden"):  # gcsfs has no error class of its own for it
            return 403
        if isinstance(seen, FileNotFoundError) and seen.__cause__ is None:
            return 404
        seen = seen.__cause__ or seen.__context__
    return None


def _reason(error: BaseException, url: str) -> str:
    """Describes an error of a file system in one line, with its fix where it is known."""
    status = _status(error)
    if status == 404:
        return "there is no such file" + _OR_NO.get(url.partition("://")[0], "")
    while isinstance(error, FileNotFoundError) and error.__cause__ is not None:  # of web servers: any error
        error = error.__cause__
    first = next(iter(str(error).splitlines()), "") or type(error).__name__
    if status is not None:
        return f"access was refused ({first[:120]}): {_PROTOCOLS[url.partition('://')[0]][1]}"
    return first
