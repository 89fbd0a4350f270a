"""What all commands share: flag parsing, exit codes, one-line user errors, and what may reach a terminal."""

import ast
import errno
import inspect
import os
import re
import select
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TextIO, cast

from absl import app, flags, logging

from gptjax.bucket_client import BucketError
from gptjax.config import Config, DataConfig, UserError, check_key, is_saved, load_config, split_argument
from gptjax.distributed import processes
from gptjax.distributed.peers import FAILED, INTERRUPTED, PREEMPTED, STOPPED
from gptjax.distributed.preemption import PreemptedError
from gptjax.files import expand, followed

# Log levels of libraries, which read them when they are imported: their lines would break the progress bar. Every
# command imports this module before jax.
for _name, _level in {
    "TF_CPP_MIN_LOG_LEVEL": "2",  # XLA: errors only
    "TPU_MIN_LOG_LEVEL": "3",  # libtpu, which complains on machines without TPUs
    "TPU_STDERR_LOG_LEVEL": "3",
    "GRPC_VERBOSITY": "ERROR",
    "GLOG_minloglevel": "2",
}.items():
    os.environ.setdefault(_name, _level)

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # a full disk, quota or file size limit

CLOSED_PIPE = 128 + signal.SIGPIPE  # as shells report it

COORDINATOR_ADDRESS = flags.DEFINE_string(
    "coordinator_address", None, "With several processes: HOST:PORT, a free port of process 0's machine."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "Number of processes; 1: this one only.")
PROCESS_ID = flags.DEFINE_integer("process_id", None, "With several processes: the index of this one, from 0.")


# C0 and C1 control characters and DEL, which a terminal may obey, except newline and tab.
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f]")
# What a progress bar writes first: back to the start of the line, or up to the lines of other bars.
_BAR_MOVES = re.compile("\r|(?:\x1b\\[A)+")


