"""Runs the members of a sweep on an engine: order, retries, requests to stop, and what is left at the end."""

import os
import signal
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

from gptjax.distributed.peers import INTERRUPTED, PREEMPTED, STOPPED
from gptjax.distributed.preemption import PreemptedError
from gptjax.launch import attempts
from gptjax.launch.members import Member

POLL_SECONDS = 0.2


class Engine(Protocol):
    """Where members run; `gptjax.launch.local` has the meaning of its methods."""

    detached: bool

    def room(self) -> int: ...
    def start(self, member: Member) -> bool: ...
    def ended(self) -> dict[str, int]: ...
    def stop(self, name: str) -> None: ...
    def kill(self) -> None: ...


class Scheduler:
    """Runs members, in the order in which they are added, until none is left.

    A member that exits with 75 (stopped on request) is started again, and so is one that was killed or failed, up to
    `retries` times; a user error (2) would only be repeated, and is not retried. The others run on.

    Args:
      say: prints a line about a member.

    Attributes:
      failed: exit codes of the members that failed for good.
    """

    def __init__(self, engine: Engine, retries: int, say: Callable[[str], None]) -> None:
        self._engine, self._retries, self._say = engine, retries, say
        self._waiting: deque[Member] = deque()
        self._running: dict[str, Member] = {}
        self._attempts: dict[str, int] = {}
        self._added = self._ended = 0
        self._dropped: set[str] = set()
        self.failed: dict[str, int] = {}

    def add(self, members: Sequence[Member]) -> None:
        """Adds members; those that are done are not started."""
        left = [member for member in members if attempts.recorded(member.workdir) != 0]
        self._waiting += left
        self._added += len(members)
        self._ended += len(members) - len(left)
        if len(left) < len(members):
            self._say(f"{len(members) - len(left)} of {len(members)} runs are done already")

    @property
    def idle(self) -> bool:
        return not self._waiting and not self._running

    def is_over(self, name: str) -> bool:
        """Whether a member that was added has ended for good."""
        return name not in self._running and all(member.name != name for member in self._waiting)

    def drop(self, name: str) -> None:
        """Ends a member before its time, without a failure."""
        if self.is_over(name):
            return
        self._dropped.add(name)
        self._waiting = deque(member for member in self._waiting if member.name != name)
        if name in self._running:
            self._engine.stop(name)
        else:
            self._ended += 1

    def step(self) -> None:
        """Starts members where there is room, and takes note of those that have ended; does not wait for them."""
        for _ in range(min(len(self._waiting), self._engine.room())):
            member = self._waiting.popleft()
            if not self._engine.start(member):
                self._waiting.append(member)
                continue
            self._running[member.name] = member
        for name, code in self._engine.ended().items():
            self._end(self._running.pop(name), code)

    def _end(self, member: Member, code: int) -> None:
        name = member.name
        if name in self._dropped or code == 0:
            self._ended += 1
            self._say(f"[{self._ended}/{self._added}] {name} {'stopped early' if name in self._dropped else 'done'}")
        elif code == PREEMPTED:
            self._say(f"{name} was stopped on request: it is resumed")
            self._waiting.appendleft(member)
        else:
            self._attempts[name] = self._attempts.get(name, 0) + 1
            if code != STOPPED and self._attempts[name] <= self._retries:
                self._say(f"{name} {how(code)}: retry {self._attempts[name]} of {self._retries}")
                self._waiting.append(member)
            else:
                self._ended += 1
                self.failed[name] = code
                self._say(f"[{self._ended}/{self._added}] {name} failed: {how(code)}, see {member.log}")

    def run(self, each_time: Callable[[], None] = lambda: None) -> None:
        """Runs to the end; calls `each_time` between two steps.

        Raises:
          PreemptedError: SIGTERM, SIGINT or SIGHUP was received, and all members that this process runs have saved.
        """
        with _requests() as requested:
            while not self.idle:
                if requested:
                    self._stop(requested)
                self.step()
                each_time()
                if not self.idle:
                    time.sleep(POLL_SECONDS)

    def _stop(self, requested: list[str]) -> None:
        """Waits until the running members have saved; a second request ends them at once."""
        if self._engine.detached:
            self._say(f"{requested[0]}: the jobs of the runs stay; the same command waits for them")
            raise PreemptedError(requested[0])
        self._say(f"{requested[0]}: the runs save after this step; a second signal stops them immediately")
        for name in self._running:
            self._engine.stop(name)
        while self._running:
            if len(requested) > 1:
                self._engine.kill()
                os.write(sys.stderr.fileno(), b"interrupted\n")
                os._exit(INTERRUPTED)
            for name in self._engine.ended():
                self._running.pop(name)
            time.sleep(POLL_SECONDS / 4)
        raise PreemptedError(requested[0])


@contextmanager
def _requests() -> Iterator[list[str]]:
    """Context manager that collects the names of the signals that ask this process to stop."""
    received: list[str] = []

    def note(number: int, frame: Any) -> None:
        received.append(signal.Signals(number).name)

    wanted = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]
    before = {number: signal.getsignal(number) for number in wanted}
    for number in wanted:
        if before[number] is not signal.SIG_IGN:  # signals that the shell has set to be ignored stay ignored
            signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def how(code: int) -> str:
    """Describes an exit code."""
    if code < 0:
        try:
            return f"killed by {signal.Signals(-code).name}"
        except ValueError:
            return f"killed by signal {-code}"
    return f"exit code {code}"
