"""Resumes small runs with randomly changed configs: `python -m benchmarks.resume_pairs --pairs=200`.

A pair is a change of one to three fields, out of all fields of the config, and a run of one of several stages that is
resumed with it from its newest checkpoint: by `python -m gptjax.main`, first without and then with
--allow_config_changes. Each command must end with exit code 0 and have resumed from that checkpoint, or with exit code
2 and one line that names a changed field. No traceback, no moved, deleted or changed checkpoint is allowed, except
those that a change of checkpoint.keep_last deletes. Values are derived from the type and the current value of a field:
0, negative numbers, None, other choices, not a number, infinity, and text that is not of the field's type.

The commands are forks of this process, which imports the libraries once and starts no JAX backend.
"""

import dataclasses
import hashlib
import math
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import typing
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

from absl import app, flags

from gptjax.config import Config, UserError, overridden, read_config, replace, resolve
from gptjax.config.saved import to_tree

PAIRS = flags.DEFINE_integer("pairs", 200, "Pairs of a change and a resume.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Seed of the changes.")
DIRECTORY = flags.DEFINE_string("directory", None, "Directory of the runs, used again; default: a temporary one.")
ONLY = flags.DEFINE_multi_integer("only", [], "Numbers of the pairs to run; default: all.")

LIMIT = 180  # seconds of processor time of a command
# The more a stage costs to compile, the fewer pairs it has.
STAGES = ("pretrain", "finetune", "pretrain", "sft", "pretrain", "dpo", "pretrain", "finetune", "pretrain", "sft") * 2
STAGES = (*STAGES[:-3], "reward", "ppo", "grpo")
# Compiled quickly: most of the time is compilation.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "XLA_FLAGS": "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true",
    "WANDB_MODE": "offline",
}


# --- changes ----------------------------------------------------------------------------------------------------------


