"""Measures compilation time and time to the first step as functions of depth.

    python -m benchmarks.compile_time [--depths=12,24,48] [--rounds=3] [--first_step_depths=4,12]
        [--first_step_rounds=1] [--config=configs/gpt2.py:runlocal] [--output=compile_time.json]

The first table is the compilation of the training step alone, without any cache. Scanned layers should cost the same at
any depth; unrolled layers are shown for comparison. Rounds alternate between the programs. The model is narrow, which
changes the cost of a step, but not the program.

The second table is `python -m gptjax.main` as a user starts it, with the config's values except for the depth: seconds
from the command to the record of its first step, including imports, the corpus (already tokenised), and the held-out
loss and sample of step 0. "cold" starts without compiled programs, "warm" with those that the cold run cached. The
processor time of all threads is shown as well, which depends little on other load on the machine.
"""

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from absl import flags

from benchmarks.measuring import alternate, measured_on, ratio, write_json
from gptjax import cli
from gptjax import config as c
from gptjax.checkpoint.state import create_state, state_shardings
from gptjax.parallel.mesh import make_mesh
from gptjax.stages import registry
from gptjax.training.metrics_file import read_metrics
from gptjax.training.step import make_train_step

LayerLoop = Literal["scan", "unroll"]
CONFIG = "configs/gpt2.py:runlocal"
SETTINGS = (
    *("--config.logging.every_steps=1", "--config.logging.tensorboard=false"),
    *("--config.evaluation.every_tokens=None", "--config.checkpoint.every_tokens=None"),
)


def compile_seconds(num_layers: int, layer_loop: LayerLoop) -> float:
    """Measures the seconds to lower and compile the training step of a model with `num_layers` layers."""
    model = c.GPTConfig(
        vocab_size=512, context_length=64, num_layers=num_layers, num_heads=4, embed_dim=64, layer_loop=layer_loop
    )
    config = c.Config(model=model, batch=c.BatchConfig(total_tokens=1, tokens_per_batch=4 * 64))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    tokens_BT = np.zeros((4, 64), np.int32)
    objective = registry.objective(config)
    state = jax.eval_shape(lambda: create_state(objective.parameters, mesh))
    step = make_train_step(objective, state_shardings(objective.parameters, mesh))
    batch = {"tokens": tokens_BT[None], "targets": tokens_BT[None], "weights": np.ones((1, 4, 64), np.float32)}
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        step.lower(state, batch, np.int32(1), {"lr": np.float32(1e-3)}).compile()
        return time.perf_counter() - start


def compile_times(depths: list[int], rounds: int) -> list[dict[str, Any]]:
    """The first table."""
    programs: list[tuple[LayerLoop, int]] = [*(("scan", depth) for depth in depths), ("unroll", depths[0])]
    names = {f"{depth:>3} {layer_loop}": (layer_loop, depth) for layer_loop, depth in programs}
    sides = {name: partial(compile_seconds, depth, layer_loop) for name, (layer_loop, depth) in names.items()}
    seconds, rows = alternate(sides, rounds), []
    base = next(iter(seconds.values()))
    print(f"{'layers':<12} {'median s':>9} {'min':>6} {'max':>6}   median ratio to {depths[0]} scanned, by round")
    for name, times in seconds.items():
        as_long = 1 / ratio(times, base)
        row = f"{statistics.median(times):>9.2f} {min(times):>6.2f} {max(times):>6.2f}   {as_long:.2f}"
        print(f"{name:<12} {row}", flush=True)
        rows.append({"layers": names[name][1], "layer_loop": names[name][0], "seconds": times, "ratio": as_long})
    return rows


def first_step_seconds(config: str, num_layers: int, cache: Path) -> tuple[float, float]:
    """Measures `gptjax.main` up to its first training record, with `cache` as data.cache_dir.

    Returns:
      Wall-clock seconds and processor seconds.

    Raises:
      UserError: it ended before its first record.
    """
    with tempfile.TemporaryDirectory() as workdir:
        command = [sys.executable, "-m", "gptjax.main", f"--config={config}", f"--workdir={workdir}/run", *SETTINGS]
        command += [f"--config.model.num_layers={num_layers}", f"--config.data.cache_dir={cache}"]
        environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        with open(f"{workdir}/said", "w") as said:
            start, used = time.perf_counter(), _processor_seconds()
            process = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
            try:
                while not _has_trained(Path(workdir) / "run"):
                    if process.poll() is not None:
                        lines = Path(said.name).read_text().strip().splitlines()
                        raise c.UserError(f"gptjax.main ended before its first step: {lines[-1] if lines else ''}")
                    time.sleep(0.02)
                took = time.perf_counter() - start
            finally:
                process.kill()
                process.wait()
            return took, _processor_seconds() - used


def _processor_seconds() -> float:
    """Returns the processor time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _has_trained(workdir: Path) -> bool:
    try:
        return any(record["split"] == "train" for record in read_metrics(workdir)[1])
    except (OSError, ValueError, IndexError, c.UserError):  # not there yet
        return False


def first_steps(config: str, depths: list[int], rounds: int) -> list[dict[str, Any]]:
    """The second table."""
    rows = []
    print(f"\n{'first step':<12} {'cold s':>9} {'warm s':>9} {'processor':>16}   of {config}")
    with tempfile.TemporaryDirectory() as directory:
        cache = Path(directory)
        first_step_seconds(config, depths[0], cache)  # prepares the corpus
        for depth in depths:
            times: dict[str, list[tuple[float, float]]] = {"cold": [], "warm": []}
            for _ in range(rounds):
                shutil.rmtree(cache / "compiled")
                for measured in times.values():
                    measured.append(first_step_seconds(config, depth, cache))
            medians = [[statistics.median(values) for values in zip(*pairs, strict=True)] for pairs in times.values()]
            (cold, of_cold), (warm, of_warm) = medians
            print(f"{depth:>3} layers   {cold:>9.1f} {warm:>9.1f} {of_cold:>8.1f} {of_warm:>7.1f}", flush=True)
            rows.append({"layers": depth, "seconds_and_processor_seconds": times})
    return rows


def main() -> None:
    def numbers(values: list[str]) -> list[int]:
        return [int(value) for value in values]

    result = measured_on()
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    if depths := numbers(flags.FLAGS.depths):
        jax.config.update("jax_enable_compilation_cache", False)
        result["compile"] = compile_times(depths, flags.FLAGS.rounds)
        write_json(flags.FLAGS.output, result)
    if depths := numbers(flags.FLAGS.first_step_depths):
        result["first_step"] = first_steps(flags.FLAGS.config, depths, flags.FLAGS.first_step_rounds)
        write_json(flags.FLAGS.output, result)


if __name__ == "__main__":
    flags.DEFINE_list("depths", ["12", "24", "48"], "Depths for the first table; empty: no table.")
    flags.DEFINE_integer("rounds", 3, "Compilations of each program.", lower_bound=1)
    flags.DEFINE_string("config", CONFIG, "Config file of the runs, its arguments after a colon.")
    flags.DEFINE_list("first_step_depths", ["4", "12"], "Depths for the second table; empty: no table.")
    flags.DEFINE_integer("first_step_rounds", 1, "Runs of each depth, cold and warm.", lower_bound=1)
    flags.DEFINE_string("output", None, "Write the measurements to this JSON file.")
    cli.run(main)
