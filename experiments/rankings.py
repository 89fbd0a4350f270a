"""Ranks completions of a policy by a program, which takes the place of the labellers.

    python -m experiments.rankings --workdir=runs/instructgpt/sft --prompts=runs/instructgpt/data/train.jsonl \
        --gold=experiments.instructgpt.gold.gold_reward --output=runs/instructgpt/data/rankings.jsonl
"""

import importlib
from pathlib import Path

from absl import app, flags

from experiments.policies import Gold, rankings, write_lines
from gptjax.data.conversations import read_prompts
from gptjax.stages.trained_model import load_model

WORKDIR = flags.DEFINE_string("workdir", None, "Workdir of the policy.", required=True)
PROMPTS = flags.DEFINE_string("prompts", None, "JSON lines with a prompt each.", required=True)
GOLD = flags.DEFINE_string("gold", None, "MODULE.FUNCTION of the gold reward.", required=True)
RANKED = flags.DEFINE_integer("ranked", 2500, "Prompts with ranked completions, from the first.", lower_bound=1)
SAMPLES = flags.DEFINE_integer("samples", 4, "Completions of a prompt; InstructGPT has four to nine.", lower_bound=2)
LONGEST = flags.DEFINE_integer("longest", 32, "Most tokens of a completion.", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", None, "File of the rankings, JSON lines.", required=True)


def main(_: list[str]) -> None:
    module, name = GOLD.value.rsplit(".", 1)
    gold: Gold = getattr(importlib.import_module(module), name)
    prompts = read_prompts(f"jsonl:{PROMPTS.value}")[: RANKED.value]
    found = rankings(load_model(Path(WORKDIR.value)), prompts, gold, SAMPLES.value, LONGEST.value)
    write_lines(Path(OUTPUT.value), found)


if __name__ == "__main__":
    app.run(main)
