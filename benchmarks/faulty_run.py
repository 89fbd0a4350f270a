"""Processes that the fault drill starts with a fault: `python -m benchmarks.faulty_run FAULT ARGUMENTS...`.

Faults:
  EIO, EMFILE      `python -m gptjax.main ARGUMENTS...` whose reads of checkpoints fail
  half_line=COUNT  the same, killed in the middle of a message to another process, after COUNT whole ones
  reader           reads the newest weights of the workdir in its argument repeatedly, until SIGTERM
"""

import errno
import os
import resource
import runpy
import signal
import sys
from pathlib import Path
from typing import Any


def fail_reads(fault: str) -> None:
    """Makes reads of checkpoints fail with EIO, or with EMFILE by a limit on file descriptors."""
    from gptjax.checkpoint import read_errors
    from gptjax.checkpoint.stored_checkpoint import StoredCheckpoint

    original = StoredCheckpoint.manifest

    def manifest(stored: StoredCheckpoint) -> dict[str, Any]:
        if fault == "EIO":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(stored.path))
        used = {int(name) for name in os.listdir("/proc/self/fd")}
        lowest = next(number for number in range(len(used) + 1) if number not in used)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return original(stored)

    read_errors.RETRY_DELAYS = (0.05, 0.05)  # type: ignore[assignment]
    StoredCheckpoint.manifest = manifest  # type: ignore[method-assign,assignment]


def cut_message(count: int) -> None:
    """Kills this process in the middle of the message after the first `count`."""
    from gptjax.distributed.peers import Peers, line_of

    original, sent = Peers._send, 0

    def send(self: Peers, peer: int, message: dict[str, Any]) -> None:
        nonlocal sent
        if sent == count:
            line = line_of(message)
            self._sockets[peer].sendall(line[: len(line) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        sent += 1
        original(self, peer, message)

    Peers._send = send  # type: ignore[method-assign]


def read_weights(workdir: Path) -> None:
    """Reads the newest weights until SIGTERM; prints a line each time."""
    from gptjax.config import MeshConfig
    from gptjax.parallel.mesh import make_mesh, use_mesh
    from gptjax.stages.saved_weights import load_parts

    stop: list[bool] = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
    mesh = make_mesh(MeshConfig())
    with use_mesh(mesh):
        while not stop:
            load_parts(workdir, mesh)
            print("read", flush=True)


if __name__ == "__main__":
    fault, _, number = sys.argv.pop(1).partition("=")
    if fault == "reader":
        read_weights(Path(sys.argv[1]))
    else:
        cut_message(int(number)) if fault == "half_line" else fail_reads(fault)
        runpy.run_module("gptjax.main", run_name="__main__", alter_sys=True)
