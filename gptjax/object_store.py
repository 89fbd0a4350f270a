"""Paths in buckets of Google Cloud Storage, with the interface of `pathlib.Path` as far as gptjax uses it.

Buckets differ from disks: an object is written whole or not at all, but cannot be appended to; there are no
directories, only common prefixes of names, so that making one does nothing and an empty one does not exist; and
renaming copies object by object. `gptjax/files.py` has the operations that hide these differences.

gcsfs is the client, for Orbax too, which opens its paths through epath. TensorStore, which writes the arrays of
checkpoints, has its own. Both repeat requests that fail for the moment, and use an emulator if STORAGE_EMULATOR_HOST
names one.
"""

import errno
import fnmatch
import io
import os
import stat
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from types import SimpleNamespace, TracebackType
from typing import IO, Any

from etils.epath import gpath

from gptjax.bucket_client import COMMIT_FILE, BucketError, client
from gptjax.user_error import UserError

# Files whose existence states that those next to them are complete: the last ones that `rename` copies.
_LAST = ("/config.json", "/spec.json", f"/{COMMIT_FILE}")
_REQUESTS = 16  # simultaneous ones of a directory that is renamed
UPLOAD_SECONDS = 30.0  # between two uploads of a file that is appended to


class BucketPath(gpath.PosixGPath):
    """A path such as gs://bucket/run. Operations raise FileNotFoundError, or BucketError if a request fails."""

    def exists(self) -> bool:
        found: bool = client().exists(str(self))
        return found

    def is_dir(self) -> bool:
        """Whether there are objects below this path."""
        found: bool = client().isdir(str(self))
        return found

    def is_file(self) -> bool:
        found: bool = client().isfile(str(self))
        return found

    def is_symlink(self) -> bool:
        return False

    def expanduser(self) -> "BucketPath":
        return self

    def absolute(self) -> "BucketPath":
        return self

    def resolve(self, strict: bool = False) -> "BucketPath":
        return self

    def iterdir(self) -> Iterator["BucketPath"]:
        names = (name.rstrip("/").rpartition("/")[2] for name in client().ls(str(self), detail=False))
        yield from (self / name for name in names if self / name != self)

    def glob(self, pattern: str) -> Iterator["BucketPath"]:
        """Yields the entries of this directory whose names match `pattern`."""
        if self.is_dir():
            yield from (path for path in self.iterdir() if fnmatch.fnmatchcase(path.name, pattern))

    def mkdir(self, mode: int | None = None, parents: bool = False, exist_ok: bool = False) -> None:
        if not exist_ok and self.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(self))

    def rmdir(self) -> None:
        pass

    def rmtree(self, missing_ok: bool = False) -> None:
        try:
            client().rm(str(self), recursive=True)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            client().rm_file(str(self))
        except FileNotFoundError:
            if not missing_ok:
                raise

    def stat(self) -> Any:
        """Returns st_mode, st_size and st_mtime."""
        found = client().info(str(self))
        kind = stat.S_IFDIR | 0o755 if found["type"] == "directory" else stat.S_IFREG | 0o644
        changed = found["mtime"].timestamp() if "mtime" in found else 0.0
        return SimpleNamespace(st_mode=kind, st_size=found["size"], st_mtime=changed)

    def rename(self, target: Any) -> "BucketPath":
        """Copies the objects below this path, those of `_LAST` at the end, and removes the old ones, those first."""
        new, gcs = self._new(target), client()
        names = [f"gs://{name}" for name in gcs.find(str(self))]
        if not names:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(self))

        def copy(name: str) -> None:
            gcs.cp_file(name, str(new) + name.removeprefix(str(self)))

        # Nested markers before those of the directories around them.
        last = sorted((name for name in names if name.endswith(_LAST)), key=lambda name: -name.count("/"))
        others = [name for name in names if name not in last]
        with ThreadPoolExecutor(_REQUESTS) as pool:
            list(pool.map(copy, others))
            for name in last:
                copy(name)
            for name in reversed(last):
                gcs.rm_file(name)
            list(pool.map(gcs.rm_file, others))
        return new

    def replace(self, target: Any) -> "BucketPath":
        return self.rename(target)

    def touch(self, mode: int = 0o666, exist_ok: bool = True) -> None:
        self.create(b"")

    # --- content ------------------------------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        content: bytes = client().cat_file(str(self))
        return content

    def read_text(self, encoding: str | None = None) -> str:
        return self.read_bytes().decode()

    def write_bytes(self, data: Any) -> int:
        with _writing(self):
            client().pipe_file(str(self), bytes(data))
        return len(data)

    def write_text(self, data: str, encoding: str | None = None, errors: str | None = None) -> int:
        return self.write_bytes(data.encode())

    def upload(self, source: Any) -> None:
        """Writes the content of a local file, in pieces."""
        with _writing(self):
            client().put_file(str(source), str(self))

    def download(self, target: Any) -> None:
        """Writes the content to a local file."""
        client().get_file(str(self), str(target))

    def open(
        self, mode: str = "r", *, encoding: str | None = None, errors: str | None = None, **options: Any
    ) -> IO[Any]:
        """Opens the object in memory; a written one is uploaded when it is closed, and not after an exception."""
        if mode not in ("r", "rb", "w", "wb"):
            raise io.UnsupportedOperation(f"{self}: mode {mode!r}")
        if mode.startswith("r"):
            content = io.BytesIO(self.read_bytes())
            return content if "b" in mode else io.TextIOWrapper(content, encoding="utf-8", errors=errors)
        upload = _Upload(self)
        return upload if "b" in mode else _TextUpload(upload, errors)

    # --- conditional writes, which only one of several processes can do -----------------------------------------------

    def create(self, content: bytes) -> int | None:
        """Writes a new object; returns its generation, or None if there is one already."""
        return self.overwrite(content, 0)

    def overwrite(self, content: bytes, generation: int) -> int | None:
        """Replaces the object of this generation (0: none); returns the new generation, or None if it is another."""
        gcs = client()
        bucket, name, _ = gcs.split_path(str(self))
        url = f"{gcs._location}/upload/storage/v1/b/{bucket}/o"
        try:
            with _writing(self):
                made = gcs.call(
                    "POST",
                    url,
                    uploadType="media",
                    name=name,
                    ifGenerationMatch=str(generation),
                    data=content,
                    json_out=True,
                )
        except FileExistsError:
            found, current = self.read_generation()  # the answer to an earlier attempt may have been lost
            return current if found == content else None
        return int(made["generation"])

    def read_generation(self) -> tuple[bytes, int]:
        """Returns the content and its generation, a number that grows with each write; b"" and 0 if there is none."""
        gcs = client()
        bucket, name, _ = gcs.split_path(str(self))
        try:
            headers, content = gcs.call("GET", "b/{}/o/{}", bucket, name, alt="media")
        except FileNotFoundError:
            return b"", 0
        return content, int(headers["X-Goog-Generation"])

    def unlink_generation(self, generation: int) -> None:
        """Removes the object if it is of this generation."""
        gcs = client()
        bucket, name, _ = gcs.split_path(str(self))
        with suppress(FileNotFoundError, FileExistsError):  # removed, or another one
            gcs.call("DELETE", "b/{}/o/{}", bucket, name, ifGenerationMatch=str(generation))


