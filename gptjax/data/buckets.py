"""Length bucketing: batches of examples of similar length, with little padding and few distinct shapes."""

import functools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from gptjax.data.pipeline import Microbatch
from gptjax.data.task_inputs import EncodedRow

SHORTEST = 32  # tokens of the smallest bucket; smaller ones would save little work and need further compilations
POOL_BATCHES = 50  # examples are sorted by length within this many batches; more pad less, but shuffle less


class Buckets:
    """Batches of examples, padded to the smallest bucket that holds the longest sequence of the batch.

    Buckets are the powers of two from 32, and the context length. With a seed, the number of epochs is unlimited, and
    the order of an epoch is a function of the seed and the epoch's number: the examples are permuted, sorted by length
    within each 50 batches, cut into batches, and the batches permuted. Without a seed there is one epoch, sorted by
    length. One batch of an epoch is filled up with padding rows, so that each example occurs exactly once.

    Arrays of a microbatch, where T is the bucket and O the number of sequences of an example:
      tokens: int32 (B, T), or (B, O, T) if O is not 1; right-padded with 0.
      ends: int32 (B,) or (B, O), the position of the last token, `extract`.
      weights: float32 (B,), 1, or 0 for padding rows.
      examples: int32 (B,), index of the example, or -1 for padding rows.
      the targets of the examples: (B,), or (B, T) in tagging, where padding is -1.
    All other values of padding rows are 0, except the labels of tagging, which are -1.

    Attributes:
      examples_per_epoch: number of rows of an epoch, padding rows included: a multiple of the batch size.
      tokens_per_epoch: number of tokens without padding.
    """

    def __init__(
        self,
        examples: Sequence[EncodedRow],
        *,
        context_length: int,
        batch_size: int,
        microbatch_size: int,
        seed: int | None,
    ) -> None:
        """Computes the lengths and numbers of batches.

        Args:
          examples: from one call of `encode`; at least one.
          context_length: of the model; no sequence is longer.
          batch_size: rows of a batch, over all processes.
          microbatch_size: rows of a microbatch, over all processes; a divisor of the batch size.
          seed: seed of the order; None: one epoch, for evaluation.
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
        """Returns the examples of the rows of a batch, int32 (batch_size,), -1 for padding; batches count from 0."""
        epoch, number = divmod(batch, self._batches_per_epoch)
        with self._lock:  # so that concurrent threads compute the order of an epoch once
            return self._cached_order(epoch)[number]

    def microbatches(self, start: int, rows: Sequence[int], prefetch: int) -> Iterator[Microbatch]:
        """Iterates over the microbatches from an example on, prefetched by a thread.

        Args:
          start: number of rows consumed before, padding rows included; rounded down to whole batches.
          rows: rows of each microbatch that this process reads, in this order.
          prefetch: number of microbatches read ahead.
        """
        import grain

        each = self._batch_size // self._microbatch_size
        wanted = np.asarray(rows, np.int64)

        def microbatch(number: int) -> Microbatch:
            batch, part = divmod(number, each)
            return self._microbatch(self.indices(batch), part * self._microbatch_size, wanted)

        epochs = 1 if self._seed is None else 2**60 // (self._batches_per_epoch * each)
        numbers = grain.MapDataset.range(start // self._batch_size * each, epochs * self._batches_per_epoch * each)
        # One thread is enough; more would contend for the global interpreter lock.
        options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
        return iter(numbers.map(microbatch).to_iter_dataset(options))

    def _make_order(self, epoch: int) -> npt.NDArray[np.int32]:
        """Returns the examples in the batches of an epoch, int32 (batches, batch_size); -1 is padding."""
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
        """Returns the `wanted` rows of the microbatch that begins at row `first` of the batch `indices`."""
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
        """Returns the arrays of a microbatch of padding rows."""
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
