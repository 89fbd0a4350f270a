"""Steps `exact` and `near`: find copies among all documents by sorting their keys, in bounded memory.

A task of a step reads the keys of one range of their values from the files of all parts, so that the memory does not
grow with the corpus; the tasks of all ranges together see each key once.
"""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptjax.corpus.near_copies import Bands
from gptjax.corpus.word_grams import Hashes
from gptjax.corpus.workspace import Workspace, committed

RANGE_DOCUMENTS = 2**22  # documents of a range: at most about 200 MB
GATHERED = 2**17  # signatures that are compared at a time, 64 MB; a larger group of candidates is cut
MAX_LEADERS = 32  # documents of a group of candidates that the others are compared with

# A near copy: its number, that of the earlier document, and their equal hash values.
PAIR = np.dtype([("later", "<i8"), ("earlier", "<i8"), ("equal", "<i4")])


def num_ranges(workspace: Workspace) -> int:
    """Returns the number of ranges of keys."""
    return max(1, -(-workspace.num_documents // RANGE_DOCUMENTS))


def in_range(keys: Hashes, number: int, count: int) -> npt.NDArray[np.bool_]:
    """Whether each key is in range `number` of `count` ranges of equal width."""
    return (keys >> np.uint64(40)) * np.uint64(count) >> np.uint64(24) == np.uint64(number)


def find_exact(workspace: Workspace, item: int) -> None:
    """Step `exact`: writes (copy, first document with this text), int64 (copies, 2), of a range of content keys."""
    count = num_ranges(workspace)
    keys_of_parts, numbers_of_parts = [], []
    for part in workspace.parts:
        measured = workspace.result("measure", part.number)
        numbers = part.start + np.load(measured / "passed.npy")
        keys = np.load(measured / "keys.npy", mmap_mode="r")[:]
        chosen = in_range(keys[:, 0], item, count)
        keys_of_parts.append(keys[chosen])
        numbers_of_parts.append(numbers[chosen])
    keys, numbers = np.concatenate(keys_of_parts), np.concatenate(numbers_of_parts)
    order = np.lexsort((numbers, keys[:, 1], keys[:, 0]))
    keys, numbers = keys[order], numbers[order]
    same = np.zeros(len(keys), bool)
    same[1:] = (keys[1:] == keys[:-1]).all(1)
    firsts = np.maximum.accumulate(np.where(same, 0, np.arange(len(keys))))
    with committed(workspace.result("exact", item)) as directory:
        np.save(directory / "copies.npy", np.stack([numbers[same], numbers[firsts[same]]], 1))


def exact_copies(workspace: Workspace) -> npt.NDArray[np.int64]:
    """Returns (copy, first document with this text) of all copies, int64 (copies, 2)."""
    files = (workspace.result("exact", item) / "copies.npy" for item in range(num_ranges(workspace)))
    return np.concatenate([np.load(file) for file in files])


def find_near(workspace: Workspace, item: int) -> None:
    """Step `near`: writes the near copies that agree in a band whose key is in a range, `PAIR` (pairs,), sorted.

    Documents of one group of candidates are compared with the first of them; those that differ from it with the first
    of these, and so on.
    """
    ranges = num_ranges(workspace)
    band, number = divmod(item, ranges)
    layout = Bands(workspace.recipe.similarity)
    is_copy = np.zeros(workspace.num_documents, bool)
    is_copy[exact_copies(workspace)[:, 0]] = True
    keys_of_parts, numbers_of_parts = [], []
    for part in workspace.parts:
        measured = workspace.result("measure", part.number)
        numbers = part.start + np.load(measured / "passed.npy")
        keys = np.load(measured / "bands.npy", mmap_mode="r")[band]
        chosen = (keys != 0) & ~is_copy[numbers] & in_range(keys, number, ranges)
        keys_of_parts.append(keys[chosen])
        numbers_of_parts.append(numbers[chosen])
    keys, numbers = np.concatenate(keys_of_parts), np.concatenate(numbers_of_parts)
    order = np.lexsort((numbers, keys))
    found = [
        _compared(group, signatures, layout.least_equal)
        for groups in _batches(keys[order], numbers[order])
        for group, signatures in _with_signatures(workspace, groups)
    ]
    pairs = np.concatenate([np.zeros(0, PAIR), *found])
    with committed(workspace.result("near", item)) as directory:
        np.save(directory / "pairs.npy", pairs[np.lexsort((pairs["earlier"], pairs["later"]))])


def _batches(keys: Hashes, numbers: npt.NDArray[np.int64]) -> Iterator[list[npt.NDArray[np.int64]]]:
    """Yields lists of groups of documents with equal keys, of at most about `GATHERED` documents together."""
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1])) if len(keys) else np.zeros(0, np.int64)
    sizes = np.diff(np.append(starts, len(keys)))
    groups: list[npt.NDArray[np.int64]] = []
    size = 0
    for start, length in zip(starts[sizes > 1].tolist(), sizes[sizes > 1].tolist(), strict=True):
        for begin in range(start, start + length, GATHERED):
            group = numbers[begin : min(begin + GATHERED, start + length)]
            if size + len(group) > GATHERED:
                yield groups
                groups, size = [], 0
            groups.append(group)
            size += len(group)
    if groups:
        yield groups


