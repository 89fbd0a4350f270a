"""A synthetic corpus with planted copies and overlaps with a task, and what of it is left after its preparation.

Words are made of syllables and drawn from Zipf's distribution; lengths of documents are log-normal. Each document
begins with a word of its own, by which it is recognised in the prepared corpus. Planted are

- exact copies of earlier documents,
- near copies of earlier documents, with words replaced, removed and inserted, whose Jaccard similarity of 5-word
  shingles, which is computed, is at least 0.8,
- 13 consecutive words of an example of a task, in capitals and with punctuation, within documents.
"""

import collections
import dataclasses
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from gptjax.corpus.contamination import GRAM_WORDS
from gptjax.corpus.near_copies import SHINGLE_WORDS
from gptjax.corpus.word_grams import find_words, gram_hashes
from gptjax.data.prepared_corpora import PreparedCorpus

VOCABULARY = 50_000
MEAN_WORDS, SIGMA = 600, 0.8  # of the log-normal lengths of documents
MIN_WORDS, MAX_WORDS = 100, 20_000  # at least 500 characters, of which 400 are cut or discarded at an overlap
FILE_BYTES = 2**26
EXACT, NEAR, OVERLAP = 0.01, 0.01, 0.0005  # shares of the documents
SIMILARITY, HIGHEST = 0.8, 0.97  # of near copies
MAX_EARLIER = 10_000  # documents that are copied, in memory
EXAMPLES, EXAMPLE_WORDS = 100, 30  # of the task


@dataclasses.dataclass
class Planted:
    """What a corpus holds.

    Attributes:
      lengths: characters of each document that is no copy and has no overlap, by its first word.
      exact: number of exact copies of a document, by its first word.
      near: first words of near copies.
      overlaps: the planted words of each document that has some, in lower case, by its first word.
      similarities: of the near copies.
      num_bytes: of the text.
    """

    lengths: dict[str, int] = dataclasses.field(default_factory=dict)
    exact: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    near: set[str] = dataclasses.field(default_factory=set)
    overlaps: dict[str, str] = dataclasses.field(default_factory=dict)
    similarities: list[float] = dataclasses.field(default_factory=list)
    num_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Left:
    """What a prepared corpus still holds of a `Planted` one; all of it are errors.

    Attributes:
      exact: exact copies.
      near: near copies.
      overlaps: documents with planted words of the task.
      missing: documents dropped that are no copies and have no overlap.
      cut: such documents of another length than before.
    """

    exact: int
    near: int
    overlaps: int
    missing: int
    cut: int


def write(directory: Path, num_bytes: int, seed: int) -> Planted:
    """Writes `directory`/NNNNN.jsonl of at least `num_bytes` of text, and the examples of the task, task.jsonl."""
    rng = np.random.default_rng(seed)
    words = make_words(rng)
    ranks = 1 / np.arange(1.0, VOCABULARY + 1)
    shares = np.cumsum(ranks / ranks.sum())

    def text(count: int) -> str:
        return " ".join(words[np.searchsorted(shares, rng.random(count)).clip(max=VOCABULARY - 1)].tolist())

    examples = [text(EXAMPLE_WORDS) for _ in range(EXAMPLES)]
    (directory / "task.jsonl").write_text("".join(json.dumps({"text": example}) + "\n" for example in examples))
    planted, files = Planted(), itertools.count()
    earlier: list[str] = []
    overlapping = itertools.cycle(examples)
    while planted.num_bytes < num_bytes:
        with (directory / f"{next(files):05d}.jsonl").open("w") as file:
            written = 0
            while written < FILE_BYTES and planted.num_bytes + written < num_bytes:
                own = f"document{len(planted.lengths) + len(planted.near) + len(planted.overlaps):09d}"
                kind = rng.choice(4, p=[EXACT, NEAR, OVERLAP, 1 - EXACT - NEAR - OVERLAP])
                count = int(np.clip(MEAN_WORDS * rng.lognormal(-(SIGMA**2) / 2, SIGMA), MIN_WORDS, MAX_WORDS))
                if kind == 0 and earlier:
                    document = earlier[rng.integers(len(earlier))]
                    planted.exact[document.partition(" ")[0]] += 1
                elif kind == 1 and earlier:
                    document, similar = near_copy(earlier[rng.integers(len(earlier))], own, words, rng)
                    planted.near.add(own)
                    planted.similarities.append(similar)
                elif kind == 2:
                    start = rng.integers(EXAMPLE_WORDS - GRAM_WORDS + 1)
                    gram = next(overlapping).split(" ")[start : start + GRAM_WORDS]
                    document = f"{own} {text(count)} {', '.join(gram).upper()}! {text(count)}"
                    planted.overlaps[own] = " ".join(gram)
                else:
                    document = f"{own} {text(count)}"
                    planted.lengths[own] = len(document)
                    if len(earlier) < MAX_EARLIER:
                        earlier.append(document)
                    elif rng.random() < MAX_EARLIER / len(planted.lengths):  # a random sample of all
                        earlier[rng.integers(MAX_EARLIER)] = document
                file.write(json.dumps({"text": document}) + "\n")
                written += len(document)
            planted.num_bytes += written
    return planted


