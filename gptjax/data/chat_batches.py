"""Packs conversations into the rows of a batch, with attention confined to each conversation.

A row has all tokens of a sequence, including the last, at which a reward model reads its score; the target of a
position is the next token. The arrays of R rows of T positions are

  tokens, targets: int32 (R, T).
  weights: float32 (R, T), 1 where the target contributes to the loss.
  segments: int32 (R, T), the number of the sequence, from 1; 0 is padding.
  positions: int32 (R, T), from 0 in each sequence.
  images: uint8 (R, N, X), where the model reads images: those of each row in the order of their tokens, then zeros.
"""

import functools
import itertools
import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from gptjax.data.images.image_files import ImageFiles
from gptjax.data.pipeline import ExampleArrays, PackedExamples
from gptjax.data.templates import EncodedConversation

NEWEST_ELEMENTS = 64  # elements searched for room for a prompt; more reduce padding little, and the search takes longer
SHORTEST = 32  # minimum positions of a row of rankings


def lay_out(sequences: Sequence[EncodedConversation], rows: int, length: int, *, pack: bool) -> ExampleArrays:
    """Lays out sequences in rows.

    Args:
      sequences: N conversations.
      rows: R, number of rows.
      length: T, positions of a row.
      pack: put each sequence into the first row with room for it; otherwise into a row of its own.

    Returns:
      The arrays above, and `ends`: int32 (N,), index of the last token of each sequence in the R x T positions.

    Raises:
      ValueError: the sequences do not fit.
    """
    names = ("tokens", "targets", "segments", "positions")
    arrays: ExampleArrays = {name: np.zeros((rows, length), np.int32) for name in names}
    arrays["weights"] = np.zeros((rows, length), np.float32)
    arrays["ends"] = np.zeros(len(sequences), np.int32)
    for number, (row, first) in enumerate(_places([len(s) for s in sequences], length, pack)):
        tokens, loss_mask = sequences[number].tokens, sequences[number].loss_mask
        if row >= rows or first + len(tokens) > length:
            raise ValueError(f"sequence {number} of {len(tokens)} tokens has no room in {rows} rows of {length}")
        here, last = slice(first, first + len(tokens)), first + len(tokens) - 1
        arrays["tokens"][row, here] = tokens
        arrays["targets"][row, first:last] = tokens[1:]
        arrays["weights"][row, first:last] = loss_mask[1:]
        arrays["segments"][row, here] = number + 1
        arrays["positions"][row, here] = np.arange(len(tokens))
        arrays["ends"][number] = row * length + last
    return arrays


def rows_needed(sequences: Sequence[EncodedConversation], length: int, *, pack: bool) -> int:
    """Returns the number of rows that `lay_out` fills."""
    return 1 + max(row for row, _ in _places([len(s) for s in sequences], length, pack))


def _places(lengths: Sequence[int], length: int, pack: bool) -> list[tuple[int, int]]:
    """Returns row and first position of each sequence (first fit); raises ValueError if one is longer than a row."""
    for number, need in enumerate(lengths):
        if need > length:
            raise ValueError(f"sequence {number} of {need} tokens has no room in a row of {length}")
    if not pack:
        return [(row, 0) for row in range(len(lengths))]
    size = 1 << max(0, len(lengths) - 1).bit_length()
    room = [length] * (2 * size)  # binary tree: the leaves are the rows, a node has the maximum room of its children
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
    """Order of rows over epochs: a new permutation for each epoch; without a seed one epoch, in order.

    Attributes:
      rows_per_epoch: number of rows of an epoch.
    """

    def __init__(self, rows_per_epoch: int, permuted: int, seed: int | None) -> None:
        """Sets the size of an epoch.

        Args:
          rows_per_epoch: number of rows of an epoch.
          permuted: number of items that are permuted; less than `rows_per_epoch` if other rows are mixed in.
          seed: seed of the permutations; None: one epoch, in order.
        """
        self.rows_per_epoch, self._num_permuted, self._seed = rows_per_epoch, permuted, seed
        self._lock = threading.Lock()
        self._cached_order = functools.lru_cache(maxsize=2)(self._make_order)

    def __len__(self) -> int:
        return self.rows_per_epoch * (1 if self._seed is None else 2**60 // self.rows_per_epoch)

    def place(self, index: int) -> int:
        """Returns the item at `index`, where all rows are permuted."""
        return self._permuted(*self._epoch_and_row(index))

    def _epoch_and_row(self, index: int) -> tuple[int, int]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        return divmod(index, self.rows_per_epoch)

    def _permuted(self, epoch: int, number: int) -> int:
        with self._lock:  # so that concurrent threads compute the order of an epoch once
            return int(self._cached_order(epoch)[number])

    def _make_order(self, epoch: int) -> np.ndarray:
        if self._seed is None:
            return np.arange(self._num_permuted)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed % 2**64, epoch])))
        return generator.permutation(self._num_permuted)


