"""One attempt at a member: its process, its log, and what is known of how it ended."""

import datetime
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from gptjax.checkpoint.lock import wait_until_free
from gptjax.files import read_json, write_whole
from gptjax.launch.members import LOG_FILE, Member
from gptjax.training.metrics_file import METRICS_FILE

STATUS_FILE = "sweep_status.json"  # in the workdir of a member: how its last attempt ended


class Task(NamedTuple):
    """What a machine needs to know to run a member; serialisable.

    Attributes:
      workdir: absolute.
      flags: of `python -m gptjax.main`.
      directory: from which the flags name files.
      place: flags that say which of several processes this one is. A member is one process by default, whatever
        launcher this process was itself started by.
      log: name of the log in the workdir.
    """

    workdir: str
    flags: tuple[str, ...]
    directory: str
    place: tuple[str, ...] = ("--num_processes=1",)
    log: str = LOG_FILE


def task_of(member: Member) -> Task:
    """Returns the task of a member that is started from this process's directory."""
    return Task(str(member.workdir), member.flags, os.getcwd())


def start(task: Task, cpus: str = "-", environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """Starts the process of a member, which writes to the log in its workdir.

    The process stops, and saves, when the caller dies (`gptjax.launch.member`). It is in a session of its own, so that
    a Ctrl-C in the terminal reaches it through the caller alone.

    Args:
      cpus: as of `gptjax.launch.member`.
      environment: variables in addition to those of this process.
    """
    workdir = Path(task.workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    forget(workdir)
    # A launcher may always start over: with an undamaged checkpoint the flag has no effect.
    flags = [*task.flags, f"--workdir={workdir}", "--start_over", *task.place]
    with (workdir / task.log).open("a") as log:
        now = datetime.datetime.now().isoformat(" ", "seconds")
        log.write(f"\n--- {now}: {shlex.join(['python', '-m', 'gptjax.main', *flags])}\n")
        log.flush()
        return subprocess.Popen(
            [sys.executable, "-m", "gptjax.launch.member", cpus, *flags],
            cwd=task.directory,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )


def start_when_free(task: Task, environment: Mapping[str, str] | None = None) -> "subprocess.Popen[bytes]":
    """As `start`, once an earlier process of the member, which was asked to stop, has ended."""
    wait_until_free(Path(task.workdir))
    return start(task, environment=environment)


def forget(workdir: Path) -> None:
    """Removes the record of how the last attempt ended."""
    (workdir / STATUS_FILE).unlink(missing_ok=True)


def record(workdir: Path, code: int) -> None:
    """Records how an attempt ended."""
    write_whole(workdir / STATUS_FILE, json.dumps({"exit_code": code}) + "\n")


def recorded(workdir: Path) -> int | None:
    """Returns the exit code of the last attempt at a member; None: it has not ended, or its run was removed."""
    try:
        code = read_json(workdir / STATUS_FILE)["exit_code"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return code if isinstance(code, int) and (code != 0 or (workdir / METRICS_FILE).exists()) else None


def last_line(member: Member) -> str:
    """Returns the last line of a member's log."""
    try:
        with member.log.open("rb") as file:
            file.seek(max(0, member.log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    except OSError:
        return ""
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
