"""What all commands share: flags parsed, a user's mistake answered in one line with exit code 2."""

import errno
import os
import sys
import traceback
from collections.abc import Callable

from absl import app, flags, logging

from gptjax.config import UserError, check_key
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


def run(main: Callable[[], None], *, joins: bool = False) -> None:
    """Parses the flags and calls `main`; ends the process.

    Exit codes: 0 done, 2 a mistake that the user can mend (`UserError`), 75 stopped on request with all of it saved,
    130 interrupted, 1 anything else. Of several processes all end with the code of the first that fails; 1 when one is
    gone without a word.

    Args:
      joins: `main` calls `join`, so that several processes can run the command as one.
    """

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
        if processes.is_one_of_several():
            processes.stop(str(error), STOPPED)
        print(f"error: {error}", file=sys.stderr, flush=True)
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
        processes.stop("failed, see its traceback", FAILED, traceback.format_exc())


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
