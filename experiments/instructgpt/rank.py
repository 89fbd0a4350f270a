"""Ranks completions of the fine-tuned model by the gold reward, which takes the place of the labellers.

    python -m experiments.instructgpt.rank --root=runs/instructgpt

Writes ROOT/data/rankings.jsonl: for each of the first prompts of training the completions with different rewards, best
first. Nothing that is trained later sees the gold reward, only these rankings.
"""

import json
from pathlib import Path

from absl import app, flags

from experiments import policies
from experiments.instructgpt.gold import gold_reward, read_dictionary
from experiments.instructgpt.sweep import COMPLETION
from gptjax.data.conversations import read_prompts

ROOT = flags.DEFINE_string("root", "runs/instructgpt", "Directory of the data and of all runs.")
RANKED = flags.DEFINE_integer("ranked", 1000, "Prompts with ranked completions.", lower_bound=1)
SAMPLED = 4  # completions of a prompt; InstructGPT has four to nine


def main(_: list[str]) -> None:
    root = Path(ROOT.value)
    data = root / "data"
    dictionary, model = read_dictionary(data), policies.policy_of(root / "sft")
    prompts = read_prompts(f"jsonl:{data}/train.jsonl")[: RANKED.value]
    repeated = [prompt for prompt in prompts for _ in range(SAMPLED)]
    texts = policies.complete(model, model, repeated, COMPLETION).texts
    records = []
    for number, prompt in enumerate(prompts):
        word = prompt.messages[-1].content
        by_reward = {
            gold_reward(word, text, dictionary): text for text in texts[number * SAMPLED : (number + 1) * SAMPLED] if text
        }
        if len(by_reward) > 1:
            records.append({"prompt": word, "ranking": [by_reward[reward] for reward in sorted(by_reward, reverse=True)]})
    (data / "rankings.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    print(f"{len(records)} rankings")


if __name__ == "__main__":
    app.run(main)
