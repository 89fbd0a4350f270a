"""Workdirs of finished runs whose losses follow a known law, without training."""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

from gptjax import config as c
from gptjax.config import Config, to_json
from gptjax.scaling.flops import flops_per_token

LADDER = runpy.run_path(str(Path(__file__).parents[1] / "configs" / "ladder.py"))
STARTED = "2026-01-02T03:04:05+00:00"


def law(flops: float) -> float:
    """L(C) = a C^b + c."""
    return 60 * flops**-0.15 + 0.9


def ladder_config(rung: str, **batch: Any) -> Config:
    config = c.resolve(LADDER["get_config"](f"rung={rung}"))
    return c.replace(config, {"batch": batch})


def write_run(directory: Path, config: Config, started: str = STARTED, evaluations: int = 4) -> Path:
    """Writes the config.json and metrics.jsonl of a run that followed `law` and ended with a whole batch."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(to_json(config))
    batch, total = config.batch.tokens_per_batch, config.batch.total_tokens or 0
    steps = -(-total // batch)
    lines: list[dict[str, Any]] = [{"run": {"started": started, "config": dataclasses.asdict(config)}}]
    for i in range(evaluations + 1):
        step = steps * i // evaluations
        tokens = step * batch
        loss = law(flops_per_token(config.model) * tokens) if tokens else 5.5
        lines.append({"step": step, "tokens": tokens, "split": "validation", "seconds": float(step), "loss": loss})
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return directory
