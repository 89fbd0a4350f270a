"""The provenance of a run: command, config, code and machine, the first line of metrics.jsonl."""

import dataclasses
import datetime
import importlib.metadata
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.checkpoint.state import TrainState
from gptjax.config import Config, config_hash
from gptjax.models import peft


def describe_run(config: Config, mesh: Mesh, state: TrainState, flops_per_token: float) -> dict[str, Any]:
    """Returns the header of metrics.jsonl, which describes the run and does not change; JSON-serialisable.

    Args:
      flops_per_token: of a training step.
    """
    return {
        "command": command_line(),
        "stage": config.stage,
        "seed": config.seed,
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "git_commit": git_commit(),
        "config_hash": config_hash(config),
        "parameters": peft.count(state.base) + peft.count(state.params),
        "trained_parameters": peft.count(state.params),
        "flops_per_token": flops_per_token,
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "grain")},
        "config": dataclasses.asdict(config),
    }


def command_line() -> str:
    """Returns the command line of this process, quoted for a shell; modules of the library as `python -m MODULE`."""
    program, *arguments = sys.argv
    path, package = Path(program), Path(__file__).parents[1]
    if path.is_relative_to(package):
        module = ".".join(path.relative_to(package.parent).with_suffix("").parts)
        return shlex.join(["python", "-m", module, *arguments])
    return shlex.join([program, *arguments])


def git_commit() -> str | None:
    """Returns the commit of the library's checkout, with the suffix "-dirty" if files differ; None: no checkout."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip() or None