def run(main: Callable[[], None], *, joins: bool = False, takes_paths: bool = False) -> None:
    """Parses the flags and calls `main`; ends the process. Terminals get control characters escaped.

    Exit codes: 0 done, 2 a user error (`UserError`), 75 stopped on request with everything saved, 130 interrupted, 141
    the reader of stdout has ended, as `head` does, 1 anything else. With several processes all exit with the code of
    the first that fails, and with 1 when one dies without reporting it.

    Args:
      joins: `main` calls `join`, so that several processes can run the command as one.
      takes_paths: the command has arguments other than flags, which `paths` returns.
    """

    protect_terminals()

    def checked() -> None:
        place = given_place()
        if not joins and (place is not None or (NUM_PROCESSES.value != 1 and processes.launcher() is not None)):
            raise UserError("this command runs as one process: start it once, with --num_processes=1")
        try:
            main()
            sys.stdout.flush()
        except BucketError as error:
            raise UserError(f"{error.filename}: {error.strerror}") from None
        except OSError as error:
            if error.errno not in FULL:
                raise
            where = "" if error.filename is None else f" {error.filename}"
            raise UserError(
                f"cannot write{where}: {error.strerror}; free some space and run the same command again"
            ) from None
        processes.finish()

    try:
        app.run(lambda _: checked(), flags_parser=lambda argv: _parse(argv, main, joins, takes_paths))
    except UserError as error:
        message = escape_controls(str(error))  # a file too is likely to be shown in a terminal
        if processes.is_one_of_several():
            processes.stop(message, STOPPED)
        print(f"error: {message}", file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(2)  # a failed save leaves threads behind that print tracebacks while the interpreter shuts down
    except PreemptedError as request:
        processes.finish()
        print(f"stopped by {request}: the same command resumes", file=sys.stderr)
        sys.exit(PREEMPTED)
    except KeyboardInterrupt:
        if processes.is_one_of_several():
            processes.stop("interrupted", INTERRUPTED)
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except Exception as error:
        if not processes.is_one_of_several():
            if isinstance(error, BrokenPipeError) and _has_no_reader(sys.stdout):
                os._exit(CLOSED_PIPE)  # the interpreter would flush stdout once more, and complain
            raise
        processes.stop("failed, see its traceback", FAILED, escape_controls(traceback.format_exc()))


def _has_no_reader(stream: TextIO) -> bool:
    """Whether `stream` is a pipe whose reader has ended."""
    poll = select.poll()
    poll.register(stream, 0)
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


# --- terminals --------------------------------------------------------------------------------------------------------


def escape_controls(text: str) -> str:
    """Escapes C0 and C1 control characters, except newline and tab, as JSON does: ESC becomes "\\u001b".

    Prompts, model output, file names and messages quoted from files may hold escape sequences that retitle or clear a
    terminal, hide what follows, or type into it. Lines of JSON stay valid, and equal to the same values.
    """
    return _CONTROLS.sub(lambda match: f"\\u{ord(match[0]):04x}", text)


def protect_terminals() -> None:
    """Makes stdout and stderr escape control characters where they are terminals, not where they are files or pipes."""
    if sys.stdout is not None and sys.stdout.isatty():
        sys.stdout = cast(TextIO, TerminalWriter(sys.stdout))
    if sys.stderr is not None and sys.stderr.isatty():
        sys.stderr = cast(TextIO, TerminalWriter(sys.stderr, bars=True))
        logging.get_absl_handler().python_handler.setStream(sys.stderr)  # it keeps the stream it was created with


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
    """Defines --cache_dir for commands that read a workdir, whose config must not choose where programs come from."""
    return flags.DEFINE_string(
        "cache_dir", DataConfig.cache_dir, "Directory of compiled programs, which only you may be able to write to."
    )


class CheckpointFlags:
    """The flags --step and --best of a command that reads the weights of a workdir."""

    def __init__(self) -> None:
        self._step = flags.DEFINE_integer("step", None, "Use the checkpoint of this step.", lower_bound=0)
        self._best = flags.DEFINE_bool("best", False, "Use the best checkpoint, by evaluation.metric, not the newest.")

    @property
    def best(self) -> bool:
        """Whether --best is given; UserError if --step is too."""
        if self._best.value and self._step.value is not None:
            raise UserError(f"--step={self._step.value} and --best exclude each other")
        return bool(self._best.value)

    @property
    def step(self) -> int | None:
        """The step to read; None: --step is not given."""
        return self._step.value


def output_file(flag: str, path: str) -> Path:
    """Returns the output file that a flag names; symbolic links are resolved, so that their targets are written.

    Raises:
      UserError: it is a directory.
    """
    real = followed(expand(path))
    if real.is_dir():
        raise UserError(f"--{flag}={path} is a directory: name a file in it")
    return real


def given_place() -> processes.Place | None:
    """Returns the place among several processes that the flags give; UserError if they contradict each other."""
    return processes.given_place(COORDINATOR_ADDRESS.value, NUM_PROCESSES.value, PROCESS_ID.value)


def join() -> None:
    """Joins the other processes if this is one of several; call it once the flags are checked, before JAX has devices.

    Raises:
      UserError: see `gptjax.distributed.processes`.
    """
    place = given_place()
    if place is None and NUM_PROCESSES.value is None:
        place = processes.detected_place()
    # Process 0 may know its own machine by another name; configs are compared key by key once they are resolved.
    own = ("process_id", "coordinator_address", "config")
    present = (name for name in flags.FLAGS if flags.FLAGS[name].present)
    same = {f"--{name}": str(flags.FLAGS[name].value) for name in present if name.partition(".")[0] not in own}
    processes.start(place, same)
    protect_terminals()  # process 0 got another stdout


_PROCESS_FLAGS = ("coordinator_address", "num_processes", "process_id")
_overrides: dict[str, str] = {}  # of --config.KEY=VALUE, in the order given


class ConfigFlag:
    """The flags --config and --config.KEY=VALUE of a command."""

    defined = False

    def __init__(self, default: str | None = None) -> None:
        ConfigFlag.defined = True
        self._path = flags.DEFINE_string(
            "config", default, "Config file, its arguments after a colon; or a workdir or config.json to take it from."
        )

    def load(self, workdir: Path | None = None) -> Config | None:
        """The config that the flags give; None where --config is not given and `workdir` has none.

        Args:
          workdir: whose saved config to use where --config is not given.

        Raises:
          UserError: as `load_config`.
        """
        path = self._path.value
        if path is None and workdir is not None and (workdir / "config.json").exists():
            path = str(workdir)
        return None if path is None else load_config(path, _overrides)

    @property
    def path(self) -> str | None:
        """The value of --config."""
        return self._path.value

    @property
    def overrides(self) -> dict[str, str]:
        """The values of --config.KEY=VALUE by key."""
        return dict(_overrides)

    def compiled_programs_dir(self) -> Path:
        """The cache directory of compiled programs: a saved config, maybe someone else's, must not choose it."""
        path = self._path.value
        if path is not None and not is_saved(path):
            return expand(load_config(path, _overrides).data.cache_dir)
        return expand(_overrides.get("data.cache_dir", DataConfig.cache_dir))


_paths: list[str] = []  # the arguments that are no flags


def paths() -> list[str]:
    """Returns the arguments of a command that `takes_paths`."""
    return list(_paths)


def _parse(argv: list[str], main: Callable[[], None], joins: bool, takes_paths: bool) -> list[str]:
    """Parses the flags; --help prints and exits with code 0."""
    for argument in argv[1:]:
        name, _, value = argument.partition("=")
        if name in ("--help", "-h", "-help", "--helpshort"):
            _print_help(main, joins, value or None, [other for other in argv if other is not argument])
            sys.exit(0)
    flags.FLAGS.set_gnu_getopt(takes_paths)  # flags may follow paths
    try:
        rest = flags.FLAGS(_take_overrides(argv) if ConfigFlag.defined else argv)
    except UserError:
        raise
    except flags.Error as error:
        raise UserError(" ".join(str(error).split())) from None
    if takes_paths:
        _paths[:] = rest[1:]
    elif len(rest) > 1:
        raise UserError(f"unexpected argument {rest[1]!r}: flags are written --name=value")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)  # hides the info lines of libraries
    return rest


