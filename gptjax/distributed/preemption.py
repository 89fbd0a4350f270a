"""Handles preemption: SIGTERM, SIGINT (Ctrl-C), SIGHUP (a lost terminal), and preemption notices of TPU machines.

A process that has no unsaved results exits immediately. Otherwise it continues to the next boundary (between two steps
or two batches of an evaluation) and saves a checkpoint there; in a multi-process job all processes do so at the same
boundary, whichever of them received the request. A second signal ends the process immediately, except SIGHUP, which a
closing terminal may send more than once.

A thread reads the signals: Python's own handlers wait for the main thread, which may be in XLA's compiler for minutes.
"""

import os
import signal
import stat
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from gptjax.distributed import processes
from gptjax.distributed.peers import INTERRUPTED, PREEMPTED

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
ASK_EVERY = 5  # seconds; Google gives notice 30 seconds before it preempts a Spot machine, more before maintenance

_deferring = False  # whether a stop is deferred to the next boundary
_deciding = threading.Lock()


class PreemptedError(Exception):
    """Raised at a boundary after a request to stop. Commands exit with the code `PREEMPTED`."""


@contextmanager
def watch() -> Iterator[None]:
    """Handles preemption requests within this context; must be entered in the main thread."""
    global _deferring
    read, write = os.pipe()
    os.set_blocking(write, False)
    before = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
    # Signals that the shell has set to be ignored stay ignored.
    wanted = [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]
    handlers = {number: signal.signal(number, _on_signal) for number in wanted}
    threading.Thread(target=_listen, args=(read,), daemon=True).start()
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(before)
        os.close(write)
        _deferring = False


def defer() -> None:
    """Defers requests to the next boundary from now on, as there are results to save."""
    global _deferring
    with _deciding:
        _deferring = True
    from jax._src import cloud_tpu_init  # has already detected TPU chips, when jax was imported

    if cloud_tpu_init.running_in_cloud_tpu_vm:
        threading.Thread(target=watch_machine, daemon=True).start()


def check() -> None:
    """Marks a boundary, which all processes must reach in the same order; raises PreemptedError if all must stop."""
    why = processes.reach_boundary()
    if why is not None:
        raise PreemptedError(why)


def _on_signal(number: int, frame: Any) -> None:
    """Runs in the main thread before its next statement, and so before it prints to a closed terminal."""
    if number == signal.SIGHUP:
        _drop_terminal()


def _drop_terminal() -> None:
    """Redirects terminal output to the null device, as writing to a closed terminal fails and would end the run."""
    for descriptor in (1, 2):
        with suppress(OSError):
            if stat.S_ISCHR(os.fstat(descriptor).st_mode):  # isatty is false for a closed terminal
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, descriptor)
                os.close(null)


def _listen(read: int) -> None:
    """Handles the signals, whose numbers arrive as bytes, until the pipe is closed."""
    count = 0
    with open(read, "rb", buffering=0) as numbers:
        while number := numbers.read(1):
            if number[0] not in SIGNALS:
                continue
            if number[0] == signal.SIGHUP:
                _drop_terminal()  # the main thread may be in the compiler
                if count > 0:
                    continue
            count += 1
            if count > 1:
                processes.end("interrupted", INTERRUPTED)
            _ask(signal.Signals(number[0]).name)


def _ask(why: str) -> None:
    with _deciding:
        if not _deferring:
            processes.end(f"stopped by {why}, with nothing to save: run the same command to start again", PREEMPTED)
    with suppress(OSError):
        os.write(sys.stderr.fileno(), f"\n{why}: saving after this step; a second signal stops immediately\n".encode())
    processes.ask_to_stop(why)


def watch_machine() -> None:
    """Polls Google's metadata server until it announces preemption; returns if there is no server."""
    notices = {"preempted": "TRUE", "maintenance-event": "TERMINATE"}
    first = {key: _metadata(key) for key in notices}
    # A run that starts after the notice uses the remaining time, which may be an hour.
    awaited = {key: sign for key, sign in notices.items() if first[key] and not first[key].startswith(sign)}
    while awaited:
        for key, sign in awaited.items():
            if (value := _metadata(key)).startswith(sign):
                _ask(f"the machine's {key}={value}")
                return
        time.sleep(ASK_EVERY)


def _metadata(key: str) -> str:
    """Returns a value of the machine's metadata; empty if no server answers."""
    host = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")  # the variable that jax reads
    request = urllib.request.Request(
        f"http://{host}/computeMetadata/v1/instance/{key}", headers={"Metadata-Flavor": "Google"}
    )
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with suppress(OSError, ValueError), opener.open(request, timeout=10) as answer:
        return answer.read(1000).decode(errors="replace").strip()
    return ""
