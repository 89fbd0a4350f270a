"""Tokenises a corpus once, into ArrayRecord shards that later runs open immediately.

A document becomes its token ids followed by an end-of-text. The concatenated documents of a split are cut into pieces
of `PIECE_TOKENS` tokens, one record each, so that reading a document or part of it needs one or two small reads. A
prepared corpus is a directory that is written atomically and named by a hash of everything that determines its content:

  <cache_dir>/corpora/<key>/train-00000.array_record ...  token ids, little-endian uint16 or uint32
                            train_lengths.npy             int64 (documents,): tokens of each, with end-of-text
                            validation-*, validation_*    the same for the validation split
                            metadata.json                 counts, sizes of the files, source and tokenizer
"""

import array
import hashlib
import itertools
import json
import os
import shutil
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import numpy as np
import tqdm
from absl import logging
from array_record.python.array_record_module import ArrayRecordWriter

from gptjax.config import UserError
from gptjax.data.prepared_directories import (
    locked,
    new_partial,
    publish,
    remove_stale,
    share,
    sync,
    take_shared,
    writing,
)
from gptjax.data.source import D, Document, Source
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import is_plain_name, local_directory, read_json

PIECE_TOKENS = 8192
SHARD_BYTES = 2**28  # the time of a read is proportional to the records of its shard: 2 ns each
BATCH_CHARACTERS = 2**18  # characters of documents that a thread encodes at a time
FORMAT_VERSION = 1  # of the files, including PIECE_TOKENS; part of the directory's key

# With one record per chunk a random read reads only its record; compression would double the time of a read.
WRITER_OPTIONS = "group_size:1,uncompressed"


class DamagedCorpusError(UserError):
    """A part of a prepared corpus is damaged or missing."""


