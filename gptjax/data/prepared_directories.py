"""Writes directories of a shared cache atomically.

A process writes into its own directory, `<name>.<machine>-<id>.partial`, and renames it when it is complete. So
correctness does not depend on file locks, which some file systems lack or restrict to one machine: without locks
several processes may compute the same content, and the first to finish is used.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from gptjax.config import UserError
from gptjax.files import (
    download_file,
    is_in_bucket,
    is_plain_name,
    read_json,
    remove_tree,
    unfinished_path,
    upload_file,
    write_whole,
)

UPLOADED = "uploaded.json"  # the SHA-256 of every file of a directory in a bucket, written last
STALE = 24 * 3600  # seconds without a write after which another machine's unfinished directory is removed


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Turns failed writes, which ArrayRecord reports as RuntimeErrors, into UserErrors."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        # ArrayRecord's errors do not say whether the disk is full.
        is_full = not isinstance(error, OSError) or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        fix = ("free some space there or " if is_full else "") + "set data.cache_dir to another directory"
        raise UserError(f"cannot write {directory}: {fix} ({error})") from error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds an inter-process file lock, which is released when the process dies.

    Args:
      path: the lock file.
      wait: wait until the lock is free; otherwise raise BlockingIOError if another process holds it.

    Yields:
      Whether the lock is held; False if the file system does not support locks.
    """
    with writing(path.parent):
        file = path.open("w")
    with file:
        held = True
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not wait:
                    raise
                print(f"waiting for the process that prepares {path.with_suffix('')}", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        except BlockingIOError:
            raise
        except OSError:  # ENOLCK, ENOSYS, EOPNOTSUPP: NFS without a lock service, mounted buckets
            held = False
        yield held


def new_partial(directory: Path) -> Path:
    """Returns a temporary path in the parent of `directory`, to be written by this process and renamed by `publish`."""
    return directory.with_name(f"{directory.name}.{_machine()}-{uuid.uuid4().hex[:8]}.partial")


def publish(partial: Path, directory: Path, is_whole: Callable[[Path], bool]) -> None:
    """Renames a complete directory to `directory` unless it exists; replaces a damaged one.

    Args:
      partial: path from `new_partial`.
      directory: the final path.
      is_whole: whether a directory is complete and undamaged.
    """
    try:
        partial.rename(directory)
    except OSError:
        if not directory.exists():
            raise
        if is_whole(directory):
            return
        damaged = partial.with_name(f"{partial.stem}-damaged.partial")
        with contextlib.suppress(FileNotFoundError):  # another process has removed it
            directory.rename(damaged)
        shutil.rmtree(damaged, ignore_errors=True)
        partial.rename(directory)
    sync(directory.parent)


def save_whole(save: Callable[[Path], None], directory: Path) -> None:
    """Calls `save` so that `directory` appears whole, even if other processes save it at the same time."""
    unfinished = unfinished_path(directory)
    try:
        save(unfinished)
        unfinished.rename(directory)
    except OSError:
        if not directory.exists():  # else another process was first
            raise
    finally:
        remove_tree(unfinished)


def share(directory: Path, shared: Path) -> None:
    """Uploads a complete local directory to the bucket that other machines take it from, unless it is there."""
    if directory == shared or (shared / UPLOADED).exists():
        return
    digests = {}
    for path in sorted(directory.iterdir()):
        upload_file(path, shared / path.name)
        digests[path.name] = _sha256(path)
    write_whole(shared / UPLOADED, json.dumps(digests, indent=2) + "\n")


def take_shared(shared: Path, directory: Path) -> bool:
    """Downloads what `share` uploaded into an empty local directory; False if it is not there or is damaged."""
    if not is_in_bucket(shared):
        return False
    try:
        digests = read_json(shared / UPLOADED)
        for name, digest in digests.items():
            if not is_plain_name(name):
                raise ValueError(f"{name!r} is not a file name")
            download_file(shared / name, directory / name)
            if _sha256(directory / name) != digest:
                raise ValueError(f"{name} does not match its checksum")
    except FileNotFoundError:
        pass
    except (ValueError, AttributeError) as error:
        print(f"{shared} is damaged ({error}): preparing it again", file=sys.stderr)
        (shared / UPLOADED).unlink(missing_ok=True)
    else:
        return True
    for path in directory.iterdir():
        path.unlink()
    return False


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _machine() -> str:
    """Returns 8 hex digits that identify this boot of this machine, whose processes share one table of locks."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # macOS
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def remove_stale(own: Path, held: bool) -> None:
    """Removes incomplete directories of killed processes.

    These are directories of this machine whose lock is free, and directories of other machines that were not written to
    for `STALE` seconds, as locks may not be visible across machines.

    Args:
      own: directory that this process is about to prepare.
      held: whether this process holds the lock of `own`.
    """
    for partial in own.parent.glob("*.partial"):
        key, _, writer = partial.stem.partition(".")
        with contextlib.suppress(OSError, UserError):  # removed or locked by another process, or owned by another user
            newest = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            stale = time.time() - newest > STALE
            if not stale and writer.startswith(_machine()):
                lock = own.with_name(f"{key}.lock")
                with contextlib.nullcontext(held) if key == own.name else locked(lock, wait=False) as free:
                    stale = free
            if stale:
                shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Flushes a file or directory to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