class AppendedObject:
    """An object that grows: it is uploaded whole, every UPLOAD_SECONDS in the background and by `sync`."""

    def __init__(self, path: BucketPath) -> None:
        self._path = path
        self._content = bytearray(path.read_bytes() if path.exists() else b"")
        self._uploaded, self._last = len(self._content), time.monotonic()
        self._thread = ThreadPoolExecutor(1)
        self._pending: Future[None] | None = None

    def write(self, content: str | bytes) -> None:
        self._content += content.encode() if isinstance(content, str) else content
        is_idle = self._pending is None or self._pending.done()
        if is_idle and time.monotonic() - self._last >= UPLOAD_SECONDS:
            self._last = time.monotonic()
            self._pending = self._thread.submit(self._upload, bytes(self._content))  # `sync` repeats one that failed

    def _upload(self, content: bytes) -> None:
        self._path.write_bytes(content)
        self._uploaded = len(content)

    def sync(self) -> None:
        """Returns when everything is uploaded; raises BucketError if that fails."""
        if self._pending is not None:
            self._pending.exception()
        if self._uploaded < len(self._content):
            self._upload(bytes(self._content))

    def flush(self) -> None:
        """Does nothing: `write` uploads in time."""

    def close(self) -> None:
        try:
            self.sync()
        finally:
            self._thread.shutdown()


class EventFiles:
    """A factory of tensorboardX for event files in buckets, whose own one stops at the first failed upload."""

    def open(self, path: str) -> AppendedObject:
        return AppendedObject(BucketPath(path))

    def directory_check(self, path: str) -> None:
        pass


class _Upload(io.BytesIO):
    def __init__(self, path: BucketPath) -> None:
        super().__init__()
        self._path, self.is_dropped = path, False

    def close(self) -> None:
        if not self.closed:
            content = self.getvalue()
            super().close()
            if not self.is_dropped:
                self._path.write_bytes(content)

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.is_dropped = self.is_dropped or kind is not None
        self.close()

    def __del__(self) -> None:
        self.is_dropped = True
        super().close()


class _TextUpload(io.TextIOWrapper):
    def __init__(self, upload: _Upload, errors: str | None) -> None:
        super().__init__(upload, encoding="utf-8", errors=errors)
        self._upload = upload

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.flush()
        self._upload.__exit__(kind, error, at)


@contextmanager
def _writing(path: BucketPath) -> Iterator[None]:
    """Names the object in errors of writing it, where only the bucket can be missing."""
    try:
        yield
    except BucketError as error:
        error.filename = str(path)
        raise
    except FileNotFoundError:
        raise BucketError(errno.ENOENT, f"there is no bucket {path.parts[2]}", str(path)) from None


def bucket_path(url: str) -> BucketPath:
    """Returns the path of a URL such as gs://bucket/run.

    Raises:
      UserError: it is of another kind of store, it names no bucket, or gcsfs is not installed.
    """
    scheme, _, rest = url.partition("://")
    if scheme != "gs":
        raise UserError(
            f"{url}: {scheme}:// is not supported, as Orbax writes checkpoints to local paths and gs:// only: use a "
            "gs:// bucket, or mount this one as a directory"
        )
    if not rest.strip("/").partition("/")[0]:
        raise UserError(f"{url} names no bucket: write gs://BUCKET/NAME")
    client()
    return BucketPath(f"gs://{rest.rstrip('/')}")
