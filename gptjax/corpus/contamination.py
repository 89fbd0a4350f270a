"""Removal of the text of evaluation tasks from training documents (Brown et al. 2020, appendix C).

A document overlaps a task where both have the same 13 words. The 13-gram and 200 characters on each side of it are
removed, which splits the document into pieces. Pieces shorter than 200 characters are discarded, and a document of
more than 10 pieces is dropped as a whole. The paper does not say whether its "200 character window" is on each side;
the decontamination of lm-evaluation-harness also takes it so.
"""

import functools
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.corpus.word_grams import Words, find_words, gram_hashes
from gptjax.corpus.workspace import Workspace, committed, load, write_json
from gptjax.files import expand

GRAM_WORDS = 13
WINDOW = 200  # characters removed on each side of a gram
MIN_PIECE = 200  # characters
MAX_PIECES = 10
_MAX_TABLE_BITS = 26  # of a table of the low bits of the grams' hashes, which excludes most grams of a document


def collect_grams(workspace: Workspace, item: int) -> None:
    """Step `grams`: writes the 13-grams of all examples of the tasks.

    Arrays of grams.npz: grams, uint64 (grams,), sorted hashes; owner_gram, owner_task and owner_example, int64
    (owners,): an example with a gram, by their indices.

    Raises:
      UserError: a task cannot be read.
    """
    hashes, tasks, examples = [], [], []
    described = []
    for task, name in enumerate(workspace.recipe.tasks):
        texts = _texts(name)
        found = [np.unique(np.concatenate([_grams(text) for text in options])) for options in texts]
        hashes += found
        tasks.append(np.full(sum(map(len, found)), task))
        examples.append(np.repeat(np.arange(len(found)), list(map(len, found))))
        short = sum(len(grams) == 0 for grams in found)
        described.append({"task": name, "examples": len(found), "examples_without_13_words": short})
    grams, owners = np.unique(np.concatenate(hashes), return_inverse=True)
    if len(grams) == 0:
        raise UserError(f"--tasks={','.join(workspace.recipe.tasks)}: no example has {GRAM_WORDS} words")
    with committed(workspace.result("grams", item)) as directory:
        np.savez(
            directory / "grams.npz",
            grams=grams,
            owner_gram=owners,
            owner_task=np.concatenate(tasks),
            owner_example=np.concatenate(examples),
        )
        write_json(directory / "tasks.json", described)


def _texts(name: str) -> list[list[str]]:
    """Returns the texts of each example of a task: its context with each option or reference answer."""
    from gptjax.evaluation.catalogue import read_benchmark
    from gptjax.evaluation.tasks import read_examples

    examples = read_examples(expand(name)) if name.endswith(".jsonl") else read_benchmark(name, 0)
    return [example.texts for example in examples.asked]


def _grams(text: str) -> npt.NDArray[np.uint64]:
    return gram_hashes(find_words(text).hashes, GRAM_WORDS)


class Overlaps:
    """Finds the grams of the tasks in documents."""

    def __init__(self, path: Path) -> None:
        """Reads grams.npz."""
        self._grams = load(path)["grams"]
        bits = min(len(self._grams).bit_length() + 6, _MAX_TABLE_BITS)  # a small table stays in the processor's cache
        self._mask = np.uint64(2**bits - 1)
        self._table = np.zeros(2**bits, bool)
        self._table[self._low_bits(self._grams)] = True

    def _low_bits(self, hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        return (hashes & self._mask).astype(np.int64)

    def find(self, words: Words) -> npt.NDArray[np.int64]:
        """Returns (gram, first character, last character + 1) of each overlap, int64 (overlaps, 3)."""
        hashes = gram_hashes(words.hashes, GRAM_WORDS)
        (possible,) = np.nonzero(self._table[self._low_bits(hashes)])
        places = np.searchsorted(self._grams, hashes[possible])
        same = self._grams[np.minimum(places, len(self._grams) - 1)] == hashes[possible]
        first = possible[same]
        return np.stack([places[same], words.begins[first], words.ends[first + GRAM_WORDS - 1]], 1)


@functools.cache
def overlaps_of(path: Path) -> Overlaps:
    """Opens grams.npz, once in a process."""
    return Overlaps(path)


def pieces(overlaps: npt.NDArray[np.int64], length: int) -> list[tuple[int, int]]:
    """Cuts a document around its overlaps.

    Args:
      overlaps: first character and last character + 1 of each, int64 (overlaps, 2), sorted by the first.
      length: characters of the document.

    Returns:
      The range of characters of each piece that remains; none if the document is contaminated.
    """
    whole, begin = [], 0
    for first, stop in overlaps.tolist():
        if first - WINDOW > begin:
            whole.append((begin, first - WINDOW))
        begin = max(begin, stop + WINDOW)
    if begin < length:
        whole.append((begin, length))
    if len(whole) > MAX_PIECES:
        return []
    return [(first, stop) for first, stop in whole if stop - first >= MIN_PIECE]
