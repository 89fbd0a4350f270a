"""Measures the phases before the first step: `python -m benchmarks.startup`.

Prints the wall-clock seconds of each phase of a new, small run in this process: imports (by package), config, data,
initialisation, compilation, first step. Compiled programs are read from the cache only with --warm_cache; without it,
compilation takes as long as in a first run. The machine should be idle.
"""

import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from absl import flags

from gptjax import cli
from gptjax.files import expand

CONFIG = cli.ConfigFlag("configs/gpt2.py:runlocal")
COMMANDS = ("main", "generate", "chat", "evaluate", "predict", "convert", "plan", "replay")
WARM_CACHE = flags.DEFINE_bool("warm_cache", False, "Read compiled programs from the cache of data.cache_dir.")
MIN_SECONDS = 0.05  # packages that take less are summed up


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Prints the seconds that the body takes."""
    start = time.perf_counter()
    yield
    print(f"{name:<34} {time.perf_counter() - start:8.2f} s", flush=True)


def import_times(module: str) -> dict[str, float]:
    """Imports `module` in a new process; returns the seconds that the modules of each package take."""
    command = [sys.executable, "-X", "importtime", "-c", f"import {module}"]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    seconds: dict[str, float] = defaultdict(float)
    for line in report.splitlines():
        own, _, name = line.removeprefix("import time:").split("|")
        if own.strip().isdecimal():
            seconds[name.strip().partition(".")[0]] += int(own) / 1e6
    return dict(seconds)


def print_imports() -> None:
    """Prints the import seconds of each command's --help, and of a run by package."""
    for name in ("gptjax", *(f"gptjax.{command}" for command in COMMANDS)):
        print(f"import {name:<27} {sum(import_times(name).values()):8.2f} s", flush=True)
    times = import_times("gptjax.run")
    print(f"\nimport gptjax.run, by package{sum(times.values()):13.2f} s")
    for package, seconds in sorted(times.items(), key=lambda item: -item[1]):
        if seconds >= MIN_SECONDS:
            print(f"  {package:<32} {seconds:8.2f} s")
    print()


def print_phases() -> None:
    """Prints the seconds of each phase of a run, up to its first steps."""
    with phase("config"):
        config = CONFIG.load()
        assert config is not None, "the flag has a default"
    with phase("import gptjax.run"):
        import jax

        from gptjax.checkpoint.manager import Checkpoints
        from gptjax.parallel import program_cache
        from gptjax.parallel.mesh import make_mesh
        from gptjax.stages import builders
        from gptjax.stages.start import start_state
        from gptjax.training.step import Stepper
    if WARM_CACHE.value:
        program_cache.use(expand(config.data.cache_dir))
    with phase("devices"):
        mesh = make_mesh(config.mesh)
    with phase("data"):
        stage = builders.build(config, mesh, None)
    with tempfile.TemporaryDirectory() as directory, jax.set_mesh(mesh):
        with phase("initialisation"), Checkpoints(Path(directory), stage.config.checkpoint) as checkpoints:
            state, position = start_state(stage.objective.parameters, mesh, checkpoints)
            jax.block_until_ready(state)
        stepper = Stepper(stage.objective, mesh, stage.total_tokens, print)
        stepper.start(state, position.examples, position.tokens, stage.batches(0, None))
        with phase("first step, compilation included"):
            jax.block_until_ready(stepper.take().metrics)
        with phase("second step"):
            jax.block_until_ready(stepper.take().metrics)


def main() -> None:
    print_imports()
    print_phases()


if __name__ == "__main__":
    cli.run(main)