class PackedConversations(Epochs):
    """Rows of conversations, with the arrays above without the axis R; each conversation occurs once per epoch.

    Args:
      conversations: at most `length` tokens each.
      length: T, positions of a row.
      pack: pack several conversations into a row, by first fit in order of decreasing length.
      seed: seed of the order; None: one epoch, in order.
      pretraining: rows of text, mixed in evenly (Ouyang et al. 2022, appendix C.3).
      share: fraction of all rows that are text; at least one row.
      images: reads the images of the conversations. A conversation with a damaged one, which may be skipped, is in no
        loss. None: they have no images.

    Attributes:
      rows_per_epoch: number of rows, text included.
      images_per_token: mean number of images for a position of a row.

    Raises:
      ValueError: a conversation is longer than a row.
    """

    def __init__(
        self,
        conversations: Sequence[EncodedConversation],
        length: int,
        *,
        pack: bool,
        seed: int | None,
        pretraining: PackedExamples | None = None,
        share: float = 0.0,
        images: ImageFiles | None = None,
    ) -> None:
        self._length, self._pretraining, self._images, self._shift_seed = length, pretraining, images, seed
        ordered = sorted(conversations, key=lambda c: -len(c)) if pack else list(conversations)
        self._rows: list[list[EncodedConversation]] = []
        for encoded, (row, _) in zip(ordered, _places([len(e) for e in ordered], length, pack), strict=True):
            if row == len(self._rows):
                self._rows.append([])
            self._rows[row].append(encoded)
        total = len(self._rows)
        if pretraining is not None:
            total = max(total + 1, round(total / (1 - share)))
        # Number of text rows among the first n rows of an epoch.
        self._texts_before = np.arange(total + 1) * (total - len(self._rows)) // total
        counts = [sum(len(e.images) for e in row) for row in self._rows]
        self._images_per_row, self.images_per_token = max(counts), sum(counts) / (total * length)
        super().__init__(total, len(self._rows), seed)

    def __getitem__(self, index: int) -> ExampleArrays:
        epoch, number = self._epoch_and_row(index)
        texts = int(self._texts_before[number])
        if self._pretraining is not None and self._texts_before[number + 1] > texts:
            text = _as_row(self._pretraining[epoch * int(self._texts_before[-1]) + texts])
            return text | self._images_of([], index, {})
        row = self._rows[self._permuted(epoch, number - texts)]
        arrays = lay_out(row, 1, self._length, pack=True)
        example = {name: array[0] for name, array in arrays.items() if name != "ends"}
        return example | self._images_of(row, index, example)

    def _images_of(self, row: Sequence[EncodedConversation], index: int, example: ExampleArrays) -> ExampleArrays:
        """Reads the images of a row; removes a conversation with a damaged one from the loss of `example`."""
        if self._images is None or self._images_per_row == 0:
            return {}
        images_NX = np.zeros((self._images_per_row, self._images.vision.values_per_image), np.uint8)
        number = 0
        for segment, encoded in enumerate(row, start=1):
            for reference in encoded.images:
                seed = None if self._shift_seed is None else (self._shift_seed % 2**64, index, number)
                image_X = self._images.read(reference, seed)
                if image_X is None:
                    example["weights"][example["segments"] == segment] = 0
                else:
                    images_NX[number] = image_X
                number += 1
        return {"images": images_NX}


def _as_row(text: ExampleArrays) -> ExampleArrays:
    """Adds segments and positions to a row of text."""
    one = {"segments": np.ones_like(text["tokens"]), "positions": np.arange(len(text["tokens"]), dtype=np.int32)}
    return one | text


class RankedSequences(NamedTuple):
    """Ranked completions of a prompt, best first.

    Attributes:
      sequences: the prompt followed by each completion.
      ranks: rank of each completion, 1 for the best; completions of equal rank are not compared.
    """

    sequences: Sequence[EncodedConversation]
    ranks: Sequence[int]


