"""Commands run as several processes of this machine."""

import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
LIMIT = 500  # seconds, in which a process that hangs is found out; the first compilation on a busy machine is slow


class Processes:
    """Several processes of one command, under way.

    Args:
      command: what follows `python`.
      count: processes.
      devices: simulated, of each.
      each: additional arguments of one process, by its number.
      cwd: where they run, by number; default: the repository.
      stdin: of process 0; the others have none.
    """

    def __init__(
        self,
        *command: Any,
        count: int = 2,
        devices: int = 2,
        each: dict[int, list[str]] | None = None,
        cwd: dict[int, Path] | None = None,
        stdin: str = "",
    ):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        self.stdin = stdin
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        self.processes = [
            subprocess.Popen(
                [
                    sys.executable,
                    *map(str, command),
                    *place(address, count, number),
                    *(each or {}).get(number, []),
                ],
                env=environment,
                cwd=(cwd or {}).get(number, ROOT),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for number in range(count)
        ]

    def wait(self) -> list[subprocess.CompletedProcess]:
        """How each ended; one that hangs is a failure, and is not left behind."""
        results = []
        try:
            for number, process in enumerate(self.processes):
                out, err = process.communicate(self.stdin if number == 0 else "", timeout=LIMIT)
                results.append(subprocess.CompletedProcess(process.args, process.returncode, out, err))
        finally:
            for process in self.processes:
                with process:  # waits, and closes its pipes
                    process.kill()
        return results


def place(address: str, count: int, number: int) -> list[str]:
    return [] if count == 1 else [address, f"--num_processes={count}", f"--process_id={number}"]


def free_port() -> int:
    """Nothing listens on it, and it is below those of outgoing connections, one of which might take it meanwhile."""
    while True:
        port = random.randrange(20_000, 32_768)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def last_line(result: subprocess.CompletedProcess) -> str:
    """The one line that says why a process ended."""
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, result.stderr
    assert lines == result.stderr.splitlines()[-1:], result.stderr
    return lines[0]


@pytest.fixture(scope="session")
def processes() -> type[Processes]:
    return Processes


@pytest.fixture(scope="session")
def reason() -> Callable[[subprocess.CompletedProcess], str]:
    return last_line
