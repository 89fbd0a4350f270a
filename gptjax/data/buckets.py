"""Batches of examples of like length, so that little of a batch is padding and a step has one of a few shapes."""

import functools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gptjax.data.pipeline import Microbatch
from gptjax.data.task_inputs import Encoded

SHORTEST = 32  # tokens; shorter sequences are padded to it, for the work is nothing and each shape is a compilation
POOL_BATCHES = 50  # examples are sorted within so many batches: more pad less, and mix less


class Buckets:
    """Examples in batches, each as wide as the smallest bucket that holds its longest sequence.

    Buckets are the powers of two from 32, and the context length. With a seed, epoch follows epoch, and the order of
    each is a function of the seed and its number: all examples are permuted, those of each 50 batches sorted by length
    and cut into batches, and the batches permuted. Without one there is one epoch, in the order of length. Rows without
    an example fill up one batch of an epoch, so that each example comes exactly once.

    A microbatch has, where T is the bucket and C the number of an example's sequences:
      tokens: int32 (B, T), or (B, C, T) if C is not 1; padded behind with 0.
      ends: int32 (B,) or (B, C), the position of the last token, `extract`.
      weights: float32 (B,), 1, or 0 for a row that fills up.
      examples: int32 (B,), the place of the example among those given, or -1 for a row that fills up.
      the targets of the examples: (B,), or (B, T) in tagging, where padding is -1.
    Of rows that fill up all the rest is 0, but -1 in tagging's labels.

    Attributes:
      examples_per_epoch: those that fill up included, so a multiple of the batch size.
      tokens_per_epoch: without padding.
    """

    def __init__(
        self,
        examples: Sequence[Encoded],
        *,
        context_length: int,
        batch_size: int,
        microbatch_size: int,
        seed: int | None,
    ) -> None:
        """Takes examples that `encode` made of one set of rows.

        Args:
          examples: one at least.
          context_length: of the model; no sequence is longer.
          batch_size: rows of a batch, over all processes.
          microbatch_size: rows of a microbatch, over all processes; a divisor of the batch size.
          seed: of the order; None: one epoch, for evaluation.
        """
        assert examples
        assert batch_size % microbatch_size == 0, (batch_size, microbatch_size)
        self._examples, self._context_length, self._seed = examples, context_length, seed
        self._batch_size, self._microbatch_size = batch_size, microbatch_size
        self._lengths = np.array([max(map(len, example.sequences)) for example in examples])
        self._num_tokens = np.array([example.num_tokens for example in examples])
        self.tokens_per_epoch = int(self._num_tokens.sum())
        self._batches_per_epoch = -(-len(examples) // batch_size)
        self.examples_per_epoch = self._batches_per_epoch * batch_size
        self._lock = threading.Lock()
        self._cached_order = functools.lru_cache(maxsize=2)(self._make_order)

    def indices(self, batch: int) -> npt.NDArray[np.int32]:
        """Which examples the rows of a batch are, int32 (batch_size,), -1 where they fill up; batches count from 0."""
        epoch, number = divmod(batch, self._batches_per_epoch)
        with self._lock:  # so that the reading thread and another order an epoch once, not each
            return self._cached_order(epoch)[number]

    def microbatches(self, start: int, rows: Sequence[int], prefetch: int) -> Iterator[Microbatch]:
        """The microbatches from an example on, read ahead by a thread.

        Args:
          start: examples consumed before, those that fill up included; rounded down to whole batches.
          rows: which rows of each microbatch this process reads, in this order.
          prefetch: microbatches kept ready.
        """
        import grain

        each = self._batch_size // self._microbatch_size
        wanted = np.asarray(rows, np.int64)

        def microbatch(number: int) -> Microbatch:
            batch, part = divmod(number, each)
            return self._microbatch(self.indices(batch), part * self._microbatch_size, wanted)

        epochs = 1 if self._seed is None else 2**60 // (self._batches_per_epoch * each)
        numbers = grain.MapDataset.range(start // self._batch_size * each, epochs * self._batches_per_epoch * each)
        # One thread is enough, and more contend for the interpreter's lock.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        return iter(numbers.map(microbatch).to_iter_dataset(options))

    def _make_order(self, epoch: int) -> npt.NDArray[np.int32]:
        """Which examples are in the batches of an epoch, int32 (batches, batch_size); -1: none."""
        order = np.full(self.examples_per_epoch, -1, np.int32)
        if self._seed is None:
            order[: len(self._examples)] = np.argsort(self._lengths, kind="stable")
            return order.reshape(-1, self._batch_size)
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed % 2**64, epoch])))
        permuted = generator.permutation(len(self._examples))
        pool = POOL_BATCHES * self._batch_size
        for first in range(0, len(permuted), pool):
            of_pool = permuted[first : first + pool]
            of_pool = of_pool[np.argsort(self._lengths[of_pool], kind="stable")]
            order[first : first + len(of_pool)] = of_pool
        return generator.permutation(order.reshape(-1, self._batch_size))

    def _bucket(self, length: int) -> int:
        bucket = SHORTEST
        while bucket < length:
            bucket *= 2
        return min(bucket, self._context_length)

    def _microbatch(self, indices: npt.NDArray[np.int32], first: int, wanted: npt.NDArray[np.int64]) -> Microbatch:
        """The `wanted` rows of the microbatch that begins at row `first` of the batch of these examples."""
        length = self._bucket(int(self._lengths[indices[indices >= 0]].max()))
        of_all = indices[first : first + self._microbatch_size]
        chosen = of_all[wanted]
        arrays = self._empty(len(chosen), length)
        arrays["examples"][:] = chosen
        for row, index in enumerate(chosen.tolist()):
            if index < 0:
                continue
            example = self._examples[index]
            for sequence, tokens_T in enumerate(example.sequences):
                place = (row, sequence) if len(example.sequences) > 1 else (row,)
                arrays["tokens"][place][: len(tokens_T)] = tokens_T
                arrays["ends"][place] = len(tokens_T) - 1
            arrays["weights"][row] = 1
            for name, target in example.targets.items():
                arrays[name][(row, slice(len(target))) if target.ndim else row] = target
        return Microbatch(arrays, int(self._num_tokens[of_all[of_all >= 0]].sum()))

    def _empty(self, size: int, length: int) -> dict[str, np.ndarray]:
        """The arrays of a microbatch in which all rows only fill up."""
        example = self._examples[0]
        shape = (size,) if len(example.sequences) == 1 else (size, len(example.sequences))
        arrays: dict[str, np.ndarray] = {
            "tokens": np.zeros((*shape, length), np.int32),
            "ends": np.zeros(shape, np.int32),
            "weights": np.zeros(size, np.float32),
            "examples": np.full(size, -1, np.int32),
        }
        for name, target in example.targets.items():
            of_positions = target.ndim == 1
            arrays[name] = np.full((size, length) if of_positions else size, -1 if of_positions else 0, target.dtype)
        return arrays