def _take_overrides(argv: list[str]) -> list[str]:
    """Moves --config.KEY=VALUE to `_overrides`; a bool may be written --config.KEY and --noconfig.KEY."""
    kept, arguments = [], iter(argv)
    for argument in arguments:
        name, has_value, value = argument.partition("=")
        flag, _, key = name.partition(".")
        if flag.lstrip("-") not in ("config", "noconfig") or not flag.startswith("-") or not key:
            kept.append(argument)
            continue
        check_key(key)
        if flag.lstrip("-") == "noconfig":
            value = "false"
        elif not has_value:
            section, _, field = key.rpartition(".")
            default = getattr(getattr(Config(), section) if section else Config(), field)
            value = "true" if isinstance(default, bool) else next(arguments, "")
            if value == "" or value.startswith("--"):
                raise UserError(f"--config.{key} needs a value: --config.{key}={default}")
        _overrides[key] = value
    return kept


# --- help -------------------------------------------------------------------------------------------------------------


def _print_help(main: Callable[[], None], joins: bool, section: str | None, argv: list[str]) -> None:
    """Prints the command's description and flags and, where it takes a config, the arguments and keys of that."""
    from gptjax.config.reference import plain_text

    module = inspect.getmodule(main)
    config, file = None, None
    if ConfigFlag.defined:
        path = flags.FLAGS["config"].default
        for argument in _take_overrides(argv):
            name, _, value = argument.partition("=")
            path = value if name in ("--config", "-config") else path
        if path is not None:
            config = load_config(path, _overrides)
            file = None if is_saved(path) else split_argument(path)[0]
    keys = plain_text(section, config) if ConfigFlag.defined else ""
    if section is not None:
        if not ConfigFlag.defined:
            raise UserError(f"--help={section}: this command takes no config")
        print(keys)
        return
    print(f"{(inspect.getdoc(module) or '').strip()}\n\nflags:\n{_flags_help(joins)}")
    if file is not None:
        print(f"\narguments of {file}, as in --config={file}:key=value,...\n  {_arguments_of(file)}")
        print(textwrap.indent(ast.get_docstring(ast.parse(file.read_text())) or "", "  "))
    elif ConfigFlag.defined:
        print("\nWith --config=FILE --help shows the arguments of that file too, and its values of the keys.")
    if keys:
        print(f"\nconfig keys; --help=SECTION shows one section\n\n{keys}")


def _flags_help(joins: bool) -> str:
    """The command's own flags, in the order of their definition, with those of several processes at the end."""
    own = []
    for module, defined in flags.FLAGS.flags_by_module_dict().items():
        if module in (sys.argv[0], "__main__") or module.startswith(("gptjax.", "benchmarks.")):
            own += [flag for flag in defined if joins or flag.name not in _PROCESS_FLAGS]
    lines = []
    for flag in sorted(own, key=lambda flag: flag.name in _PROCESS_FLAGS):
        default = "" if flag.default in (None, "", False, []) else f" Default: {flag.default_as_str}."
        lines.append(f"  --{flag.name}")
        lines += textwrap.wrap(flag.help + default, 110, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join(lines)


def _arguments_of(file: Path) -> str:
    """The arguments that a config file passes to `parse_arg`, with their defaults."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("parse_arg"):
            return ", ".join(f"{word.arg}={ast.unparse(word.value)}" for word in node.keywords if word.arg is not None)
    return "none"
