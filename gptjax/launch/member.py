"""The process of a sweep's member: `python -m gptjax.launch.member CPUS FLAGS...` is `python -m gptjax.main FLAGS...`.

Two things are added. It runs on the processors that CPUS lists ("0,1"; "-": all). And it is stopped as by SIGTERM, and
so saves, when its standard input is closed: whoever started it holds the other end of that pipe, which the kernel
closes when that process dies, even by SIGKILL. SIGUSR2, by which SLURM announces that a job's time ends, does the same.
"""

import os
import runpy
import signal
import sys
import threading


def main() -> None:
    cpus, *arguments = sys.argv[1:]
    if cpus != "-":
        os.sched_setaffinity(0, {int(cpu) for cpu in cpus.split(",")})
    threading.Thread(target=_stop_without_parent, daemon=True).start()
    signal.signal(signal.SIGUSR2, lambda number, frame: _stop())
    sys.argv = [sys.argv[0], *arguments]
    runpy.run_module("gptjax.main", run_name="__main__", alter_sys=True)


_stopping = threading.Lock()


def _stop_without_parent() -> None:
    """Stops this process when the writing end of its standard input is closed."""
    while os.read(0, 1024):
        pass
    _stop()


def _stop() -> None:
    """Stops this process once: a second SIGTERM would end it without saving."""
    if _stopping.acquire(blocking=False):
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
