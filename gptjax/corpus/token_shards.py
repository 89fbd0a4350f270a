"""Steps `tokenizer`, `tokenise` and `shards`: write the corpus in the files of `gptjax/data/preparation.py`.

The tokens of each part are written first. As their counts then give the place of each in the whole stream, the shards
are written independently of each other, byte for byte as one process would.
"""

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.corpus.selection import selected_texts, selection
from gptjax.corpus.step_examples import examples_of_part
from gptjax.corpus.workspace import Workspace, committed, write_json
from gptjax.data import tokenizers
from gptjax.data.preparation import PIECE_TOKENS, SHARD_BYTES, WRITER_OPTIONS, held_out_interval, split_documents
from gptjax.data.prepared_directories import sync
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import read_json, unfinished_path

SPLITS = ("train", "validation")


def save_tokenizer(workspace: Workspace, item: int) -> None:
    """Opens the tokenizer, or trains it on the training split, and saves it into the corpus.

    Raises:
      UserError: as `get_tokenizer`.
    """
    identity = read_json(workspace.output / "recipe.json")["content"]
    tokenizer = tokenizers.get_tokenizer(
        workspace.recipe.tokenizer,
        train_documents=lambda: (text for split, text in _split_texts(workspace) if split == "train"),
        corpus_fingerprint=identity,
        cache_dir=workspace.cache_dir,
    )
    with committed(workspace.result("tokenizer", item)) as directory:
        tokenizer.save(directory)


def open_tokenizer(workspace: Workspace) -> Tokenizer:
    """Opens the tokenizer of the corpus."""
    return tokenizers.load(workspace.result("tokenizer", 0), workspace.cache_dir)


def token_dtype(tokenizer: Tokenizer) -> np.dtype:
    """Returns the dtype of the tokens on disk."""
    return np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")


def _split_texts(workspace: Workspace, only: int | None = None) -> Iterator[tuple[str, str]]:
    """Yields ("train" | "validation", text) of the pieces of all parts, or of one, assigned as by `split_documents`."""
    counts = selection(workspace, "counts")["pieces"]
    total, fraction = int(counts.sum()), workspace.recipe.validation_fraction
    parts = workspace.parts if only is None else [workspace.parts[only]]
    index = 0 if only is None else int(counts[:only].sum())
    every = held_out_interval(fraction)
    for text in itertools.chain.from_iterable(selected_texts(workspace, part) for part in parts):
        if total == 1:
            yield from split_documents([text], fraction)
        else:
            last = every is not None and index == total - 1 and total < every
            held_out = last or (every is not None and index % every == every - 1)
            yield "validation" if held_out else "train", text
        index += 1


def tokenise(workspace: Workspace, item: int) -> None:
    """Encodes the documents of a part.

    Files: <split>.bin, the tokens; <split>_lengths.npy, int64 (documents,); counts.json, with text_bytes of each split
    and the examples of what was dropped.
    """
    tokenizer = open_tokenizer(workspace)
    dtype, end = token_dtype(tokenizer), np.array([tokenizer.end_of_text], np.int32)
    lengths: dict[str, list[int]] = {split: [] for split in SPLITS}
    text_bytes = dict.fromkeys(SPLITS, 0)
    with committed(workspace.result("tokenise", item)) as directory:
        with (directory / "train.bin").open("wb") as train, (directory / "validation.bin").open("wb") as validation:
            files = dict(zip(SPLITS, (train, validation), strict=True))
            for split, text in _split_texts(workspace, item):
                ids = np.concatenate([tokenizer.encode(text), end]).astype(dtype)
                files[split].write(ids.tobytes())
                lengths[split].append(len(ids))
                text_bytes[split] += len(text.encode())
        for split in SPLITS:
            np.save(directory / f"{split}_lengths.npy", np.array(lengths[split], np.int64))
        examples = examples_of_part(workspace, workspace.parts[item])
        write_json(directory / "counts.json", {"text_bytes": text_bytes, "examples": examples})


def shards(workspace: Workspace) -> list[tuple[str, int]]:
    """Returns (split, number) of all shards; the parts must be tokenised."""
    sizes = {split: sum(_sizes(workspace, split)) for split in SPLITS}
    return [(split, number) for split in SPLITS for number in range(-(-sizes[split] // SHARD_BYTES))]


def shard_path(workspace: Workspace, shard: tuple[str, int]) -> Path:
    """Returns the path of a shard."""
    return workspace.output / f"{shard[0]}-{shard[1]:05d}.array_record"


def write_shard(workspace: Workspace, item: int) -> None:
    """Writes a shard of `SHARD_BYTES` bytes of tokens, atomically."""
    from array_record.python.array_record_module import ArrayRecordWriter

    split, number = shards(workspace)[item]
    path = shard_path(workspace, (split, number))
    unfinished = unfinished_path(path)
    piece_bytes = PIECE_TOKENS * token_dtype(open_tokenizer(workspace)).itemsize
    try:
        writer = ArrayRecordWriter(str(unfinished), WRITER_OPTIONS)
        unwritten = b""
        for block in _stream(workspace, split, number * SHARD_BYTES, (number + 1) * SHARD_BYTES):
            unwritten += block
            whole = len(unwritten) // piece_bytes * piece_bytes
            for begin in range(0, whole, piece_bytes):
                writer.write(unwritten[begin : begin + piece_bytes])
            unwritten = unwritten[whole:]
        if unwritten:
            writer.write(unwritten)
        writer.close()
        sync(unfinished)
        unfinished.rename(path)
    except RuntimeError as error:  # ArrayRecord's form of an OSError
        raise OSError(str(error)) from error
    finally:
        unfinished.unlink(missing_ok=True)


def _sizes(workspace: Workspace, split: str) -> list[int]:
    return [os.path.getsize(workspace.result("tokenise", part.number) / f"{split}.bin") for part in workspace.parts]


def _stream(workspace: Workspace, split: str, begin: int, stop: int) -> Iterator[bytes]:
    """Yields the bytes [begin, stop) of the tokens of all parts, a few megabytes at a time."""
    end = 0
    for part, size in zip(workspace.parts, _sizes(workspace, split), strict=True):
        start, end = end, end + size
        place, last = max(begin, start), min(stop, end)
        if place >= last:
            continue
        with (workspace.result("tokenise", part.number) / f"{split}.bin").open("rb") as file:
            file.seek(place - start)
            while place < last:
                block = file.read(min(2**22, last - place))
                yield block
                place += len(block)


def finish_splits(workspace: Workspace) -> dict[str, Any]:
    """Writes the lengths of the documents; returns the counts of each split and the size of each of its files."""
    found = {}
    for split in SPLITS:
        parts = [workspace.result("tokenise", part.number) for part in workspace.parts]
        lengths: npt.NDArray[np.int64] = np.concatenate([np.load(part / f"{split}_lengths.npy") for part in parts])
        path = workspace.output / f"{split}_lengths.npy"
        np.save(path, lengths)
        files = [*(shard_path(workspace, shard) for shard in shards(workspace) if shard[0] == split), path]
        found[split] = {
            "documents": len(lengths),
            "tokens": int(lengths.sum()),
            "text_bytes": sum(read_json(part / "counts.json")["text_bytes"][split] for part in parts),
            "files": {file.name: file.stat().st_size for file in files},
        }
    return found
