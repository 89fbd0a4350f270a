"""Conversations in the rows of a batch: one a row, or several, none of which sees another.

A sequence is there whole, its last token too, at which a reward is read; the target of a position is the token behind
it. Arrays of R rows of T positions are

  tokens, targets: int32.
  weights: float32, 1 where the target is to be learned.
  segments: int32, the number of the sequence, from 1; 0 is padding.
  positions: int32, from 0 in each sequence.
"""

import functools
import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.data.pipeline import Example, PackedExamples
from gptjax.data.templates import Encoded

NEWEST_ELEMENTS = 64  # in which room for a prompt is looked for: more pad little less, and the search is long
SHORTEST = 32  # positions of a row of rankings


def lay_out(sequences: Sequence[Encoded], rows: int, length: int, *, pack: bool) -> Example:
    """Sequences in `rows` rows, with `ends`: int32 (K,), where the last token of each is in the R x T positions.

    Args:
      pack: each in the first row that has room for it; otherwise in a row of its own.

    Raises:
      ValueError: they do not fit.
    """
    names = ("tokens", "targets", "segments", "positions")
    arrays: Example = {name: np.zeros((rows, length), np.int32) for name in names}
    arrays["weights"] = np.zeros((rows, length), np.float32)
    arrays["ends"] = np.zeros(len(sequences), np.int32)
    for number, (row, first) in enumerate(_places([len(s) for s in sequences], length, pack)):
        tokens, learned = sequences[number].tokens, sequences[number].learned
        if row >= rows or first + len(tokens) > length:
            raise ValueError(f"sequence {number} of {len(tokens)} tokens has no room in {rows} rows of {length}")
        here, last = slice(first, first + len(tokens)), first + len(tokens) - 1
        arrays["tokens"][row, here] = tokens
        arrays["targets"][row, first:last] = tokens[1:]
        arrays["weights"][row, first:last] = learned[1:]
        arrays["segments"][row, here] = number + 1
        arrays["positions"][row, here] = np.arange(len(tokens))
        arrays["ends"][number] = row * length + last
    return arrays


def rows_needed(sequences: Sequence[Encoded], length: int, *, pack: bool) -> int:
    """How many rows `lay_out` fills."""
    return 1 + max(row for row, _ in _places([len(s) for s in sequences], length, pack))


def _places(lengths: Sequence[int], length: int, pack: bool) -> list[tuple[int, int]]:
    """The row and the first position of each sequence; ValueError when one is longer than a row."""
    for number, need in enumerate(lengths):
        if need > length:
            raise ValueError(f"sequence {number} of {need} tokens has no room in a row of {length}")
    if not pack:
        return [(row, 0) for row in range(len(lengths))]
    size = 1 << max(0, len(lengths) - 1).bit_length()
    room = [length] * (2 * size)  # a tree: the leaves are the rows, and a node has the most room of any row below it
    places = []
    for need in lengths:
        node = 1
        while node < size:
            node = 2 * node + (room[2 * node] < need)
        places.append((node - size, length - room[node]))
        room[node] -= need
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return places


class Epochs:
    """What comes once an epoch, permuted anew for each by a seed, without end; without a seed once, in order.

    Attributes:
      rows_per_epoch: of which `permuted` are in that order.
    """

    def __init__(self, rows_per_epoch: int, permuted: int, seed: int | None) -> None:
        self.rows_per_epoch, self._num_permuted, self._seed = rows_per_epoch, permuted, seed
        self._lock = threading.Lock()
        self._cached_order = functools.lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return self.rows_per_epoch * (1 if self._seed is None else 2**60 // self.rows_per_epoch)

    def place(self, index: int) -> int:
        """What comes at `index`, of what is permuted alone."""
        return self._permuted(*self._epoch_and_row(index))

    def _epoch_and_row(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return divmod(index, self.rows_per_epoch)

    def _permuted(self, epoch: int, number: int) -> int:
        with self._lock:  # so that the reading thread and another order an epoch once, not each
            return int(self._cached_order(epoch)[number])

    def _make_order(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(self._num_permuted)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed % 2**64, epoch])))
        return generator.permutation(self._num_permuted)


