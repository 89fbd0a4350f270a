"""Trains each chat stage on several meshes: `chat_on_meshes.py OUT.json one data=2,fsdp=2,tensor=2 ...`.

Writes {mesh: {stage: {"losses": [...], "validation": {...}}}}, with "rewards" and "kl" of ppo and grpo.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax

from gptjax import config as c
from gptjax.parallel.mesh import make_mesh
from gptjax.run import train_stage
from gptjax.stages.builders import build
from gptjax.training.metrics_file import read_metrics
from tests.multi_device.finetune_on_meshes import train
from tests.tiny_chats import DIVISIBLE, STAGES_OF_CHAT, config_of, rl_config, save_divisible


def train_policy(config: c.Config, mesh: jax.sharding.Mesh, workdir: Path) -> dict[str, Any]:
    """Runs a stage that samples its own data; returns its metrics."""
    workdir.mkdir()
    report = train_stage(build(config, mesh, None), mesh, workdir)
    records = read_metrics(workdir)[1]
    rollouts = [record for record in records if record["split"] == "rollout"]
    return {
        "losses": [record["loss"] for record in records if record["split"] == "train"],
        "rewards": [record["reward"] for record in rollouts],
        "kl": [record["kl"] for record in rollouts],
        "validation": report.validation,
    }


def main() -> None:
    out, *names = sys.argv[1:]
    results = {}
    with tempfile.TemporaryDirectory() as directory:
        pretrained = save_divisible(Path(directory) / "pretrained")
        for name in names:
            sizes = {} if name == "one" else {axis: int(n) for axis, n in (part.split("=") for part in name.split(","))}
            for stage in STAGES_OF_CHAT:
                config = config_of(stage, Path(directory), pretrained)
                config = c.replace(config, {"model": DIVISIBLE, "mesh": sizes})
                mesh = make_mesh(config.mesh, jax.devices()[: 1 if name == "one" else None])
                found = train(config, mesh, Path(directory) / f"{name}_{stage}")
                results.setdefault(name, {})[stage] = {key: found[key] for key in ("losses", "validation")}
            for stage in ("ppo", "grpo"):
                config = rl_config(stage, Path(directory), pretrained)
                config = c.replace(config, {"model": DIVISIBLE, "mesh": sizes})
                mesh = make_mesh(config.mesh, jax.devices()[: 1 if name == "one" else None])
                results[name][stage] = train_policy(config, mesh, Path(directory) / f"{name}_{stage}")
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