def fields(section: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (key, declared type, current value) of all fields of a config."""
    hints = typing.get_type_hints(type(section))
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from fields(value, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, hints[field.name], value


def values(hint: Any, value: Any) -> list[str]:
    """Other values of a field, as text on the command line; some are invalid."""
    kind = next((part for part in typing.get_args(hint) if part is not type(None)), hint)
    if type(None) not in typing.get_args(hint):
        kind = hint
    found: list[Any] = ["None", "nonsense"]
    if typing.get_origin(kind) is Literal:
        found += typing.get_args(kind)
    elif kind is bool:
        found += ["true", "false"]
    elif kind is int:
        number = 4 if value is None else value
        found += [0, -1, 1, number + 1, 2 * number, number // 2]
    elif kind is float:
        number = 0.5 if value is None else value
        found += [0.0, -1.0, 1.0, 2.0 * number, number / 2, math.nan, math.inf]
    elif kind is str:
        found += ["", "/proc/does/not/exist", f"{value}x"]
    else:
        text: dict[str, list[Any]] = {
            "tuple[str, ...]": [("nonsense",), ("(",)],
            "tuple[float, ...]": [(1.0,), (-1.0, 2.0)],
        }
        pairs: list[Any] = [(("nothing", 1),), (("(", 1.0),), ((".*", -1.0),), (("text", "text"),)]
        found += [(), *text.get(str(kind), pairs)]
    now = {True: "true", False: "false"}.get(value, str(value)) if isinstance(value, bool) else str(value)
    return [text for text in map(str, found) if text != now]


def changes(config: Config, rng: random.Random) -> dict[str, str]:
    """One to three fields of a config with new values; most that are refused before anything is read are resampled."""
    while True:
        chosen = rng.sample(list(fields(config)), rng.choice((1, 1, 2, 3)))
        changed = {key: rng.choice(values(hint, value)) for key, hint, value in chosen}
        try:
            resolve(overridden(to_tree(config), changed))
        except UserError:
            if rng.random() < 0.5:
                continue
        return changed


# --- commands ---------------------------------------------------------------------------------------------------------


def forked(function: Callable[[], None], directory: Path, limit: int = LIMIT) -> tuple[int, str, str]:
    """Calls `function` in a fork, in `directory`; returns its exit code (negative: a signal), stdout and stderr."""
    out, err = directory / "stdout", directory / "stderr"
    child = os.fork()
    if child == 0:
        code: Any = 0
        try:
            os.chdir(directory)
            for path, number in ((Path(os.devnull), 0), (out, 1), (err, 2)):
                file = os.open(path, os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
                os.dup2(file, number)
            sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
            resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
            function()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except BaseException:
            traceback.print_exc()
            code = 1
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    deadline = time.monotonic() + 10 * limit
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1]), out.read_text(errors="replace"), err.read_text(errors="replace")


def command(*arguments: str) -> Callable[[], None]:
    """`python -m gptjax.main arguments...`, as a function."""

    def run() -> None:
        import logging
        import runpy

        logging.root.handlers.clear()  # absl's own are those of the command
        sys.argv = ["", *arguments]
        runpy.run_module("gptjax.main", run_name="__main__", alter_sys=True)

    return run


# --- runs -------------------------------------------------------------------------------------------------------------


def configs(directory: Path) -> dict[str, Config]:
    """The config of a small run of each stage, in the order in which they can be trained."""
    from tests.tiny_chats import config_of, rl_config
    from tests.tiny_runs import tiny_config
    from tests.tiny_tasks import run_config, save_pretrained, with_method

    shutil.rmtree(directory / "text", ignore_errors=True)
    pretrained = save_pretrained(directory / "pretrained")
    found = {
        "pretrain": tiny_config(directory),
        "finetune": with_method(run_config(directory, "classification", pretrained), "lora"),
        **{stage: config_of(stage, directory, pretrained) for stage in ("sft", "reward", "dpo")},
    }
    found |= {stage: rl_config(stage, directory, directory / "sft", directory / "reward") for stage in ("ppo", "grpo")}
    saving = {"checkpoint": {"every_tokens": 1, "keep_last": 20}, "evaluation": {"sample_tokens": 0}}
    return {stage: replace(config, saving) for stage, config in found.items()}


def make_runs(directory: Path) -> None:
    """Trains a run of each stage in `directory`, unless that was done before."""
    from gptjax.run import run

    for stage, config in configs(directory).items():
        if not (mark := directory / f"{stage}.made").exists():
            run(config, directory / stage)
            mark.touch()


def copy_half(source: Path, workdir: Path) -> None:
    """Copies a run without the later half of its checkpoints."""
    shutil.copytree(source, workdir)
    for step in steps(workdir):
        if step > max(1, max(steps(source)) // 2):
            shutil.rmtree(workdir / "checkpoints" / str(step))


def steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in workdir.glob("checkpoints/*") if path.name.isdecimal())


def digests(workdir: Path) -> dict[int, str]:
    """The SHA-256 of the names and contents of the files of each checkpoint, by step."""
    found = {}
    for step in steps(workdir):
        digest = hashlib.sha256()
        for path in sorted((workdir / "checkpoints" / str(step)).rglob("*")):
            digest.update(str(path.relative_to(workdir)).encode() + b"\0")
            digest.update(path.read_bytes() if path.is_file() else b"")
        found[step] = digest.hexdigest()
    return found


def problem_of(workdir: Path, changed: dict[str, str], allowed: bool, before: dict[int, str]) -> tuple[str, str]:
    """Resumes a run with changes; returns how it ended, and what is wrong with that ("": nothing)."""
    arguments = [f"--workdir={workdir}", *(f"--config.{key}={value}" for key, value in changed.items())]
    code, out, err = forked(command(*arguments, *(["--allow_config_changes"] if allowed else [])), workdir.parent)
    lines = [line for line in err.splitlines() if line.startswith("error: ")]
    resumed = re.findall(r"resuming from step (\d+)", out + err)
    after = digests(workdir)
    kept = {step: after.get(step) for step in before}
    if "checkpoint.keep_last" in changed and code == 0:
        kept = {step: digest if digest is not None else before[step] for step, digest in kept.items()}
    if code < 0:
        return "hung", f"no end after {LIMIT} s\n{out[-2000:]}{err[-2000:]}"
    if "Traceback" in out + err or code not in (0, 2):
        return "traceback", f"exit code {code}\n{err[-3000:]}"
    if kept != before or any((workdir / name).exists() for name in ("damaged", "earlier")):
        return "lost", f"checkpoints {sorted(before)} became {sorted(after)}\n{err[-2000:]}"
    if code == 0:
        wrong = "" if resumed == [str(max(before))] else f"resumed from {resumed}, not {max(before)}\n{out[-1000:]}"
        return "resumed", wrong or ("" if allowed else "resumed although the config differs\n")
    wrong = "" if len(lines) == 1 and any(key in lines[0] for key in changed) else "no line that names a field\n" + err
    return "stopped by name while training" if resumed else "refused by name", wrong


def main(_: list[str]) -> None:
    begin = time.monotonic()
    # Once, for all forks.
    import matplotlib.pyplot  # noqa: F401

    import gptjax.run  # noqa: F401

    with tempfile.TemporaryDirectory(prefix="resume_pairs_") as name:
        directory = Path(DIRECTORY.value or name).absolute()
        os.environ.update(ENVIRONMENT, HOME=name, JAX_COMPILATION_CACHE_DIR=str(directory / "compiled"))
        code, _out, err = forked(lambda: make_runs(directory), directory, 10 * LIMIT)
        if code != 0:
            raise SystemExit(err)
        print(f"the runs are made after {time.monotonic() - begin:.0f} s", flush=True)
        outcomes: dict[bool, Counter[str]] = {False: Counter(), True: Counter()}
        named, failures = set[str](), 0
        for number in ONLY.value or range(PAIRS.value):
            stage, rng = STAGES[number % len(STAGES)], random.Random(f"{SEED.value} {number}")
            place = Path(name) / "pair"
            copy_half(directory / stage, place / "run")
            changed, before = changes(read_config(place / "run"), rng), digests(place / "run")
            named |= changed.keys()
            for allowed in (False, True):
                ended, problem = problem_of(place / "run", changed, allowed, before)
                outcomes[allowed][ended] += 1
                print(f"pair {number}, {stage}, {changed}, allowed={allowed}: {ended}", flush=True)
                if problem:
                    failures += 1
                    print(f"FAILURE: {problem}", flush=True)
            shutil.rmtree(place)
    for allowed, counts in outcomes.items():
        print(f"{'with' if allowed else 'without'} --allow_config_changes: {dict(counts)}")
    print(f"{len(named)} of {sum(1 for _ in fields(Config()))} fields changed at least once; {failures} failures")
    print(f"took {(time.monotonic() - begin) / 60:.1f} minutes")
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    app.run(main)
