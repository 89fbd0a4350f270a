"""Packs a prepared corpus into examples and batches; the only state is the number of examples consumed."""

import dataclasses
import functools
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

import numpy as np
from absl import logging

from gptjax.config import DataConfig, UserError, naming
from gptjax.data import sources, tokenizers
from gptjax.data.preparation import DamagedCorpusError, PreparedSplit, prepare, split_documents
from gptjax.data.prepared_corpora import PreparedCorpus, is_prepared
from gptjax.data.sources import Source
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import expand

ExampleArrays = dict[str, np.ndarray]  # the arrays of one training example, by name


class ExampleSource(Protocol):
    """Random access to examples by number, as grain's RandomAccessDataSource."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> ExampleArrays: ...


class Microbatch(NamedTuple):
    """Input of one forward and backward pass.

    Attributes:
      arrays: this process's rows of (B, ...) arrays; the last axis of arrays with two or more axes is T.
      num_tokens: number of tokens in all B rows, without padding rows.
    """

    arrays: dict[str, np.ndarray]
    num_tokens: int


class _Epoch(NamedTuple):
    """The order of one epoch."""

    documents: np.ndarray  # int64 (documents,): a permutation
    ends: np.ndarray  # int64 (documents,): position in the stream at which each of them ends
    shuffle_seed: int  # seed of the permutation of the examples


class PackedExamples:
    """Fixed-length windows of a stream of documents, in which every token is predicted exactly once per epoch.

    The stream of an epoch is the concatenation of its documents, each followed by an end-of-text. Example i predicts
    stream[i*T : (i+1)*T] from stream[i*T - 1 : (i+1)*T - 1], with an end-of-text before the stream, so that every
    document starts after an end-of-text. With a seed, the documents and then the examples are permuted for each epoch,
    the number of epochs is unlimited, and a last incomplete example of an epoch is dropped. Without a seed there is one
    epoch, in order, with its last example padded.

    The arrays of an example, each (T,):
      tokens: int32, the inputs.
      targets: int32.
      weights: float32, 1, or 0 where the target is padding.
      segments: int32, only with packing="segment": number of the target's document within the example, from 1; an
        end-of-text that is the input for the first token of a document belongs to that document. Padding is segment 0.
      positions: int32, only with packing="segment": from 0 in each segment.

    Attributes:
      split: the documents.
      examples_per_epoch: number of examples of T tokens.
      skipped: number of damaged examples read so far with on_corrupt="skip", which are returned as padding.
    """

    def __init__(
        self,
        split: PreparedSplit,
        context_length: int,
        *,
        packing: Literal["concatenate", "segment"] = "concatenate",
        seed: int | None,
        on_corrupt: Literal["error", "skip"] = "error",
    ):
        """Sets the length of an epoch.

        Args:
          split: the documents.
          context_length: T, tokens of an example.
          packing: see `DataConfig.packing`.
          seed: seed of the permutations; None: one epoch, in order.
          on_corrupt: see `DataConfig.on_corrupt`.

        Raises:
          UserError: an epoch has more examples than can be shuffled.
        """
        self.split, self.skipped, self._on_corrupt = split, 0, on_corrupt
        self.examples_per_epoch = (split.num_tokens + (0 if seed is not None else context_length - 1)) // context_length
        if self.examples_per_epoch > 2**32:  # index_shuffle would silently wrap around
            raise UserError(
                f"an epoch of {self.examples_per_epoch} examples is more than the 2**32 that can be shuffled: "
                "use a larger model.context_length or divide data.source"
            )
        self._context_length, self._packing, self._seed = context_length, packing, seed
        self._lock = threading.Lock()
        self._cached_epoch = functools.lru_cache(maxsize=2)(self._make_epoch)

    def __len__(self) -> int:
        """Number of examples of all epochs; with a seed, whole epochs up to about 2**60 examples."""
        epochs = 1 if self._seed is None else 2**60 // max(1, self.examples_per_epoch)
        return epochs * self.examples_per_epoch

    def __getitem__(self, index: int) -> ExampleArrays:
        if not 0 <= index < len(self):
            raise IndexError(index)
        number, example = divmod(index, self.examples_per_epoch)
        epoch = self._epoch(number)
        if self._seed is not None:
            import grain  # on first use: a command that only reads weights imports this module too

            last = self.examples_per_epoch - 1
            example = grain.experimental.index_shuffle(example, max_index=last, seed=epoch.shuffle_seed, rounds=4)
        start = example * self._context_length
        target_positions = np.arange(start, start + self._context_length)
        padding = target_positions >= self.split.num_tokens
        try:
            window = self._window(epoch, start)
        except DamagedCorpusError as error:
            if self._on_corrupt == "error":
                raise
            self.skipped += 1
            if self.skipped <= sources.MAX_LOGGED or self.skipped % 1000 == 0:
                logging.warning("skipped: example %d (%d so far): %s", index, self.skipped, error)
            window = np.full(self._context_length + 1, self.split.end_of_text, np.int32)
            padding = np.ones_like(padding)
        arrays = {"tokens": window[:-1], "targets": window[1:], "weights": (~padding).astype(np.float32)}
        if self._packing == "segment":
            documents = np.searchsorted(epoch.ends, target_positions, side="right")
            segments = np.where(padding, 0, documents - documents[0] + 1)
            steps = np.arange(self._context_length)
            starts = np.maximum.accumulate(np.where(np.diff(segments, prepend=-1) != 0, steps, 0))
            arrays |= {"segments": segments.astype(np.int32), "positions": (steps - starts).astype(np.int32)}
        return arrays

    def _window(self, epoch: _Epoch, start: int) -> np.ndarray:
        """Returns stream[start - 1 : start + T], int32 (T + 1,), with end-of-text outside the stream."""
        first, stop = start - 1, start + self._context_length
        window = np.full(stop - first, self.split.end_of_text, np.int32)
        begin_document, end_document = np.searchsorted(epoch.ends, [first, stop - 1], side="right")
        for i in range(begin_document, min(end_document + 1, len(epoch.ends))):
            document, end = int(epoch.documents[i]), int(epoch.ends[i])
            begin = end - int(self.split.lengths[document])
            left, right = max(begin, first), min(end, stop)
            window[left - first : right - first] = self.split.read(document, left - begin, right - begin)
        return window

    def _epoch(self, number: int) -> _Epoch:
        with self._lock:  # so that the threads of the pipeline permute a large corpus only once
            return self._cached_epoch(number)

    def _make_epoch(self, number: int) -> _Epoch:
        documents, shuffle_seed = np.arange(self.split.num_documents), 0
        if self._seed is not None:
            generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([self._seed % 2**64, number])))
            generator.shuffle(documents)
            shuffle_seed = int(generator.integers(2**32))
        return _Epoch(documents, np.cumsum(self.split.lengths[documents]), shuffle_seed)


def batches(
    examples: ExampleSource,
    *,
    start: int,
    batch_size: int,
    rows: Sequence[int] | None = None,
    prefetch: int,
) -> Iterator[Microbatch]:
    """Iterates over batches of consecutive examples, prefetched by a thread.

    Args:
      examples: the last batch is padded with all-zero rows, so that all batches have the same shape.
      start: number of examples consumed before. A run can be resumed with another batch size or other hosts.
      batch_size: rows of the batch over all processes.
      rows: rows to yield, in this order; None: all.
      prefetch: number of batches read ahead.

    Yields:
      The arrays of the examples, stacked to (len(rows), ...).
    """
    wanted = range(batch_size) if rows is None else rows
    last = len(examples) - 1

    def row(index: int) -> ExampleArrays:
        if index <= last:
            return examples[index]
        return {name: np.zeros_like(value) for name, value in examples[last].items()}

    def batch(number: int) -> Microbatch:
        first = start + number * batch_size
        read = [row(first + offset) for offset in wanted]
        arrays = {name: np.stack([example[name] for example in read]) for name in read[0]}
        full_rows = min(batch_size, last + 1 - first)
        return Microbatch(arrays, full_rows * arrays["tokens"][0].size)

    num_batches = max(0, -(-(len(examples) - start) // batch_size))
    import grain

    # One thread reads millions of tokens a second; more are slower, as they contend for the global interpreter lock.
    options = grain.ReadOptions(num_threads=1, prefetch_buffer_size=prefetch)
    return iter(grain.MapDataset.range(num_batches).map(batch).to_iter_dataset(options))


@dataclasses.dataclass(frozen=True)
class Corpus:
    """Tokenizer and packed splits of a run.

    Bits per byte = nats per token / ln 2 * split.num_tokens / split.text_bytes of the validation split.
    """

    tokenizer: Tokenizer
    train: PackedExamples
    validation: PackedExamples


def open_corpus(data: DataConfig, *, context_length: int, seed: int, tokenizer: Tokenizer | None = None) -> Corpus:
    """Opens the corpus of `data.source`; tokenises it, and trains the tokenizer, unless they are cached.

    Args:
      data: source, tokenizer and packing; without a mixture, which `mixture.open_mixture` opens.
      context_length: T, tokens of an example.
      seed: seed of the order of the training examples.
      tokenizer: used instead of data.tokenizer, for example when a run is resumed.

    Raises:
      UserError: a source or the tokenizer is not available, or a split is too short.
    """
    assert not data.mixture
    return open_corpora([data], "data.source", context_length=context_length, seed=seed, tokenizer=tokenizer)[0]


def open_corpora(
    parts: Sequence[DataConfig], key: str, *, context_length: int, seed: int, tokenizer: Tokenizer | None = None
) -> list[Corpus]:
    """Opens the corpora of several sources with one tokenizer, which is trained on the training documents of all.

    Args:
      parts: configs that differ only in `source`.
      key: config key that names the sources, for messages.
      context_length, seed, tokenizer: as in `open_corpus`, which also says what is raised.
    """
    data = parts[0]
    if tokenizer is None:
        with naming("data.tokenizer"):
            tokenizers.check_spec(data.tokenizer)  # before the corpus is read for its fingerprint
    opened = [_open_sources(part, key) for part in parts]
    cache_dir = expand(data.cache_dir)
    if tokenizer is None:
        tokenizer = _tokenizer_of(data, opened, cache_dir)

    def packed(split: PreparedSplit, seed: int | None) -> PackedExamples:
        return PackedExamples(split, context_length, packing=data.packing, seed=seed, on_corrupt=data.on_corrupt)

    corpora = []
    for part, found in zip(parts, opened, strict=True):
        train, validation = found.splits(data, tokenizer, cache_dir)
        if train.num_tokens < context_length:
            raise UserError(
                f"{key}: source {part.source!r} has {train.num_tokens} training tokens, fewer than one context of "
                f"{context_length}: use a longer corpus or a smaller model.context_length"
            )
        if validation.num_tokens == 0:
            raise UserError(f"{key}: source {part.source!r} leaves no validation documents: use a longer corpus")
        corpora.append(Corpus(tokenizer, packed(train, seed), packed(validation, None)))
    return corpora


def held_out_documents(data: DataConfig, tokenizer: Tokenizer) -> Iterator[str]:
    """Yields the documents of the validation split: those of `open_corpus`, without tokenising the others.

    Args:
      data: sources.
      tokenizer: decodes the documents of a source of token ids.
    """
    found = _open_sources(data)
    if found.validation is None and isinstance(found.train, PreparedCorpus):
        yield from found.train.held_out_documents(expand(data.cache_dir))
        return
    source, fraction = (found.train, found.fraction) if found.validation is None else (found.validation, 1.0)
    assert isinstance(source, Source)
    for split, document in split_documents(source.documents_for(tokenizer), fraction):
        if split == "validation":
            yield document if isinstance(document, str) else tokenizer.decode(document)


class _OpenedSources(NamedTuple):
    """The source of training documents, the fraction held out of it, and the source of held-out ones, if another."""

    train: Source | PreparedCorpus
    fraction: float
    validation: Source | None

    def splits(self, data: DataConfig, tokenizer: Tokenizer, cache_dir: Path) -> tuple[PreparedSplit, PreparedSplit]:
        """Returns the training and the validation split; tokenises them if they are not in the cache."""
        if isinstance(self.train, PreparedCorpus):
            self.train.check_tokenizer(tokenizer, data.tokenizer)
            train, validation = self.train.train, self.train.validation
        else:
            train, validation = prepare(self.train, tokenizer, cache_dir, validation_fraction=self.fraction)
        if self.validation is not None:
            _, validation = prepare(self.validation, tokenizer, cache_dir, validation_fraction=1.0)
        return train, validation


def _tokenizer_of(data: DataConfig, opened: Sequence[_OpenedSources], cache_dir: Path) -> Tokenizer:
    """Opens the tokenizer; one that is trained is that of a prepared corpus, or trained on the training documents."""
    raw = [(found.train, found.fraction) for found in opened if isinstance(found.train, Source)]
    for found in opened:
        if isinstance(found.train, PreparedCorpus):
            return found.train.tokenizer(data.tokenizer, cache_dir)

    def documents() -> Iterator[str]:
        for source, fraction in raw:
            yield from (text for split, text in split_documents(source.documents(), fraction) if split == "train")

    return tokenizers.get_tokenizer(
        data.tokenizer,
        train_documents=documents,
        corpus_fingerprint="+".join(f"{source.fingerprint()}-{fraction}" for source, fraction in raw),
        cache_dir=cache_dir,
    )


def _open_sources(data: DataConfig, key: str = "data.source") -> _OpenedSources:
    def open_(spec: str, key: str) -> Source:
        with naming(key):
            return sources.open_source(
                spec,
                document_separator=data.document_separator,
                invalid_utf8=data.invalid_utf8,
                on_corrupt=data.on_corrupt,
            )

    train: Source | PreparedCorpus
    if is_prepared(data.source):
        with naming(key):
            train = PreparedCorpus(data.source)
    else:
        train = open_(data.source, key)
    if data.validation_source is None:
        return _OpenedSources(train, data.validation_fraction, None)
    return _OpenedSources(train, 0.0, open_(data.validation_source, "data.validation_source"))
