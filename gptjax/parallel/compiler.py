"""Compilation with XLA flags that are passed with the program.

Flags given this way need no environment variable, apply to one program only, and are part of its key in the compilation
cache.
"""

import shutil
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import jax

from gptjax.config import UserError
from gptjax.distributed import processes

QUIET_SECONDS = 2.0  # shorter compilations are not announced


@contextmanager
def announced(what: str) -> Iterator[None]:
    """Shows "compiling WHAT ... 12 s" on stderr while the body runs, from QUIET_SECONDS on; process 0 only.

    A terminal gets the elapsed time in one line, which is erased at the end; a file or pipe one line without it.
    """
    if not processes.is_first():
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_show_elapsed, args=(what, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _show_elapsed(what: str, done: threading.Event) -> None:
    start, width = time.monotonic(), 0
    if done.wait(QUIET_SECONDS):
        return
    if not sys.stderr.isatty():
        print(f"compiling {what} ...", file=sys.stderr, flush=True)
        return
    while True:
        width = shutil.get_terminal_size().columns - 1
        line = f"compiling {what} ... {time.monotonic() - start:.0f} s"
        sys.stderr.write("\r" + line[:width].ljust(width))  # over a progress bar, which draws itself again
        sys.stderr.flush()
        if done.wait(1.0):
            break
    sys.stderr.write("\r" + " " * width)
    sys.stderr.write("\r")
    sys.stderr.flush()


def compile(lowered: jax.stages.Lowered, flags: Iterable[tuple[str, str]] = ()) -> jax.stages.Compiled:
    """Compiles a lowered program with XLA flags.

    Args:
      flags: (name, value) pairs, such as ("xla_cpu_enable_fast_math", "true").

    Raises:
      UserError: XLA has no such flag, or rejects its value.
    """
    # XLA parses "true" and "false" in its environment variable, but takes bools here.
    booleans = {"true": True, "false": False}
    try:
        return lowered.compile({name: booleans.get(value, value) for name, value in flags})
    except jax.errors.JaxRuntimeError as error:
        message = str(error).removeprefix("INVALID_ARGUMENT: ")
        if message.startswith(("No such compile option", "While setting option")):
            raise UserError(f"compiler_options: {message}") from None
        raise
