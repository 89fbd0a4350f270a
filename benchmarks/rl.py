"""Measures PPO and GRPO on a verifiable reward: the reward that they reach, and their KL from the reference.

    python -m benchmarks.rl --init_from=runs/sft --workdir=runs/rl

Each stage trains with several seeds on completions of the prompts of configs/chatgpt.py:runlocal. Prints for each run
the reward of completions of held-out prompts before and after training, and the KL from the reference; writes them to
WORKDIR/rl.json. Finished runs are not repeated, so that an interrupted benchmark resumes.
"""

import dataclasses
import json
import runpy
from pathlib import Path
from typing import Any

from absl import app, flags

from gptjax import config as c
from gptjax.run import run
from gptjax.training.metrics_file import read_metrics


def main(_: list[str]) -> None:
    root = Path(WORKDIR.value)
    rows = [run_once(stage, seed, root) for stage in STAGES.value for seed in range(SEEDS.value)]
    settings = {name: flags.FLAGS[name].value for name in ("init_from", "reward", "epochs")}
    (root / "rl.json").write_text(json.dumps({"settings": settings, "runs": rows}, indent=2) + "\n")
    print(
        "\n| stage | seed | steps | reward before | reward after | KL after, nats per completion | completion, tokens |"
    )
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        before, after = row["before"], row["after"]
        print(
            f"| {row['stage']} | {row['seed']} | {row['steps']} | {before['reward']:.3f} | {after['reward']:.3f} "
            f"| {after['kl']:.2f} | {before['response_tokens']:.1f} to {after['response_tokens']:.1f} |"
        )


def run_once(stage: str, seed: int, root: Path) -> dict[str, Any]:
    """Trains a run; returns its metrics on held-out prompts at the start and at the end."""
    get_config = runpy.run_path("configs/chatgpt.py")["get_config"]
    config = c.resolve(get_config(f"stage={stage},init_from={INIT_FROM.value},reward={REWARD.value},runlocal"))
    sections: dict[str, dict[str, Any]] = {
        "batch": {"epochs": EPOCHS.value},
        "evaluation": {"every_epochs": None},
        "checkpoint": {"every_epochs": None},
        "logging": {"tensorboard": False},
    }
    workdir = root / f"{stage}-{seed}"
    run(dataclasses.replace(c.replace(config, sections), seed=seed), workdir)
    records = [record for record in read_metrics(workdir)[1] if record["split"] == "validation"]
    return {"stage": stage, "seed": seed, "steps": records[-1]["step"], "before": records[0], "after": records[-1]}


if __name__ == "__main__":
    INIT_FROM = flags.DEFINE_string("init_from", None, "Workdir of a run of stage sft.", required=True)
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory for the runs.", required=True)
    STAGES = flags.DEFINE_list("stages", ["ppo", "grpo"], "Which.")
    SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each.", lower_bound=1)
    EPOCHS = flags.DEFINE_float("epochs", 1.0, "Epochs over the prompts in each run.")
    REWARD = flags.DEFINE_string("reward", "python:examples.rewards.ends_in_question", "As rl.reward.")
    app.run(main)