class PackedConversations(Epochs):
    """Rows (T,) of conversations, with the arrays above, but for the axis R; every conversation once an epoch.

    Args:
      pack: the longest conversations first, each is put into the first row that has room for it.
      pretraining: rows of text, of which a `share` of all rows are, evenly spread (Ouyang et al. 2022, appendix C.3);
        one at least.

    Attributes:
      rows_per_epoch: those of text included.

    Raises:
      ValueError: a conversation is longer than a row.
    """

    def __init__(
        self,
        conversations: Sequence[Encoded],
        length: int,
        *,
        pack: bool,
        seed: int | None,
        pretraining: PackedExamples | None = None,
        share: float = 0.0,
    ) -> None:
        self._length, self._pretraining = length, pretraining
        ordered = sorted(conversations, key=lambda c: -len(c)) if pack else list(conversations)
        self._rows: list[list[Encoded]] = []
        for encoded, (row, _) in zip(ordered, _places([len(e) for e in ordered], length, pack), strict=True):
            if row == len(self._rows):
                self._rows.append([])
            self._rows[row].append(encoded)
        total = len(self._rows)
        if pretraining is not None:
            total = max(total + 1, round(total / (1 - share)))
        # How many of the first n rows of any epoch are text.
        self._texts_before = np.arange(total + 1) * (total - len(self._rows)) // total
        super().__init__(total, len(self._rows), seed)

    def __getitem__(self, index: int) -> Example:
        epoch, number = self._epoch_and_row(index)
        texts = int(self._texts_before[number])
        if self._pretraining is not None and self._texts_before[number + 1] > texts:
            return _as_row(self._pretraining[epoch * int(self._texts_before[-1]) + texts])
        arrays = lay_out(self._rows[self._permuted(epoch, number - texts)], 1, self._length, pack=True)
        return {name: array[0] for name, array in arrays.items() if name != "ends"}


def _as_row(text: Example) -> Example:
    """A row of text, with the arrays of conversations."""
    one = {"segments": np.ones_like(text["tokens"]), "positions": np.arange(len(text["tokens"]), dtype=np.int32)}
    return one | text


class RankedSequences(NamedTuple):
    """A prompt's answers, each behind it, best first.

    Attributes:
      levels: of each, 1 the best; of equal ones neither is better.
    """

    sequences: Sequence[Encoded]
    levels: Sequence[int]


class RankedAnswers(Epochs):
    """Elements of R rows of T positions: one prompt or several, each with all its answers; every prompt once an epoch.

    All elements have one shape, the smallest in which each prompt has room alone: T is the bucket of the longest
    sequence, R the most rows that a prompt fills. What a prompt leaves of them others share. Besides the arrays above
    an element has, P the most prompts of an element and K the most answers of a prompt:
      ends: int32 (P, K), where the last token of each answer is in the R x T positions.
      levels: int32 (P, K), 1 the best; 0 where there is no answer.

    Args:
      context_length: T at most.
      pack: several answers in a row, several prompts in an element; otherwise an answer has a row of its own, and a
        prompt an element.
    """

    def __init__(
        self, prompts: Sequence[RankedSequences], context_length: int, *, pack: bool, seed: int | None
    ) -> None:
        longest = max(len(sequence) for prompt in prompts for sequence in prompt.sequences)
        self._length = max(longest, min(max(SHORTEST, 1 << (longest - 1).bit_length()), context_length))
        self._num_rows = max(rows_needed(prompt.sequences, self._length, pack=pack) for prompt in prompts)
        shares = _shared(prompts, self._num_rows, self._length) if pack else [[prompt] for prompt in prompts]
        self._elements, self._pack = shares, pack
        self._shape = max(map(len, shares)), max(len(prompt.sequences) for prompt in prompts)
        super().__init__(len(shares), len(shares), seed)

    def __getitem__(self, index: int) -> Example:
        prompts = self._elements[self.place(index)]
        sequences = [sequence for prompt in prompts for sequence in prompt.sequences]
        arrays = lay_out(sequences, self._num_rows, self._length, pack=self._pack)
        ends, levels = iter(arrays["ends"]), np.zeros(self._shape, np.int32)
        arrays["ends"] = np.zeros(self._shape, np.int32)
        for number, prompt in enumerate(prompts):
            levels[number, : len(prompt.levels)] = prompt.levels
            arrays["ends"][number, : len(prompt.levels)] = list(itertools.islice(ends, len(prompt.levels)))
        return arrays | {"levels": levels}


def _shared(prompts: Sequence[RankedSequences], rows: int, length: int) -> list[list[RankedSequences]]:
    """Each prompt in the first element of the newest 64 that has room for all its answers, each in its first row."""
    elements: list[list[RankedSequences]] = []
    rooms: list[list[int]] = []  # what is left of the rows of each element
    for prompt in prompts:
        needs = [len(sequence) for sequence in prompt.sequences]
        for number in range(max(0, len(elements) - NEWEST_ELEMENTS), len(elements)):
            left = _left(rooms[number], needs)
            if left is not None:
                elements[number].append(prompt)
                rooms[number] = left
                break
        else:
            left = _left([length] * rows, needs)
            assert left is not None
            elements.append([prompt])
            rooms.append(left)
    return elements


def _left(rooms: Sequence[int], needs: Sequence[int]) -> list[int] | None:
    """What is left of the rows with each sequence in the first that has room, as `lay_out` has it; None: none has."""
    left = list(rooms)
    for need in needs:
        row = next((row for row, room in enumerate(left) if room >= need), None)
        if row is None:
            return None
        left[row] -= need
    return left
