"""The lock of a workdir: allows one run at a time, and detects a stale lock of a dead owner.

`<workdir>/run.lock` is JSON that names its owner. It is created with O_EXCL, which works on NFS too, where flock is
often local to a host. On the owner's machine the kernel reports whether the owner is alive. Elsewhere, or for another
user's process under `hidepid`, heartbeats decide: the owner touches the lock every `BEAT` seconds, and counts as dead
if no heartbeat is observed for `DEAD` seconds. Clocks of two machines are never compared.

A stale lock is removed only by the run that holds the lock's claim, a file of the same format whose name contains the
id of the dead owner. So no run ever removes the lock of another run that took over the stale lock before it did.

In a bucket the lock is an object with the same content. It is created, replaced and removed on condition of its
generation, which the bucket checks, so that a stale lock needs no claim; a heartbeat writes a new generation.
"""

import datetime
import hashlib
import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, cast

from gptjax.config import UserError
from gptjax.distributed import processes
from gptjax.distributed.peers import STOPPED
from gptjax.distributed.process_table import has_running_threads, stat_fields
from gptjax.files import is_in_bucket
from gptjax.object_store import BucketPath

LOCK_FILE = "run.lock"
BEAT, DEAD = 10.0, 60.0  # seconds


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of a workdir, which is created if missing, and removed again if it is still empty.

    Raises:
      UserError: another run holds it, or it cannot be written.
    """
    lock, own, is_new = _lock_of(workdir), _describe(), not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _acquire(lock, own)
    except OSError as error:
        raise UserError(f"cannot write in --workdir={workdir}: {error.strerror}") from None
    ended = threading.Event()
    beating = threading.Thread(target=_keep, args=(lock, own, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with suppress(OSError):
            lock.release(own)
            if is_new:
                workdir.rmdir()


def is_held_here(workdir: Path) -> bool:
    """Whether a process of this machine that is alive holds the lock of a workdir."""
    owner, _ = _lock_of(workdir).read()
    return _is_here(owner) and _is_alive(owner["pid"], owner.get("started")) is True


def _is_here(owner: dict[str, Any]) -> bool:
    """Whether a lock names a process of this machine."""
    return owner.get("machine") is not None and owner["machine"] == _machine() and type(owner.get("pid")) is int


def wait_until_free(workdir: Path) -> None:
    """Waits while a process of this machine holds the lock of a workdir; for one elsewhere, for at most `DEAD` seconds.

    It is for processes that have been asked to save and end.
    """
    deadline = time.monotonic() + DEAD
    while True:
        owner, beat = _lock_of(workdir).read()
        here = _is_here(owner)
        if beat is None or (here and not is_held_here(workdir)) or (not here and time.monotonic() > deadline):
            return
        time.sleep(0.2)


def _describe() -> dict[str, Any]:
    """Returns an identification of this process for processes on this and other machines."""
    pid = os.getpid()
    return {
        "host": socket.gethostname(),
        "pid": pid,
        "since": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
        "machine": _machine(),
        "started": _started(pid),
        "id": uuid.uuid4().hex,
    }


def _machine() -> str | None:
    """Returns an id of the PID namespace: the kernel's boot id and the container; None: unknown."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname() if sys.platform == "darwin" else None


def _started(pid: int) -> str:
    """Returns the start time of a process, which distinguishes it from a later one of the same PID; "": unknown."""
    fields = stat_fields(f"/proc/{pid}/stat")
    return fields[19] if len(fields) > 19 else ""


