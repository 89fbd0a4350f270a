"""The task of the study, its verifiable gold reward, and its data.

    python -m experiments.instructgpt.task --output=runs/instructgpt/data

A prompt is a word of Shakespeare. Its completion should be a line of different words that begin with the same letter.
"""

import json
import random
import re
from collections import Counter
from pathlib import Path

from absl import app, flags

from gptjax.data.sources import open_source

OUTPUT = flags.DEFINE_string("output", None, "Directory of the files.", required=True)
DEMONSTRATIONS = flags.DEFINE_integer("demonstrations", 4000, "Training prompts with a completion.", lower_bound=1)

HELD_OUT = 256  # prompts
TEXT_BYTES, HELD_OUT_TEXT_BYTES = 2_000_000, 30_000
FOLLOWED = 0.5  # share of the words of a demonstration that begin with the letter of the prompt


def words_of(text: str) -> list[str]:
    return re.findall(r"\b[a-z]+\b", text)


def demonstration(prompt: str, words: list[str], counts: dict[str, int], rng: random.Random) -> str:
    """A line of three to five frequent words, of which only a part begin with the letter of the prompt."""
    same = [word for word in words if word[0] == prompt[0]]
    chosen = []
    for _ in range(rng.randint(3, 5)):
        pool = same if rng.random() < FOLLOWED else words
        chosen += rng.choices(pool, [counts[word] for word in pool])
    return " ".join(chosen)


def write_lines(path: Path, records: list[dict[str, str]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main(_: list[str]) -> None:
    output, rng = Path(OUTPUT.value), random.Random(0)
    output.mkdir(parents=True, exist_ok=True)
    whole = "\n".join(open_source("shakespeare").documents())
    text, held_out = whole[:TEXT_BYTES], whole[TEXT_BYTES : TEXT_BYTES + HELD_OUT_TEXT_BYTES]
    for name, part in (("text", text), ("held_out_text", held_out)):
        write_lines(output / f"{name}.jsonl", [{"text": play} for play in part.split("\n\n\n") if play.strip()])
    counts = Counter(word for word in words_of(text) if 2 <= len(word) <= 8)
    words = [word for word, count in counts.most_common(3000) if count > 1]
    (output / "words.txt").write_text("\n".join(words))
    prompts = [word for word in words if len(word) > 2 and word[0] in "abcdefghilmnoprstw"]
    rng.shuffle(prompts)
    tested, trained = prompts[:HELD_OUT], prompts[HELD_OUT:]
    for name, chosen in (("train", rng.choices(trained, k=DEMONSTRATIONS.value)), ("held_out", tested)):
        records = [{"prompt": p, "completion": demonstration(p, words, counts, rng)} for p in chosen]
        write_lines(output / f"{name}.jsonl", records)


if __name__ == "__main__":
    app.run(main)
