"""Helpers of several benchmarks: alternating rounds, medians and spreads, device and versions, JSON."""

import importlib.metadata
import json
import math
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from gptjax.training.metrics_file import read_metrics

PACKAGES = ("jax", "jaxlib", "flax", "optax", "torch", "transformers")


def seconds(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def alternate(sides: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Measures all sides in each round, so that other load on the machine affects all; returns the results by side."""
    values: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, measure in sides.items():
            values[name].append(measure())
    return values


def ratio(times: Sequence[float], base: Sequence[float]) -> float:
    """Computes the speed relative to `base`: the median of the ratios of the rounds."""
    return statistics.median(b / t for t, b in zip(times, base, strict=True))


def interval(values: Sequence[float]) -> list[float]:
    """Mean of values, such as paired differences, and half the width of its 95 % interval (infinite with one seed)."""
    count = len(values)
    if count == 1:
        return [values[0], math.inf]
    error = float(np.std(values, ddof=1)) / math.sqrt(count)
    return [float(np.mean(values)), float(stats.t.ppf(0.975, count - 1)) * error]


def held_out_curve(workdir: Path) -> dict[str, list[float]]:
    """The held-out losses of a run, with the tokens and the seconds of training before them.

    Seconds are at the median rate: compilation and evaluation are not a model's cost per token.
    """
    _, records = read_metrics(workdir)
    held_out = [record for record in records if record["split"] == "validation"]
    rate = float(np.median([record["tokens_per_second"] for record in records if "tokens_per_second" in record]))
    tokens = [record["tokens"] for record in held_out]
    return {"tokens": tokens, "seconds": [n / rate for n in tokens], "loss": [record["loss"] for record in held_out]}


def product_flops(size: int, dtype: str, repeats: int = 5) -> float:
    """Measures FLOP/s: the fastest of `repeats` products of two random (size, size) matrices on JAX's first device."""
    a_NN, b_NN = jax.random.normal(jax.random.key(0), (2, size, size)).astype(dtype)
    product = _product
    product(a_NN, b_NN).block_until_ready()
    return 2 * size**3 / min(seconds(lambda: product(a_NN, b_NN).block_until_ready()) for _ in range(repeats))


@jax.jit
def _product(a_NN: jax.Array, b_NN: jax.Array) -> jax.Array:
    return jnp.matmul(a_NN, b_NN)


def device_kernels(function: Callable[[], Any], repeats: int) -> list[tuple[str, float, int]]:
    """Profiles `function`; returns (kernel, milliseconds, launches) per one of its `repeats`, the longest first."""
    total: dict[str, float] = defaultdict(float)
    count: dict[str, int] = defaultdict(int)
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            function()
        (path,) = Path(directory).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(path)).planes:
            for line in plane.lines if plane.name.startswith("/device:") else ():
                for event in line.events if (line.name or "").startswith("Stream") else ():
                    total[event.name] += event.duration_ns / 1e6 / repeats
                    count[event.name] += 1
    return sorted(((name, ms, count[name] // repeats) for name, ms in total.items()), key=lambda row: -row[1])


def print_kernels(rows: Sequence[tuple[str, float, int]], shown: int) -> None:
    """Prints the first `shown` results of `device_kernels`, and the sum of all."""
    print(f"{sum(ms for _, ms, _ in rows):.3f} ms and {sum(count for *_, count in rows)} kernels on the device")
    for kernel, ms, count in rows[:shown]:
        print(f"{ms:9.4f} ms {count:5} x {kernel[:100]}")


def measured_on() -> dict[str, Any]:
    """Returns the device and the versions of the libraries."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "cores": os.cpu_count(),
        "versions": versions,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
    }


def write_json(path: str | None, content: Any) -> None:
    """Writes a JSON file atomically, so that it can be updated while a benchmark runs."""
    if path is not None:
        unfinished = Path(path + ".unfinished")
        unfinished.write_text(json.dumps(content, indent=2) + "\n")
        unfinished.replace(path)
