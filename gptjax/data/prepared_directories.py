"""Directories of a cache that several processes fill: each appears whole or not at all.

A process writes into a directory of its own, `<name>.<machine>-<id>.partial`, and renames it when it is complete. So
the result does not depend on file locks, which some file systems lack or keep on one machine only: without them several
processes may compute the same content, and the first to finish is used.
"""

import contextlib
import fcntl
import hashlib
import os
import platform
import shutil
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from gptjax.config import UserError

STALE = 24 * 3600  # seconds without a write after which another machine's unfinished directory is removed


@contextlib.contextmanager
def writing(directory: Path) -> Iterator[None]:
    """Makes a failed write, which ArrayRecord reports as a RuntimeError, a UserError."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        mend = "free some space there or set data.cache_dir to another place"
        raise UserError(f"cannot write {directory}: {mend} ({error})") from error


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Holds a lock among processes, which their death releases.

    Args:
      wait: until the process that holds it has released it; otherwise BlockingIOError.

    Yields:
      Whether it is held: not where the file system has no locks.
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
    """A path beside `directory` for this process to write its content to; `publish` renames it."""
    return directory.with_name(f"{directory.name}.{_machine()}-{uuid.uuid4().hex[:8]}.partial")


def publish(partial: Path, directory: Path, is_whole: Callable[[Path], bool]) -> None:
    """Renames a complete directory to `directory`, unless another process has done so; replaces a damaged one.

    Args:
      is_whole: whether a directory holds all that was written.
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


def _machine() -> str:
    """8 hex digits of this start of this machine, all of whose processes share one table of locks."""
    try:
        identity = Path("/proc/sys/kernel/random/boot_id").read_text()
    except OSError:  # macOS
        identity = platform.node()
    return hashlib.sha256(identity.encode()).hexdigest()[:8]


def remove_stale(own: Path, held: bool) -> None:
    """Removes what killed processes left half-written.

    That is a directory of this machine whose lock is free, or one of another machine that nothing was written into for
    `STALE` seconds, since a lock may not reach other machines.

    Args:
      own: the corpus that this process is about to prepare.
      held: whether it holds the lock of `own`.
    """
    for partial in own.parent.glob("*.partial"):
        key, _, writer = partial.stem.partition(".")
        with contextlib.suppress(OSError, UserError):  # another process removes it, holds its lock or is another user's
            newest = max(path.stat().st_mtime for path in (partial, *partial.iterdir()))
            stale = time.time() - newest > STALE
            if not stale and writer.startswith(_machine()):
                lock = own.with_name(f"{key}.lock")
                with contextlib.nullcontext(held) if key == own.name else locked(lock, wait=False) as free:
                    stale = free
            if stale:
                shutil.rmtree(partial, ignore_errors=True)


def sync(path: Path) -> None:
    """Writes a file or directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
