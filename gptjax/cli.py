"""What all commands share: flag parsing, exit codes, one-line user errors, and what may reach a terminal."""

import errno
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO, cast

from absl import app, flags, logging

from gptjax.config import DataConfig, UserError, check_key
from gptjax.distributed import processes
from gptjax.distributed.peers import FAILED, INTERRUPTED, PREEMPTED, STOPPED
from gptjax.distributed.preemption import PreemptedError
from gptjax.files import expand

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # of a disk, a quota, a limit

COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "Of several processes: HOST:PORT, a free port of process 0's machine."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Of several processes: how many; 1: this one alone.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "Of several processes: which this is, from 0.")


# C0 and C1 control characters and DEL, which a terminal may obey, except newline and tab.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What a progress bar writes first: back to the start of the line, or up to the lines of other bars.
_BAR_MOVES = re.compile("\r|(?:\x1b\\[A)+")


def run(main: Callable[[], None], *, joins: bool = False) -> None:
    """Parses the flags and calls `main`; ends the process. Terminals get control characters escaped.

    Exit codes: 0 done, 2 a user error (`UserError`), 75 stopped on request with everything saved, 130 interrupted,
    1 anything else. With several processes all exit with the code of the first that fails, and with 1 when one dies
    without reporting it.

    Args:
      joins: `main` calls `join`, so that several processes can run the command as one.
    """

    protect_terminals()

    def checked() -> None:
        place = given_place()
        if not joins and (place is not None or (NUM_PROCESSES.value != 1 and processes.launcher() is not None)):
            raise UserError("this command runs as one process: start it once, with --num_processes=1")
        try:
            main()
        except OSError as error:
            if error.errno not in FULL:
                raise
            where = "" if error.filename is None else f" {error.filename}"
            raise UserError(
                f"cannot write{where}: {error.strerror}; free some space and run the same command again"
            ) from None
        processes.finish()

    try:
        app.run(lambda _: checked(), flags_parser=_parse)
    except UserError as error:
        message = escape_controls(str(error))  # also where stderr is a file: it is likely to be shown in a terminal
        if processes.is_one_of_several():
            processes.stop(message, STOPPED)
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # a failed save leaves threads behind that print tracebacks while the interpreter shuts down
    except PreemptedError as request:
        processes.finish()
        print(f"stopped by {request}: the same command goes on from here", file=sys.stderr)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        if processes.is_one_of_several():
            processes.stop("interrupted", INTERRUPTED)
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception:
        if not processes.is_one_of_several():
            raise
        processes.stop("failed, see its traceback", FAILED, escape_controls(traceback.format_exc()))


# --- terminals --------------------------------------------------------------------------------------------------------


def escape_controls(text: str) -> str:
    """`text` with C0 and C1 control characters, except newline and tab, in JSON's form: ESC becomes "\\u001b".

    Prompts, model output, file names and messages quoted from files may hold escape sequences that retitle or clear a
    terminal, hide what follows, or type into it. Lines of JSON stay valid, and equal to the same values.
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def protect_terminals() -> None:
    """Makes stdout and stderr, each where it is a terminal, escape control characters; files and pipes get all text."""
    if sys.stdout is not None and sys.stdout.isatty():
        sys.stdout = cast(TextIO, TerminalWriter(sys.stdout))
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr = cast(TextIO, TerminalWriter(sys.stderr, bars=True))
        logging.get_absl_handler().python_handler.setStream(sys.stderr)  # it keeps the stream that it began with


class TerminalWriter:
    """A text stream that escapes control characters before they reach the terminal behind `stream`.

    Args:
      bars: a write may begin with the cursor movements of tqdm's progress bars.
    """

    def __init__(self, stream: Any, *, bars: bool = False) -> None:
        self._stream: Any = stream._stream if isinstance(stream, TerminalWriter) else stream
        self._bars = bars

    def write(self, text: str) -> int:
        moves = _BAR_MOVES.match(text) if self._bars else None
        start = 0 if moves is None else moves.end()
        self._stream.write(text[:start] + escape_controls(text[start:]))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


# --- flags ------------------------------------------------------------------------------------------------------------


def define_cache_dir() -> "flags.FlagHolder[str]":
    """The flag --cache_dir of commands that read a workdir: its own config must not choose where programs come from."""
    return flags.DEFINE_string(
        "cache_dir", DataConfig.cache_dir, "Directory of compiled programs, which only you may be able to write to."
    )


def output_file(flag: str, path: str) -> Path:
    """The file that a flag names for output, symbolic links resolved, so that one is written through.

    Raises:
      UserError: it is a directory.
    """
    real = Path(os.path.realpath(expand(path)))
    if real.is_dir():
        raise UserError(f"--{flag}={path} is a directory: name a file in it")
    return real


def given_place() -> processes.Place | None:
    """The place among several processes that the flags give; UserError when they contradict each other."""
    return processes.given_place(COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)


def join() -> None:
    """Joins the other processes, if this is one of several: when the flags are checked, before JAX has devices.

    Raises:
      UserError: see `gptjax.distributed.processes`.
    """
    place = given_place()
    if place is None and NUM_PROCESSES.value is None:
        place = processes.detected_place()
    # Process 0 may call its own machine by another name; the config is compared key by key, when it is resolved.
    own = ("process_id", "coordinator_address", "config")
    present = (name for name in flags.FLAGS if flags.FLAGS[name].present)
    same = {f"--{name}": str(flags.FLAGS[name].value) for name in present if name.partition(".")[0] not in own}
    processes.start(place, same)
    protect_terminals()  # process 0 got another stdout


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; `--config.KEY=None` unsets a key, which config_flags itself cannot do for a number."""
    kept, unset = [], []
    for argument in argv:
        name, _, value = argument.partition("=")
        if name.startswith("--config."):
            key = name.removeprefix("--config.")
            check_key(key)
            if value == "None":
                unset.append(key)
                continue
        elif name == "--config":
            argument = f"--config={expand(value)}"
            if not expand(path := value.partition(":")[0]).is_file():
                raise UserError(f"there is no config file {path!r}")
        kept.append(argument)
    try:
        rest = flags.FLAGS(kept)
    except UserError:
        raise
    except Exception as error:  # config_flags raises many kinds for what is, here, always a bad flag
        raise UserError(" ".join(str(error).split())) from None
    if len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    if unset and flags.FLAGS["config"].value is not None:
        flags.FLAGS["config"].value.update_from_flattened_dict(dict.fromkeys(unset))
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # the libraries' info lines drown what we print
    return rest
