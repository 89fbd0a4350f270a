"""Runs programs that a model has written, each isolated in a child process, with limits.

A program has its own process group, which is killed at the end; limits of processor time, wall-clock time, memory,
processes, open files and file sizes; no network; no files but Python's own, to read, and a temporary directory, which
is removed. What the kernel offers is used, namespaces or else Landlock (`gptjax/evaluation/sandboxed_program.py`
describes both); where it offers neither, nothing is run. This protects against programs that are wrong or careless. It
is no virtual machine: programs run on the same kernel.
"""

import contextlib
import dataclasses
import functools
import json
import os
import secrets
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from gptjax.config import UserError
from gptjax.distributed.process_table import has_running_threads
from gptjax.evaluation import sandboxed_program

Isolation = Literal["namespaces", "landlock"]
_ISOLATIONS: tuple[Isolation, ...] = ("namespaces", "landlock")
_SIGNALS = {signal.SIGXCPU: "processor time limit", signal.SIGKILL: "killed", signal.SIGSEGV: "segmentation fault"}


@dataclasses.dataclass(frozen=True)
class Limits:
    """Limits of a program."""

    wall_seconds: float = 10.0
    cpu_seconds: int = 5  # of each process
    memory_bytes: int = 512 * 2**20  # address space of each process
    processes: int = 16  # and threads; the kernel may count those of all programs that run at once together
    open_files: int = 64
    file_bytes: int = 16 * 2**20  # of each file
    disk_bytes: int = 64 * 2**20  # of all files together; with Landlock there is no such limit


LIMITS = Limits()


class Outcome(NamedTuple):
    """Whether the program reached its end without an exception, and if not, why: an exception or a limit."""

    passed: bool
    reason: str


class _SetupError(Exception):
    """The isolation failed."""


def run_programs(programs: Sequence[str], limits: Limits = LIMITS) -> list[Outcome]:
    """Runs Python programs, as many at once as there are processors.

    Raises:
      UserError: programs cannot be isolated here.
    """
    kind, at_once = isolation(), len(os.sched_getaffinity(0))
    with ThreadPoolExecutor(at_once) as threads:
        return list(threads.map(lambda program: run_program(program, kind, limits, at_once), programs))


@functools.cache
def isolation() -> Isolation:
    """Returns the strongest isolation that works on this machine.

    Raises:
      UserError: none does.
    """
    if sys.platform != "linux":
        raise UserError("--allow_code_execution needs Linux, whose kernel isolates the programs")
    reasons = []
    for kind in _ISOLATIONS:
        try:
            outcome = run_program("", kind, LIMITS)
        except _SetupError as error:
            reasons.append(f"{kind}: {error}")
        else:
            if outcome.passed:
                return kind
            reasons.append(f"{kind}: {outcome.reason}")
    raise UserError(
        f"programs cannot be isolated on this machine ({'; '.join(reasons)}): it needs Linux 5.13 with Landlock, or "
        "the right to make namespaces"
    )


def run_program(program: str, kind: Isolation, limits: Limits, at_once: int = 1) -> Outcome:
    """Runs a Python program in a child process and kills all its processes.

    Args:
      at_once: programs that may run at the same time; each may have its `limits.processes`.

    Raises:
      _SetupError: the child cannot be isolated this way.
    """
    token = secrets.token_hex(16)
    with _directory() as directory:
        settings = {
            "token": token,
            "isolation": kind,
            "directory": str(directory),
            "limits": dataclasses.asdict(limits),
            "others": _other_threads(kind) + (at_once - 1) * limits.processes,
        }
        # -I and -S: nothing of the user's environment or site-packages is imported
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", sandboxed_program.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=directory,
            env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        assert child.stdin is not None
        assert child.stdout is not None
        try:
            with contextlib.suppress(BrokenPipeError), child.stdin as stdin:
                stdin.write(json.dumps(settings).encode() + b"\n" + program.encode(errors="replace"))
            in_time = _wait(child.pid, limits.wall_seconds)
        finally:
            # The child is not waited for yet, so that its number and that of its group are still its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            code = child.wait()
            while _is_alive(child.pid):  # and may write into the directory
                time.sleep(0.01)
        with child.stdout:
            os.set_blocking(child.stdout.fileno(), False)
            written = child.stdout.read(2**16) or b""
    return _outcome(written, token, code if in_time else None)


def _wait(pid: int, seconds: float) -> bool:
    """Waits for the end of a child, which stays a zombie; returns whether it ended in time."""
    descriptor = os.pidfd_open(pid)
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def _is_alive(group: int) -> bool:
    """Whether a process of a group has not ended; a zombie may stay where the first process reaps none."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            if os.getpgid(int(process.name)) == group and has_running_threads(int(process.name)):
                return True
    return False


def _outcome(written: bytes, token: str, code: int | None) -> Outcome:
    for line in written.splitlines():
        try:
            message = json.loads(line)
            mine = message["token"] == token
        except (ValueError, TypeError, KeyError, RecursionError):
            continue  # the program may write to the pipe too
        if mine and "setup" in message:
            raise _SetupError(message["setup"])
        if mine:
            return Outcome(not message["reason"], message["reason"])
    if code is None:
        return Outcome(False, "wall-clock time limit")
    number = code - 128 if code > 128 else -code
    return Outcome(False, _SIGNALS.get(number, f"ended with exit code {code}"))  # type: ignore[call-overload]


def _other_threads(kind: Isolation) -> int:
    """The threads of the user that the program will run as, which count in its limit of processes."""
    if kind == "namespaces" and os.geteuid() != 0:
        return 0  # in a user namespace only its own count
    user = os.geteuid() or sandboxed_program.NOBODY
    count = 0
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            count += len(os.listdir(process / "task")) if process.stat().st_uid == user else 0
    return count


@contextlib.contextmanager
def _directory() -> Iterator[Path]:
    """Makes a temporary directory that a program may write to, and removes it with all that is in it."""
    directory = Path(tempfile.mkdtemp(prefix="gptjax-program-"))
    try:
        if os.geteuid() == 0:
            os.chown(directory, sandboxed_program.NOBODY, sandboxed_program.NOBODY)
        yield directory
    finally:
        for folder, _, _ in os.walk(directory):
            os.chmod(folder, 0o700)  # top down: a program may have removed its own right to read a folder
        shutil.rmtree(directory)
