"""Measures the policies of the sweep by the gold reward, and writes results.json and the figure.

python -m experiments.instructgpt.measure --root=runs/instructgpt
"""

import statistics
from pathlib import Path

import numpy as np
from absl import app, flags

from experiments import policies
from experiments.instructgpt.gold import gold_reward, read_dictionary
from experiments.instructgpt.sweep import COMPLETION, POLICIES, SEEDS
from experiments.study import Claim, Panel, report, runs_by, workdirs
from gptjax.data.conversations import read_prompts
from gptjax.stages.preference.reward_scorer import load_reward_model

ROOT = flags.DEFINE_string("root", "runs/instructgpt", "Directory of the data and of all runs.")
OUTPUT = flags.DEFINE_string("output", str(Path(__file__).parent), "Directory of results.json and the figure.")

NAMES = {"ppo": "PPO", "ppo_ptx": "PPO-ptx", "dpo": "DPO", "grpo": "GRPO", "ppo_without_kl": "PPO without KL"}
TRACED = ("ppo", "ppo_ptx", "ppo_without_kl")  # methods whose every checkpoint is measured


class Judge:
    """Measures checkpoints on the same held-out prompts and text."""

    def __init__(self, root: Path) -> None:
        self._dictionary = read_dictionary(root / "data")
        self._prompts = read_prompts(f"jsonl:{root}/data/held_out.jsonl")
        self._text = f"jsonl:{root}/data/held_out_text.jsonl"
        self._start = policies.policy_of(root / "sft")
        self._rewards = {s: load_reward_model(root / f"rewards/seed={s}", self._start.mesh, 64) for s in SEEDS}

    def point(self, policy, seed: int) -> dict:
        """Gold reward of each prompt, means of proxy reward and KL divergence, and the loss on text."""
        found = policies.complete(policy, self._start, self._prompts, COMPLETION)
        pairs = zip(self._prompts, found.texts, strict=True)
        return {
            "gold": np.array([gold_reward(p.messages[-1].content, text, self._dictionary) for p, text in pairs]),
            "proxy": float(found.rewards(self._rewards[seed]).mean()),
            "kl": max(0.0, float(found.kl.mean())),
            "text": policies.text_loss(policy, self._text),
            "shown": found.texts[:6],
        }
