"""Writes the text that the models read and the task files that they are measured on.

    python -m experiments.gpt3_in_context.episodes --output=runs/episodes

An episode is a list of examples of one task, " input label" each. Training documents are episodes; a task file of k
shots has the queries of held-out episodes, each after k examples of its episode. The families:

  mapping  letters stand for digits, by a random assignment: 2 to 4 letters in training, 4 in held-out
           episodes. The assignments of held-out episodes do not occur in training; their single pairs do.
  labels   letters are labelled by two random capitals, which stand for vowels and consonants: nonsense labels of a
           category. The pairs of capitals of held-out episodes do not occur in training.

Whether an episode is held out is a function of its assignment alone.
"""

import hashlib
import itertools
import json
import random
from pathlib import Path
from typing import Any

from absl import app, flags

SHOTS = (0, 1, 2, 4, 8, 16)
FAMILIES = ("mapping", "labels")
LETTERS, VOWELS, CONSONANTS = "abcdefghijklmnopqrstuvwxyz", "aeiou", "bcdfghjklmnpqrstvwxyz"
DIGITS, CAPITALS = "12345678", LETTERS.upper()
EXAMPLES = 20  # of a training document
HELD_OUT = 10  # one of so many assignments is held out

OUTPUT = flags.DEFINE_string("output", "runs/episodes", "Directory of the files.")
DOCUMENTS = flags.DEFINE_integer("documents", 40_000, "Training documents.", lower_bound=2)
QUERIES = flags.DEFINE_integer("queries", 300, "Queries of each task file.", lower_bound=1)


def is_held_out(assignment: dict[str, str]) -> bool:
    digest = hashlib.sha256(json.dumps(assignment, sort_keys=True).encode()).hexdigest()
    return int(digest, 16) % HELD_OUT == 0


def assignment_of(family: str, held_out: bool, rng: random.Random) -> dict[str, str]:
    """Returns the label of each input of an episode, or for `labels` of each category."""
    while True:
        if family == "mapping":
            keys = rng.sample(LETTERS, 4 if held_out else rng.randint(2, 4))
            found = {key: rng.choice(DIGITS) for key in keys}
        else:
            found = dict(zip((VOWELS, CONSONANTS), rng.sample(CAPITALS, 2), strict=True))
        if is_held_out(found) == held_out:
            return found


def episode(family: str, length: int, held_out: bool, rng: random.Random) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns `length` examples (input, label), and the labels."""
    labels = assignment_of(family, held_out, rng)
    keys = [rng.choice(list(labels)) for _ in range(length)]
    return [(rng.choice(key), labels[key]) for key in keys], list(labels.values())


def shown(examples: list[tuple[str, str]]) -> str:
    return "".join(f" {given} {label}" for given, label in examples)


def write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main(_: list[str]) -> None:
    output, rng = Path(OUTPUT.value), random.Random(0)
    output.mkdir(parents=True, exist_ok=True)
    families = itertools.islice(itertools.cycle(FAMILIES), DOCUMENTS.value)
    documents = [{"text": shown(episode(family, EXAMPLES, False, rng)[0])} for family in families]
    write_lines(output / "train.jsonl", documents)
    for family in FAMILIES:
        held_out = [episode(family, max(SHOTS) + 1, True, rng) for _ in range(QUERIES.value)]
        for shots in SHOTS:
            tasks = []
            for examples, choices in held_out:
                context = f"{shown(examples[max(SHOTS) - shots : -1])} {examples[-1][0]}"
                label = examples[-1][1]
                # The names of the labels are not known without examples: the choice is between the two.
                asked = {"continuation": label} if family == "mapping" else {"choices": choices, "answer": label}
                tasks.append({"context": context, **asked})
            write_lines(output / f"{family}_{shots}.jsonl", tasks)


if __name__ == "__main__":
    app.run(main)