class PackedRankings(Epochs):
    """Elements of R rows of T positions, which hold all completions of one or more prompts; each prompt once per epoch.

    All elements have the same shape, the smallest that fits every prompt alone: T is the bucket of the longest
    sequence, R the maximum number of rows of a prompt. Remaining space is shared with other prompts. In addition to the
    arrays above an element has, with at most P prompts of an element and G completions of a prompt:
      ends: int32 (P, G), index of the last token of each completion in the R x T positions.
      ranks: int32 (P, G), rank, 1 for the best; 0 where there is no completion, or an image of the prompt is damaged.

    Args:
      prompts: the completions of each prompt; they have the same images, those of the prompt.
      context_length: maximum of T.
      pack: several completions in a row and several prompts in an element; otherwise each completion has its own row,
        and each prompt its own element.
      seed: seed of the order; None: one epoch, in order.
      images: reads the images of the prompts; None: they have none.

    Attributes:
      images_per_token: mean number of images for a position; those of a prompt count once for each completion.
    """

    def __init__(
        self,
        prompts: Sequence[RankedSequences],
        context_length: int,
        *,
        pack: bool,
        seed: int | None,
        images: ImageFiles | None = None,
    ) -> None:
        longest = max(len(sequence) for prompt in prompts for sequence in prompt.sequences)
        self._length = max(longest, min(max(SHORTEST, 1 << (longest - 1).bit_length()), context_length))
        self._num_rows = max(rows_needed(prompt.sequences, self._length, pack=pack) for prompt in prompts)
        shares = _shared(prompts, self._num_rows, self._length) if pack else [[prompt] for prompt in prompts]
        self._elements, self._pack = shares, pack
        self._shape = max(map(len, shares)), max(len(prompt.sequences) for prompt in prompts)
        self._images, self._shift_seed = images, seed
        self._images_per_row = 0 if images is None else max(map(self._most_images, shares))
        count = sum(len(sequence.images) for prompt in prompts for sequence in prompt.sequences)
        self.images_per_token = count / (len(shares) * self._num_rows * self._length)
        super().__init__(len(shares), len(shares), seed)

    def __getitem__(self, index: int) -> ExampleArrays:
        prompts = self._elements[self.place(index)]
        sequences = [sequence for prompt in prompts for sequence in prompt.sequences]
        arrays = lay_out(sequences, self._num_rows, self._length, pack=self._pack)
        ends, ranks = iter(arrays["ends"]), np.zeros(self._shape, np.int32)
        arrays["ends"] = np.zeros(self._shape, np.int32)
        for number, prompt in enumerate(prompts):
            ranks[number, : len(prompt.ranks)] = prompt.ranks
            arrays["ends"][number, : len(prompt.ranks)] = list(itertools.islice(ends, len(prompt.ranks)))
        arrays["ranks"] = ranks
        return arrays | self._images_of(prompts, index, arrays)

    def _most_images(self, prompts: Sequence[RankedSequences]) -> int:
        """The number of images in that row of an element that has the most."""
        sequences, counts = [sequence for prompt in prompts for sequence in prompt.sequences], [0] * self._num_rows
        places = _places([len(sequence) for sequence in sequences], self._length, self._pack)
        for sequence, (row, _) in zip(sequences, places, strict=True):
            counts[row] += len(sequence.images)
        return max(counts)

    def _images_of(self, prompts: Sequence[RankedSequences], index: int, element: ExampleArrays) -> ExampleArrays:
        """Reads the images of an element, the same for all completions of a prompt; without ranks if one is damaged."""
        if self._images is None or self._images_per_row == 0:
            return {}
        shape = (self._num_rows, self._images_per_row, self._images.vision.values_per_image)
        images_RNX, used = np.zeros(shape, np.uint8), [0] * self._num_rows
        for number, prompt in enumerate(prompts):
            read = []
            for image, reference in enumerate(prompt.sequences[0].images):
                seed = None if self._shift_seed is None else (self._shift_seed % 2**64, index, number, image)
                read.append(self._images.read(reference, seed))
                if read[-1] is None:
                    element["ranks"][number] = 0
            # The sequences of a row were laid out in the order of their numbers.
            for end in element["ends"][number, : len(prompt.ranks)].tolist():
                row = end // self._length
                for image_X in read:
                    images_RNX[row, used[row]] = 0 if image_X is None else image_X
                    used[row] += 1
        return {"images": images_RNX}


def _shared(prompts: Sequence[RankedSequences], rows: int, length: int) -> list[list[RankedSequences]]:
    """Groups prompts into elements: each into the first of the newest 64 elements with room for its completions."""
    elements: list[list[RankedSequences]] = []
    rooms: list[list[int]] = []  # free positions in the rows of each element
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
    """Returns the free positions of the rows after placing each sequence as `lay_out` does; None if one has no room."""
    left = list(rooms)
    for need in needs:
        row = next((row for row, room in enumerate(left) if room >= need), None)
        if row is None:
            return None
        left[row] -= need
    return left
