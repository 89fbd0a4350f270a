"""Members of a sweep as processes of this machine, which divide its processors and accelerators evenly."""

import os
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from gptjax.checkpoint.lock import is_held_here
from gptjax.config import UserError
from gptjax.launch import attempts
from gptjax.launch.members import Member

CPUS_EACH = 4  # processors of a member where the number of processes is not given and there is no accelerator


class Slot(NamedTuple):
    """The share of a member: processors as of `gptjax.launch.member`, and variables that choose its accelerators."""

    cpus: str
    environment: dict[str, str]


class LocalEngine:
    """Runs up to `len(slots)` members at a time.

    Attributes:
      detached: whether members outlive this process.
    """

    detached = False

    def __init__(self, slots: Sequence[Slot]) -> None:
        self._free = list(slots)
        self._running: dict[str, tuple[Member, Slot, subprocess.Popen[bytes]]] = {}

    def room(self) -> int:
        return len(self._free)

    def start(self, member: Member) -> bool:
        """Starts a member; False: a process that outlived an earlier driver is still saving it."""
        if is_held_here(member.workdir):
            return False
        slot = self._free.pop(0)
        process = attempts.start(attempts.task_of(member), slot.cpus, slot.environment)
        self._running[member.name] = member, slot, process
        return True

    def ended(self) -> dict[str, int]:
        """Returns the exit codes of the members that have ended since the last call, and frees their shares."""
        codes = {}
        for name, (member, slot, process) in list(self._running.items()):
            if (code := process.poll()) is None:
                continue
            assert process.stdin is not None
            process.stdin.close()
            attempts.record(member.workdir, code)
            del self._running[name]
            self._free.append(slot)
            codes[name] = code
        return codes

    def stop(self, name: str) -> None:
        """Asks a member to save and end."""
        if name in self._running:
            self._running[name][2].terminate()

    def kill(self) -> None:
        """Ends all members at once."""
        for _, _, process in self._running.values():
            process.kill()


def slots(processes: int | None, members: int) -> list[Slot]:
    """Divides this machine.

    All shares are of equal size, as the order of float32 sums may depend on the number of threads. Without accelerators
    or where there are fewer of them than processes, shares are taken by several members.

    Args:
      processes: number of shares; None: one for each accelerator, or for CPUS_EACH processors where there is none.
      members: there are never more shares.

    Raises:
      UserError: accelerators cannot be divided into so many shares.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    variable, devices = accelerators()
    count = processes or len(devices) or max(1, (len(cpus) or os.cpu_count() or 1) // CPUS_EACH)
    count = min(count, members)
    each = max(1, len(cpus) // count)
    found = []
    for i in range(count):
        own = [cpus[(i * each + k) % len(cpus)] for k in range(each)] if cpus else []
        environment = _share(variable, devices, i, count) if devices else {}
        found.append(Slot(",".join(map(str, own)) or "-", environment))
    return found


def accelerators(root: Path = Path("/dev")) -> tuple[str, list[str]]:
    """Returns the variable that chooses accelerators, and the numbers of those that this process may use.

    JAX is not asked, since it would take them. JAX_PLATFORMS=cpu hides them.
    """
    if os.environ.get("JAX_PLATFORMS", "") == "cpu":
        return "", []
    for variable, pattern in (("CUDA_VISIBLE_DEVICES", r"nvidia(\d+)"), ("TPU_VISIBLE_CHIPS", r"accel(\d+)")):
        names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
        numbers = sorted(int(match[1]) for name in names if (match := re.fullmatch(pattern, name)))
        if numbers:
            chosen = os.environ.get(variable)
            return variable, [str(number) for number in numbers] if chosen is None else chosen.split(",")
    return "", []


def _share(variable: str, devices: list[str], i: int, count: int) -> dict[str, str]:
    """Environment variables for share `i` of `count`."""
    if count <= len(devices):
        each = len(devices) // count
        if variable == "TPU_VISIBLE_CHIPS" and count > 1:
            if each > 1:
                raise UserError(f"--processes={count} for {len(devices)} TPU chips: give 1 or {len(devices)}")
            return {variable: devices[i], "TPU_CHIPS_PER_PROCESS_BOUNDS": "1,1,1", "TPU_PROCESS_BOUNDS": "1,1,1"}
        return {variable: ",".join(devices[i * each : (i + 1) * each])} if count > 1 else {}
    if variable == "TPU_VISIBLE_CHIPS":
        raise UserError(f"--processes={count}, but a TPU chip runs one process, and there are {len(devices)}")
    together = -(-count // len(devices))  # members on one GPU, which take equal parts of its memory
    return {variable: devices[i % len(devices)], "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / together:.3f}"}