def _with_signatures(
    workspace: Workspace, groups: list[npt.NDArray[np.int64]]
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.uint32]]]:
    """Yields each group with the signatures of its documents, uint32 (documents, hashes)."""
    wanted = np.unique(np.concatenate(groups))
    signatures = np.empty((len(wanted), Bands(workspace.recipe.similarity).num_hashes), np.uint32)
    ends = np.array([part.start + part.documents for part in workspace.parts])
    for index in np.unique(np.searchsorted(ends, wanted, side="right")).tolist():
        part = workspace.parts[index]
        own = slice(*np.searchsorted(wanted, [part.start, part.start + part.documents]))
        measured = workspace.result("measure", index)
        rows = np.searchsorted(np.load(measured / "passed.npy"), wanted[own] - part.start)
        signatures[own] = np.load(measured / "signatures.npy", mmap_mode="r")[rows]
    for group in groups:
        yield group, signatures[np.searchsorted(wanted, group)]


def _compared(
    group: npt.NDArray[np.int64], signatures: npt.NDArray[np.uint32], least_equal: int
) -> npt.NDArray[np.void]:
    """Returns the pairs of a leader and a later document of a group with enough equal hash values."""
    found = []
    unmatched = np.ones(len(group), bool)
    for _ in range(MAX_LEADERS):
        leaders = np.flatnonzero(unmatched)
        if len(leaders) == 0 or leaders[0] == len(group) - 1:
            break
        leader = leaders[0]
        unmatched[leader] = False
        equal = (signatures[leader + 1 :] == signatures[leader]).sum(1, dtype=np.int32)
        (later,) = np.nonzero(equal >= least_equal)
        unmatched[leader + 1 + later] = False
        pairs = np.empty(len(later), PAIR)
        pairs["later"], pairs["earlier"], pairs["equal"] = group[leader + 1 + later], group[leader], equal[later]
        found.append(pairs)
    return np.concatenate(found) if found else np.zeros(0, PAIR)


def near_copies(workspace: Workspace, first: int, stop: int) -> npt.NDArray[np.void]:
    """Returns the near copies among the documents [first, stop), `PAIR` (pairs,), sorted, each once."""
    found = [np.zeros(0, PAIR)]
    for path in _near_files(workspace):
        pairs = np.load(path, mmap_mode="r")
        found.append(pairs[slice(*np.searchsorted(pairs["later"], [first, stop]))])
    return np.unique(np.concatenate(found))


def _near_files(workspace: Workspace) -> list[Path]:
    count = Bands(workspace.recipe.similarity).bands * num_ranges(workspace)
    return [workspace.result("near", item) / "pairs.npy" for item in range(count)]
