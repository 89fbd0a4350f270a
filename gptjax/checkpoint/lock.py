"""One run in a workdir: its owner keeps a lock there, and a lock whose owner died is told from a living one's.

`<workdir>/run.lock` is JSON that names its owner. It is made by O_EXCL, which NFS keeps as well, where flock often does
not reach other hosts. On the owner's own machine the kernel knows whether it lives. For all others it touches the lock
every `BEAT` seconds, and is dead when that is seen to stop for `DEAD` seconds; no two clocks are compared.
"""

import datetime
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
from gptjax.files import unfinished_path

LOCK_FILE = "run.lock"
BEAT, DEAD = 10.0, 60.0  # seconds


@contextmanager
def locked(workdir: Path) -> Iterator[None]:
    """Holds the workdir, made if it is missing; removes it at the end if nothing has come into it.

    Raises:
      UserError: another run holds it, or it cannot be written.
    """
    path, own, is_new = workdir / LOCK_FILE, _describe(), not workdir.exists()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        while not _create(path, own):
            other, beat = _read(path)
            if beat is not None:
                _check_dead(path, other, beat)
                _take_away(path, other)
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


def _started(pid: int) -> str | None:
    """When a process started, which tells it from a later one of the same number; "" where only its life is known.

    None: there is no such process.
    """
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return None
    except PermissionError:
        pass
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""


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
    """The owner, empty if that cannot be read, and its last sign of life; None when there is no lock."""
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
    """Raises UserError unless the owner is dead; of another machine's it takes `DEAD` seconds to find out."""
    name = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
    if owner.get("machine") is not None and owner.get("machine") == _machine() and type(owner.get("pid")) is int:
        alive = _started(owner["pid"]) == owner.get("started")
    else:
        print(f"{path} names {name}: looking {DEAD:g} s for a sign of life", file=sys.stderr)
        deadline, alive = time.monotonic() + DEAD, False
        while not alive and time.monotonic() < deadline:
            time.sleep(min(1.0, BEAT))
            alive = _read(path) != (owner, beat)
    if alive:
        raise UserError(
            f"{path.parent} is in use by another run, {name}: wait for its end or stop it, or use another --workdir"
        )
    print(f"{path} was left by {name}, which is gone: this run goes on", file=sys.stderr)


def _take_away(path: Path, owner: dict[str, Any]) -> None:
    """Removes the lock of a dead owner, and never that of a third run, which was faster to do so."""
    aside = unfinished_path(path)
    with suppress(FileNotFoundError):
        path.rename(aside)
        if _read(aside)[0] == owner:
            aside.unlink()
        else:
            aside.rename(path)


def _keep(path: Path, own: dict[str, Any], ended: threading.Event) -> None:
    """Gives signs of life; ends the process when another run has taken the workdir, for two would destroy it."""
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
                    f"{owner.get('since')}, as this run gave no sign of life: let one of them go on",
                    STOPPED,
                )
