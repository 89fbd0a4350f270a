"""What all commands share: flags parsed, a user's mistake answered in one line with exit code 2."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, flags, logging

from gptjax.config import UserError, check_key


def run(main: Callable[[], None]) -> None:
    """Parses the flags and calls `main`; ends the process.

    Exit codes: 0 done, 2 a mistake that the user can mend (`UserError`), 130 interrupted.
    """
    try:
        app.run(lambda _: main(), flags_parser=_parse)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # a failed save leaves threads behind that print tracebacks while the interpreter shuts down
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


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
        elif name == "--config" and not Path(path := value.partition(":")[0]).is_file():
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