def _is_alive(pid: int, started: Any) -> bool | None:
    """Whether the process with this PID and start time on this machine is alive; None: unknown."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # another user's process
    if not started or not (now := _started(pid)):
        return None  # macOS, or /proc is mounted with hidepid
    if now != started:
        return False
    return has_running_threads(pid)


class _FileLock:
    """A lock on a local or network file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def create(self, own: dict[str, Any]) -> bool:
        """Creates the lock; False if there is one."""
        try:
            descriptor = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except FileExistsError:
            return False
        try:
            with open(descriptor, "w") as file:
                file.write(json.dumps(own) + "\n")
        except OSError:
            self.path.unlink()
            raise
        return True

    def read(self) -> tuple[dict[str, Any], int | None]:
        """Returns the owner, empty if it cannot be read, and its last heartbeat in ns; None if there is no lock."""
        try:
            with self.path.open() as file:  # NFS revalidates attributes when a file is opened; stat alone may be cached
                beat = os.fstat(file.fileno()).st_mtime_ns
                owner = json.loads(file.read(10_000))
        except FileNotFoundError:
            return {}, None
        except (ValueError, RecursionError):
            return {}, beat
        return owner if isinstance(owner, dict) else {}, beat

    def beat(self, own: dict[str, Any]) -> None:
        os.utime(self.path)

    def take(self, own: dict[str, Any], other: dict[str, Any], beat: int) -> bool:
        """Removes the lock of a dead owner, by its claim; returns False, as another run may create the next one.

        A file with the content X at `path` is removed only by its owner or, if that is dead, by the run that holds the
        lock `claim` of X. Ids are unique, so a run that gets that claim later finds that X does not exist any more.
        """
        name = other.get("id") or f"{self.path.name} {beat}"  # a damaged one has no id
        claim = self.path.with_name(f"{LOCK_FILE}.{hashlib.sha256(str(name).encode()).hexdigest()[:16]}")
        _acquire(_FileLock(claim), own)
        try:
            if self.read() == (other, beat):
                self.path.unlink(missing_ok=True)
        finally:
            claim.unlink(missing_ok=True)
        return False

    def release(self, own: dict[str, Any]) -> None:
        if self.read()[0] == own:
            self.path.unlink()


class _ObjectLock:
    """A lock in a bucket; the generation of the object is the heartbeat."""

    def __init__(self, path: BucketPath) -> None:
        self.path = path

    def create(self, own: dict[str, Any]) -> bool:
        return self.path.create(_content(own)) is not None

    def read(self) -> tuple[dict[str, Any], int | None]:
        content, generation = self.path.read_generation()
        if generation == 0:
            return {}, None
        try:
            owner = json.loads(content[:10_000])
        except (ValueError, RecursionError):
            owner = None
        return owner if isinstance(owner, dict) else {}, generation

    def beat(self, own: dict[str, Any]) -> None:
        owner, generation = self.read()
        if owner == own and generation is not None:
            self.path.overwrite(_content(own), generation)

    def take(self, own: dict[str, Any], other: dict[str, Any], beat: int) -> bool:
        """Replaces the lock of a dead owner; False if it has changed."""
        return self.path.overwrite(_content(own), beat) is not None

    def release(self, own: dict[str, Any]) -> None:
        owner, generation = self.read()
        if owner == own and generation is not None:
            self.path.unlink_generation(generation)


def _lock_of(workdir: Path) -> _FileLock | _ObjectLock:
    path = workdir / LOCK_FILE
    return _ObjectLock(cast(BucketPath, path)) if is_in_bucket(path) else _FileLock(path)


def _content(own: dict[str, Any]) -> bytes:
    return json.dumps(own).encode() + b"\n"


def _acquire(lock: _FileLock | _ObjectLock, own: dict[str, Any]) -> None:
    """Creates the lock, or takes it from a dead owner; raises UserError if another owner is alive."""
    while not lock.create(own):
        other, beat = lock.read()
        if beat is None:
            continue
        _check_dead(lock, other, beat)
        if lock.take(own, other, beat):
            return


def _check_dead(lock: _FileLock | _ObjectLock, owner: dict[str, Any], beat: int) -> None:
    """Raises UserError unless the owner is dead; waits `DEAD` seconds where the kernel cannot report it."""
    path = lock.path
    name = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
    alive = None
    if _is_here(owner):
        alive = _is_alive(owner["pid"], owner.get("started"))
    if alive is None:
        print(f"{path} names {name}: waiting {DEAD:g} s for a heartbeat", file=sys.stderr)
        deadline, alive = time.monotonic() + DEAD, False
        while not alive and time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT))
            alive = lock.read() != (owner, beat)
    if alive:
        raise UserError(
            f"{path.parent} is in use by another run, {name}: wait until it ends, stop it, or use another --workdir"
        )
    print(f"{path} was left by {name}, which is dead: this run takes over", file=sys.stderr)


def _keep(lock: _FileLock | _ObjectLock, own: dict[str, Any], ended: threading.Event) -> None:
    """Sends heartbeats; ends the process if another run has taken over the workdir, as two runs would corrupt it."""
    while not ended.wait(BEAT):
        with suppress(OSError):  # the file server may be unreachable for a while
            owner, beat = lock.read()
            if beat is None:
                lock.create(own)
            elif owner == own:
                lock.beat(own)
            elif owner:
                processes.end(
                    f"error: {lock.path.parent} was taken by process {owner.get('pid')} on {owner.get('host')}, since "
                    f"{owner.get('since')}, because this run sent no heartbeat in time: this run stops, so that only "
                    "one of them writes",
                    STOPPED,
                )
