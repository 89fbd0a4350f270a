"""The lock of a workdir: one run at a time, and a lock left by a dead owner is recognised.

`<workdir>/run.lock` is JSON that names its owner. It is created by O_EXCL, which NFS supports as well, where flock
often does not reach other hosts. On the owner's own machine the kernel reports whether it is alive. Where the kernel
does not say (another machine, or a process of another user under `hidepid`) its heartbeats do: the owner touches the
lock every `BEAT` seconds, and is dead when none is seen for `DEAD` seconds; clocks of two machines are not compared.

A stale lock is removed only by the run that holds the lock's claim, a file of the same form whose name contains the id
of the dead owner. So no run ever removes the lock of another run that took over the stale lock before it did.
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
from typing import Any

from gptjax.config import UserError
from gptjax.distributed import processes
from gptjax.distributed.peers import STOPPED

LOCK_FILE = "run.lock"
BEAT, DEAD = 10.0, 60.0  # seconds


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the lock of a workdir, created if it is missing; removes one that it created and that is still empty.

    Raises:
      UserError: another run holds it, or it cannot be written.
    """
    path, own, is_new = workdir / LOCK_FILE, _describe(), not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        _acquire(path, own)
    except OSError as error:
        raise UserError(f"cannot write in --workdir={workdir}: {error.strerror}") from None
    ended = threading.Event()
    beating = threading.Thread(target=_keep, args=(path, own, ended), daemon=True)
    beating.start()
    try:
        yield
    finally:
        ended.set()
        beating.join()
        with suppress(OSError):
            if _read(path)[0] == own:
                path.unlink()
            if is_new:
                workdir.rmdir()


def _describe() -> dict[str, Any]:
    """This process, as other processes, on this machine and elsewhere, know it."""
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
    """Where process numbers mean the same: one start of one kernel, and in it one container."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return socket.gethostname() if sys.platform == "darwin" else None


def _stat(path: str) -> list[str]:
    """Fields of a stat file of /proc from the third, the state, on; none where it cannot be read."""
    try:
        return Path(path).read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _started(pid: int) -> str:
    """When a process started, which distinguishes it from a later one of the same number; "" where that is hidden."""
    fields = _stat(f"/proc/{pid}/stat")
    return fields[19] if len(fields) > 19 else ""


def _is_alive(pid: int, started: Any) -> bool | None:
    """Whether the process of this machine that had number `pid` when it started is alive; None: the kernel hides it."""
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is another user's
    if not started or not (now := _started(pid)):
        return None  # macOS, or /proc is mounted with hidepid
    if now != started:
        return False
    # A zombie is dead, but only when its threads are too: one may still be writing.
    return any(_stat(str(task))[:1] not in ([], ["Z"], ["X"]) for task in Path(f"/proc/{pid}/task").glob("*/stat"))


def _acquire(path: Path, own: dict[str, Any]) -> None:
    """Creates the lock `path`; UserError when its owner is alive.

    A file with the content X at `path` is removed by its owner alone or, if that is dead, by the run that holds the
    lock `claim` of X. Ids are never used again, so whoever gets that claim later finds that X is gone.
    """
    while not _create(path, own):
        other, beat = _read(path)
        if beat is None:
            continue
        _check_dead(path, other, beat)
        name = other.get("id") or f"{path.name} {beat}"  # a damaged one has no id
        claim = path.with_name(f"{LOCK_FILE}.{hashlib.sha256(str(name).encode()).hexdigest()[:16]}")
        _acquire(claim, own)
        try:
            if _read(path) == (other, beat):
                path.unlink(missing_ok=True)
        finally:
            claim.unlink(missing_ok=True)


def _create(path: Path, own: dict[str, Any]) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    try:
        with open(descriptor, "w") as file:
            file.write(json.dumps(own) + "\n")
    except OSError:
        path.unlink()
        raise
    return True


def _read(path: Path) -> tuple[dict[str, Any], int | None]:
    """The owner, empty if it cannot be read, and its last heartbeat in ns; None when there is no lock."""
    try:
        with path.open() as file:  # NFS asks the server when a file is opened, and not always for its time
            beat = os.fstat(file.fileno()).st_mtime_ns
            owner = json.loads(file.read(10_000))
    except FileNotFoundError:
        return {}, None
    except (ValueError, RecursionError):
        return {}, beat
    return owner if isinstance(owner, dict) else {}, beat


def _check_dead(path: Path, owner: dict[str, Any], beat: int) -> None:
    """Raises UserError unless the owner is dead, which takes `DEAD` seconds where the kernel does not say."""
    name = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
    alive = None
    if owner.get("machine") is not None and owner.get("machine") == _machine() and type(owner.get("pid")) is int:
        alive = _is_alive(owner["pid"], owner.get("started"))
    if alive is None:
        print(f"{path} names {name}: waiting {DEAD:g} s for a heartbeat", file=sys.stderr)
        deadline, alive = time.monotonic() + DEAD, False
        while not alive and time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT))
            alive = _read(path) != (owner, beat)
    if alive:
        raise UserError(
            f"{path.parent} is in use by another run, {name}: wait for its end or stop it, or use another --workdir"
        )
    print(f"{path} was left by {name}, which is dead: this run takes over", file=sys.stderr)


def _keep(path: Path, own: dict[str, Any], ended: threading.Event) -> None:
    """Sends heartbeats; ends the process when another run has taken the workdir, since two would destroy it."""
    while not ended.wait(BEAT):
        with suppress(OSError):  # a server that is out of reach for a while
            owner, beat = _read(path)
            if beat is None:
                _create(path, own)
            elif owner == own:
                os.utime(path)
            elif owner:
                processes.end(
                    f"error: {path.parent} was taken by process {owner.get('pid')} on {owner.get('host')}, since "
                    f"{owner.get('since')}, as this run sent no heartbeat: let one of them continue",
                    STOPPED,
                )