def left(planted: Planted, output: Path, cache_dir: Path) -> Left:
    """Compares a prepared corpus with what was planted in its source."""
    kept, lengths, overlaps = collections.Counter[str](), dict[str, int](), 0
    grams = set(planted.overlaps.values())
    for document in documents_of(output, cache_dir):
        own = document.partition(" ")[0]
        if own in planted.lengths or own in planted.near:
            kept[own] += 1
            lengths[own] = len(document)
        else:  # a piece of a document that was cut
            plain = document.lower().replace(",", "").replace("!", "")
            overlaps += any(gram in plain for gram in grams)
    missing = len(planted.lengths) - sum(own in kept for own in planted.lengths)
    return Left(
        exact=sum(kept[own] - 1 for own in planted.lengths if own in kept),
        near=sum(own in kept for own in planted.near),
        overlaps=overlaps,
        missing=missing,
        cut=sum(lengths[own] != length for own, length in planted.lengths.items() if own in kept),
    )


def documents_of(output: Path, cache_dir: Path) -> Iterator[str]:
    """Yields the text of all documents of a prepared corpus, decoded."""
    from gptjax.data import tokenizers

    corpus = PreparedCorpus(f"prepared:{output}")
    tokenizer = tokenizers.load(output / "tokenizer", cache_dir)
    for split in (corpus.train, corpus.validation):
        for document, length in enumerate(split.lengths.tolist()):
            yield tokenizer.decode(split.read(document, 0, length - 1)) if length > 1 else ""


def make_words(rng: np.random.Generator) -> np.ndarray:
    """Returns different words of two to four syllables, the shortest first."""
    syllables = ["".join(parts) for parts in itertools.product("bdfgklmnprstvz", "aeiou", ["", "n", "r", "s"])]
    chosen = rng.integers(len(syllables), size=(2 * VOCABULARY, 4)).tolist()
    counts = rng.integers(2, 5, size=2 * VOCABULARY).tolist()
    found = dict.fromkeys("".join(syllables[i] for i in row[:n]) for row, n in zip(chosen, counts, strict=True))
    return np.array(sorted(list(found)[:VOCABULARY], key=len), dtype=object)


def near_copy(text: str, own: str, words: np.ndarray, rng: np.random.Generator) -> tuple[str, float]:
    """Returns an edited text that begins with `own`, and its similarity to `text`, at least `SIMILARITY`."""
    original = text.split(" ")
    target = rng.uniform(SIMILARITY, HIGHEST)
    # An edit removes up to 5 shingles and adds up to 5; the first word is one more.
    edits = int((1 - target) / (1 + target) * (len(original) - SHINGLE_WORDS + 1) / SHINGLE_WORDS)
    while True:
        changed = [own, *original[1:]]
        for place in sorted(rng.choice(np.arange(1, len(original)), edits, replace=False).tolist(), reverse=True):
            new = words[rng.integers(len(words), size=1)].tolist()
            match rng.integers(3):
                case 0:
                    changed[place : place + 1] = new
                case 1:
                    changed[place:place] = new
                case _:
                    del changed[place]
        copy = " ".join(changed)
        found = similarity(text, copy)
        if found >= SIMILARITY:
            return copy, found
        edits -= 1


def similarity(first: str, second: str) -> float:
    """Returns the exact Jaccard similarity of the shingles of two texts."""
    one, other = (set(gram_hashes(find_words(text).hashes, SHINGLE_WORDS).tolist()) for text in (first, second))
    return len(one & other) / len(one | other)
