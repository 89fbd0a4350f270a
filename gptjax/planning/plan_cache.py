"""Disk cache of compilation results: a repeated plan compiles nothing."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gptjax
from gptjax.config import Config
from gptjax.files import unfinished_path
from gptjax.planning.compile import CompiledProgram, CompileResult, DeviceMemory, OutOfMemory
from gptjax.planning.program_text import Collective
from gptjax.planning.topology import Topology

DIRECTORY = Path("~/.cache/gptjax/plans")
# The source files that compiled programs and the numbers read from them depend on.
SOURCES = (
    *("stages/**/*.py", "training/*.py", "checkpoint/*.py", "inference/*.py", "optim/*.py", "losses/*.py"),
    *("models/*.py", "parallel/*.py"),
    *(f"planning/{name}.py" for name in ("compile", "decode_plan", "program_text")),
)


def compile_cached(
    what: str, config: Config, topology: Topology, directory: Path | None, make: Callable[[], CompileResult]
) -> CompileResult:
    """Returns the cached result for a program, or compiles it with `make` and caches the result.

    Args:
      what: name of the program, including everything it depends on that the other arguments do not say.
      config: only the sections that a program depends on are part of the key.
      directory: of the cache; None disables it.
    """
    if directory is None:
        return make()
    path = directory.expanduser() / f"{key(what, config, topology)}.json"
    try:
        return _read(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # missing or damaged
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_path(path)
        unfinished.write_text(json.dumps({"what": what, "topology": topology.name} | _write(result)))
        unfinished.replace(path)
        return result


def key(what: str, config: Config, topology: Topology) -> str:
    """Computes the cache key: a hash of program, sizes, topology, library versions and source code."""
    batch = (config.sequences_per_microbatch, config.batch.tokens_per_batch)
    parts = (config.model, config.optimizer, config.mesh, config.data.packing, batch, topology)
    return hashlib.sha256(repr((what, parts, _versions(), _source())).encode()).hexdigest()[:24]


def _versions() -> list[str]:
    names = ("jax", "jaxlib", "libtpu", "flax", "optax")
    found = {dist.name: dist.version for dist in map(_distribution, names) if dist is not None}
    return [f"{name} {version}" for name, version in found.items()]


def _distribution(name: str) -> importlib.metadata.Distribution | None:
    try:
        return importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None


@functools.cache
def _source() -> str:
    root = Path(gptjax.__file__).parent
    files = sorted(path for pattern in SOURCES for path in root.glob(pattern))
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()


def _write(result: CompileResult) -> dict[str, Any]:
    return {"fits": isinstance(result, CompiledProgram), "result": dataclasses.asdict(result)}


def _read(tree: dict[str, Any]) -> CompileResult:
    result = tree["result"]
    if not tree["fits"]:
        return OutOfMemory(**result)
    found = [Collective(**{**item, "members": tuple(item["members"])}) for item in result["collectives"]]
    return CompiledProgram(DeviceMemory(**result["memory"]), found, result["seconds"])
