"""Writes the data of the study: prompts with demonstrations, and plain text, each with a held-out part.

python -m experiments.instructgpt.task --data=runs/instructgpt/data
"""

import random
from pathlib import Path

from absl import app, flags

from experiments.instructgpt.gold import TEXT_BYTES, dictionary, plays
from experiments.policies import write_lines

DATA = flags.DEFINE_string("data", None, "Directory of the files.", required=True)
PROMPTS, HELD_OUT_PROMPTS, HELD_OUT_BYTES = 4000, 256, 15_000
LETTERS = "abcdefghilmnoprstw"  # with which enough words begin
FOLLOWED = 0.5  # share of the words of a demonstration that are chosen by the letter of the prompt


def demonstration(prompt: str, rng: random.Random) -> str:
    """A line of three to five words by their frequencies, of which only a part begin with the letter of the prompt."""
    words = list(dictionary())
    same, chosen = [word for word in words if word[0] == prompt[0]], list[str]()
    for _ in range(rng.randint(3, 5)):
        pool = same if rng.random() < FOLLOWED else words
        chosen += rng.choices(pool, [dictionary()[word] for word in pool])
    return " ".join(chosen)


def main(_: list[str]) -> None:
    output, rng = Path(DATA.value), random.Random(0)
    output.mkdir(parents=True, exist_ok=True)
    parts = {"text": plays()[:TEXT_BYTES], "held_out_text": plays()[TEXT_BYTES : TEXT_BYTES + HELD_OUT_BYTES]}
    for name, part in parts.items():
        write_lines(output / f"{name}.jsonl", [{"text": text} for text in part.split("\n\n\n") if text.strip()])
    words = [word for word in dictionary() if len(word) > 2 and word[0] in LETTERS]
    rng.shuffle(words)
    trained = rng.choices(words[HELD_OUT_PROMPTS:], k=PROMPTS)
    for name, prompts in (("train", trained), ("held_out", words[:HELD_OUT_PROMPTS])):
        records = [{"prompt": prompt, "completion": demonstration(prompt, rng)} for prompt in prompts]
        write_lines(output / f"{name}.jsonl", records)


if __name__ == "__main__":
    app.run(main)
