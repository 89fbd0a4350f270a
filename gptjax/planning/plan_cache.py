"""What was compiled once, kept: a plan asked for again is there at once."""

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
from gptjax.planning.compile import Compiled, Fits, Memory, TooBig
from gptjax.planning.program_text import Collective
from gptjax.planning.topology import Topology

DIRECTORY = Path("~/.cache/gptjax/plans")
# The code that the compiled programs, and what is read out of them, depend on.
SOURCES = (
    *("models/*.py", "training/**/*.py", "parallel/*.py", "inference/*.py"),
    *(f"planning/{name}.py" for name in ("compile", "decoding", "program_text")),
)


def compiled(
    what: str, config: Config, topology: Topology, directory: Path | None, make: Callable[[], Compiled]
) -> Compiled:
    """What `make` compiles, or what it compiled for the same key before.

    Args:
      what: names the program, with all that it depends on besides the arguments that follow.
      config: of which the parts count that a program depends on.
      directory: of the cache; None: compile, and keep nothing.
    """
    if directory is None:
        return make()
    path = directory.expanduser() / f"{key(what, config, topology)}.json"
    try:
        return _read(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError):  # not there, or damaged
        result = make()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = unfinished_path(path)
        unfinished.write_text(json.dumps({"what": what, "topology": topology.name} | _write(result)))
        unfinished.replace(path)
        return result


def key(what: str, config: Config, topology: Topology) -> str:
    """Of the program, the sizes it is compiled for, the versions of compiler and libraries, and the source code."""
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


def _write(result: Compiled) -> dict[str, Any]:
    return {"fits": isinstance(result, Fits), "result": dataclasses.asdict(result)}


def _read(tree: dict[str, Any]) -> Compiled:
    result = tree["result"]
    if not tree["fits"]:
        return TooBig(**result)
    found = [Collective(**{**item, "members": tuple(item["members"])}) for item in result["collectives"]]
    return Fits(Memory(**result["memory"]), found, result["seconds"])
