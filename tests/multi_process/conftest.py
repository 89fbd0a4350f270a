"""Commands run as several processes of this machine."""

import os
import random
import socket
import subprocess
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.commands import ROOT, start_command

LIMIT = 1000  # seconds, in which a process that hangs is found out; the first compilation on a busy machine is slow


class Processes:
    """Several processes of one command, under way.

    Args:
      program: the name of a module, or the path of a script.
      arguments: its arguments.
      count: number of processes.
      devices: number of simulated devices of each process.
      each: further arguments of single processes, by process number.
      cwd: working directories, by process number; default: the repository.
      stdin: standard input of process 0; that of the others is empty.
    """

    def __init__(
        self,
        program: str | Path,
        *arguments: Any,
        count: int = 2,
        devices: int = 2,
        each: dict[int, list[str]] | None = None,
        cwd: dict[int, Path] | None = None,
        stdin: str = "",
    ):
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        address = f"--coordinator_address=127.0.0.1:{free_port()}"
        self.processes = [
            start_command(
                program,
                *arguments,
                *place(address, count, number),
                *(each or {}).get(number, []),
                stdin=stdin if number == 0 else "",
                environment={"XLA_FLAGS": flags},
                cwd=(cwd or {}).get(number, ROOT),
            )
            for number in range(count)
        ]

    def wait(self) -> list[subprocess.CompletedProcess]:
        """How each ended; one that hangs is a failure, and is not left behind."""
        with ExitStack() as stack:
            for process in self.processes:
                stack.callback(process.close)
            return [process.result(timeout=LIMIT) for process in self.processes]


def place(address: str, count: int, number: int) -> list[str]:
    return [] if count == 1 else [address, f"--num_processes={count}", f"--process_id={number}"]


def free_port() -> int:
    """Returns a port on which nothing listens.

    It is below those of outgoing connections, one of which might take it meanwhile. No other process gets it from this
    function while this one lives: the UDP port of the same number is taken, by a socket that is never closed.
    """
    both = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if both else socket.AF_INET
    while True:
        port = random.SystemRandom().randrange(20_000, 32_768)  # a test may have set the seed of the others
        with (
            suppress(OSError),
            socket.socket(type=socket.SOCK_DGRAM) as taken,
            socket.create_server(("", port), family=family, dualstack_ipv6=both),
        ):
            taken.bind(("", port))
            taken.detach()
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