class PreparedSplit:
    """Tokenised documents of one split, on disk; thread-safe.

    Attributes:
      lengths: int64 (documents,), tokens of each document, including its end-of-text.
      num_documents, num_tokens: totals of the split; tokens include the end-of-text of each document.
      text_bytes: UTF-8 bytes of the text, the denominator of bits per byte.
      end_of_text: id of the token that ends each document.
      content: hash of documents and tokens, 24 hex digits, independent of where they were prepared.
    """

    def __init__(self, directory: Path, name: str, metadata: dict[str, Any]):
        """Opens split `name` of a prepared corpus; raises OSError, ValueError or RuntimeError if it is damaged."""
        counts = metadata["splits"][name]
        for file, size in counts["files"].items():
            if not is_plain_name(file):
                raise ValueError(f"metadata.json names {file!r}, which is not in its directory")
            if (directory / file).stat().st_size != size:
                raise ValueError(f"{directory / file} does not have {size} bytes")
        self.lengths = np.load(directory / f"{name}_lengths.npy", allow_pickle=False)
        if self.lengths.dtype != np.int64 or self.lengths.ndim != 1 or np.any(self.lengths < 1):
            raise ValueError(f"{name}_lengths.npy does not hold numbers of tokens")
        self.num_documents = len(self.lengths)
        self.num_tokens = int(self.lengths.sum())
        self.text_bytes, self.end_of_text = int(counts["text_bytes"]), int(metadata["end_of_text"])
        self.content = str(metadata.get("content", directory.name))
        self._directory = directory
        self._dtype = np.dtype(metadata["dtype"])
        self._starts = np.cumsum(self.lengths) - self.lengths
        shards = [str(directory / file) for file in counts["files"] if file.endswith(".array_record")]
        import grain

        self._pieces = grain.sources.ArrayRecordDataSource(shards) if shards else ()
        if (self.num_documents, self.num_tokens) != (counts["documents"], counts["tokens"]):
            raise ValueError(f"{name}_lengths.npy does not have the counts of metadata.json")
        if len(self._pieces) != -(-self.num_tokens // PIECE_TOKENS):
            raise ValueError(f"the {name} shards hold {len(self._pieces)} records, too few or many for the tokens")

    def read(self, document: int, start: int, stop: int) -> np.ndarray:
        """Reads tokens [start, stop) of a document, uint16 or uint32 (stop - start,).

        Raises:
          DamagedCorpusError: a shard is damaged.
        """
        begin, end = int(self._starts[document]) + start, int(self._starts[document]) + stop
        first, last = begin // PIECE_TOKENS, (end - 1) // PIECE_TOKENS
        try:
            pieces = [np.frombuffer(self._pieces[i], self._dtype) for i in range(first, last + 1)]
            joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
            tokens = joined[begin - first * PIECE_TOKENS : end - first * PIECE_TOKENS]
            if len(tokens) != stop - start:  # ArrayRecord returns empty records for a truncated shard
                raise ValueError(f"{len(tokens)} tokens where {stop - start} were written")
        except (RuntimeError, ValueError) as error:  # a record is missing or does not match its hash
            raise DamagedCorpusError(
                f"prepared corpus is damaged, delete {self._directory} and start again: {error}"
            ) from error
        return tokens


def prepare(
    source: Source, tokenizer: Tokenizer, cache_dir: Path, *, validation_fraction: float
) -> tuple[PreparedSplit, PreparedSplit]:
    """Returns the train and validation split of `source`, tokenising it unless it is cached.

    Several processes may call this concurrently: one tokenises, and the others wait if the file system supports locks.

    Args:
      source: the documents.
      tokenizer: encodes the documents.
      cache_dir: prepared corpora are in its directory corpora/.
      validation_fraction: fraction of the documents held out, see `split_documents`.

    Raises:
      UserError: the source cannot be read, has no text or changes while it is read, or the cache cannot be written, for
        example because the disk is full.
    """
    identity = {
        "format": FORMAT_VERSION,
        "source_fingerprint": source.fingerprint(),
        "tokenizer_fingerprint": tokenizer.encoding_fingerprint,
        "validation_fraction": validation_fraction,
    }
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    shared = cache_dir / "corpora" / key
    directory = local_directory(cache_dir) / "corpora" / key
    splits = _open(directory) or _prepare(source, tokenizer, directory, shared, identity)
    with writing(shared):
        share(directory, shared)
    return splits


def _prepare(
    source: Source, tokenizer: Tokenizer, directory: Path, shared: Path, identity: dict[str, Any]
) -> tuple[PreparedSplit, PreparedSplit]:
    """Tokenises the corpus into `directory`, unless another process does, or `shared` has it; as `prepare`."""
    with writing(directory.parent):
        directory.parent.mkdir(parents=True, exist_ok=True)
    with locked(directory.with_suffix(".lock")) as held:
        if (splits := _open(directory)) is not None:  # prepared by another process meanwhile
            return splits
        if directory.exists():
            logging.warning("The prepared corpus %s is damaged: preparing it again.", directory)
        remove_stale(directory, held)
        partial = new_partial(directory)
        try:
            with writing(partial):
                partial.mkdir()
                is_there = take_shared(shared, partial)
            if not is_there:
                _write_corpus(source, tokenizer, partial, identity)
            with writing(directory):
                if _open(partial) is None:  # verified, as not every failed write raises
                    raise OSError("the written files cannot be read back")
                publish(partial, directory, is_whole=lambda path: _open(path) is not None)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    splits = _open(directory)
    assert splits is not None, directory
    return splits


def split_documents(documents: Iterable[D], validation_fraction: float) -> Iterator[tuple[str, D]]:
    """Assigns documents to splits, deterministically by their order.

    Every k-th document is held out, k = max(2, round(1 / validation_fraction)). If there are fewer than k documents,
    the last one is held out; if there is only one, its tail.

    Args:
      documents: in a fixed order.
      validation_fraction: 0 holds out nothing, 1 everything.

    Yields:
      ("train" | "validation", document), in order; keeps two documents in memory.
    """
    if validation_fraction in (0, 1):
        yield from (("validation" if validation_fraction else "train", document) for document in documents)
        return
    every = held_out_interval(validation_fraction)
    assert every is not None
    followed = itertools.pairwise(itertools.chain(documents, (None,)))
    for index, (document, following) in enumerate(followed):
        assert document is not None
        if following is None and index == 0:
            logging.warning("The corpus is a single document: its last %g %% are held out.", 100 * validation_fraction)
            cut = _cut_tail(document, validation_fraction)
            yield from zip(("train", "validation"), cast(tuple[D, D], cut), strict=True)
        elif index % every == every - 1 or (following is None and index < every):
            yield "validation", document
        else:
            yield "train", document


def held_out_interval(validation_fraction: float) -> int | None:
    """Returns k, where every k-th document is held out; None for a fraction of 0."""
    return None if validation_fraction == 0 else max(2, round(1 / validation_fraction))


def _cut_tail(document: Document, fraction: float) -> tuple[Document, Document]:
    """Splits off the last `fraction` of a document; cuts a text at the nearest preceding blank, if one is close by."""
    tail = max(1, round(fraction * len(document)))
    cut = len(document) - tail
    if not isinstance(document, str):
        return document[:cut], document[cut:]
    blank = max(document.rfind(mark, max(0, cut - tail), cut) for mark in " \n")
    cut = cut if blank < 0 else blank + 1
    return document[:cut], document[cut:]


# --- writing ----------------------------------------------------------------------------------------------------------


def _write_corpus(source: Source, tokenizer: Tokenizer, directory: Path, identity: dict[str, Any]) -> None:
    """Writes all files of a prepared corpus into an empty directory, metadata.json last."""
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    writers = {name: _SplitWriter(directory, name, dtype) for name in ("train", "validation")}
    documents = split_documents(source.documents_for(tokenizer), identity["validation_fraction"])
    with tqdm.tqdm(total=source.size_bytes, unit="B", unit_scale=True, desc=f"Tokenising {source.spec}") as progress:
        for name, ids, text_bytes in _encode(documents, tokenizer):
            with writing(directory):
                writers[name].add(ids, text_bytes)
            progress.update(text_bytes)
    with writing(directory):
        splits = {name: writer.finish() for name, writer in writers.items()}
    if source.replaced_bytes:
        logging.warning(
            "%s: %d bytes in %d documents are not valid UTF-8 and were replaced.",
            source.spec,
            source.replaced_bytes,
            source.replaced_documents,
        )
    if source.skipped:
        logging.warning("%s: %d damaged files, lines or records were skipped.", source.spec, source.skipped)
    metadata = identity | {
        "source": source.spec,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "dtype": dtype.str,
        "replaced_bytes": source.replaced_bytes,
        "replaced_documents": source.replaced_documents,
        "skipped": source.skipped,
        "splits": splits,
    }
    with writing(directory):
        (directory / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
        for path in (*directory.iterdir(), directory):
            sync(path)


class _SplitWriter:
    """Writes the documents of one split."""

    def __init__(self, directory: Path, name: str, dtype: np.dtype):
        self._directory, self._name, self._dtype = directory, name, dtype
        self._lengths = array.array("q")
        self._text_bytes = 0
        self._unwritten = bytearray()  # tokens of an incomplete piece
        self._shards: list[Path] = []
        self._writer: ArrayRecordWriter | None = None
        self._shard_bytes = 0

    def add(self, ids: np.ndarray, text_bytes: int) -> None:
        """Appends the token ids (tokens,) of a document whose text has `text_bytes` bytes."""
        self._lengths.append(len(ids))
        self._text_bytes += text_bytes
        self._unwritten += ids.astype(self._dtype).tobytes()
        piece_bytes = PIECE_TOKENS * self._dtype.itemsize
        while len(self._unwritten) >= piece_bytes:
            self._write(bytes(self._unwritten[:piece_bytes]))
            del self._unwritten[:piece_bytes]

    def finish(self) -> dict[str, Any]:
        """Closes the files; returns the counts of the split and the size of each file."""
        if self._unwritten:
            self._write(bytes(self._unwritten))
        self._close_shard()
        lengths = self._directory / f"{self._name}_lengths.npy"
        np.save(lengths, np.array(self._lengths, np.int64))
        return {
            "documents": len(self._lengths),
            "tokens": int(np.sum(self._lengths, dtype=np.int64)),
            "text_bytes": self._text_bytes,
            "files": {path.name: path.stat().st_size for path in (*self._shards, lengths)},
        }

    def _write(self, piece: bytes) -> None:
        if self._writer is None:
            self._shards.append(self._directory / f"{self._name}-{len(self._shards):05d}.array_record")
            self._writer, self._shard_bytes = ArrayRecordWriter(str(self._shards[-1]), WRITER_OPTIONS), 0
        self._writer.write(piece)
        self._shard_bytes += len(piece)
        if self._shard_bytes >= SHARD_BYTES:
            self._close_shard()

    def _close_shard(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _encode(documents: Iterable[tuple[str, Document]], tokenizer: Tokenizer) -> Iterator[tuple[str, np.ndarray, int]]:
    """Encodes documents on all cores; yields (split, int32 ids with end-of-text, UTF-8 bytes) of each, in order."""

    def encode(batch: list[tuple[str, Document]]) -> list[tuple[str, np.ndarray, int]]:
        end, found = np.array([tokenizer.end_of_text], np.int32), []
        for name, document in batch:
            if isinstance(document, str):
                ids, text = tokenizer.encode(document), document
            else:
                ids, text = document, tokenizer.decode(document)
            found.append((name, np.concatenate([ids, end]), len(text.encode())))
        return found

    workers = os.cpu_count() or 1
    pending: deque[Future[list[tuple[str, np.ndarray, int]]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for batch in _batches(documents):
            pending.append(pool.submit(encode, batch))
            if len(pending) > 2 * workers:  # bounds memory
                yield from pending.popleft().result()
        while pending:
            yield from pending.popleft().result()


def _batches(documents: Iterable[tuple[str, Document]]) -> Iterator[list[tuple[str, Document]]]:
    batch, characters = [], 0
    for name, text in documents:
        batch.append((name, text))
        characters += len(text)
        if characters >= BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


# --- the cache directory ----------------------------------------------------------------------------------------------


def _open(directory: Path) -> tuple[PreparedSplit, PreparedSplit] | None:
    """Opens the train and validation split in a directory; None if they are missing or damaged."""
    try:
        metadata = read_json(directory / "metadata.json")
        return PreparedSplit(directory, "train", metadata), PreparedSplit(directory, "validation", metadata)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError):
        return None
