"""Step `select`: decides which documents, or pieces of documents, the corpus has."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.corpus.contamination import pieces
from gptjax.corpus.document_measures import Reason
from gptjax.corpus.duplicates import exact_copies, near_copies
from gptjax.corpus.near_copies import Bands
from gptjax.corpus.workspace import Part, Workspace, committed, load, read_part

BLOCK_DOCUMENTS = 2**20  # whose near copies are in memory at a time, at most about 500 MB

Arrays = dict[str, npt.NDArray[Any]]


def select(workspace: Workspace, item: int) -> None:
    """Drops copies and contaminated documents, and cuts the overlaps out of others.

    An exact copy is dropped if it is not the first, and a near copy of an earlier document if that one is not dropped
    itself: so a kept document stands for each one that is dropped.

    Files:
      <part>.npz: reason, uint8 (documents,); pieces, int64 (pieces, 3): document, first character, last character + 1.
      copies-<part>.npz: copy_of, int64 (documents,), the document that a copy repeats, or -1; similarity, float32
        (documents,), of the two, or NaN.
      counts.npz: pieces, int64 (parts,); gram_documents, int64 (grams,): kept documents with each gram of the tasks.
    """
    counts = []
    with committed(workspace.result("select", item)) as directory:
        copies = _write_copies(workspace, directory)
        gram_documents = _gram_documents(workspace, copies)
        common = gram_documents > workspace.recipe.max_gram_documents
        for part in workspace.parts:
            arrays = _selected(workspace, part, copies, common)
            counts.append(len(arrays["pieces"]))
            np.savez(directory / f"{part.number:06d}.npz", **arrays)  # type: ignore[arg-type]
        np.savez(directory / "counts.npz", pieces=np.array(counts, np.int64), gram_documents=gram_documents)


def selection(workspace: Workspace, name: str) -> Arrays:
    """Reads a file of the step."""
    return load(workspace.result("select", 0) / f"{name}.npz")


def selected_texts(workspace: Workspace, part: Part) -> Iterator[str]:
    """Yields the text of each piece of a part, in order."""
    arrays = selection(workspace, f"{part.number:06d}")
    of_document: dict[int, list[tuple[int, int]]] = {}
    for document, first, stop in arrays["pieces"].tolist():
        of_document.setdefault(document, []).append((first, stop))
    for index, text in enumerate(read_part(part)):
        for first, stop in of_document.get(index, ()):
            yield text[first:stop]


def measured(workspace: Workspace, part: Part) -> Arrays:
    """Reads documents.npz of a part, see `measure`."""
    return load(workspace.result("measure", part.number) / "documents.npz")


def _write_copies(workspace: Workspace, directory: Path) -> npt.NDArray[np.uint8]:
    """Writes copies-<part>.npz, see `select`; returns why each document of the source is a copy, uint8 (documents,)."""
    reasons = np.zeros(workspace.num_documents, np.uint8)
    if workspace.recipe.duplicates == "none":
        exact = np.zeros((0, 2), np.int64)
    else:
        exact = exact_copies(workspace)
        exact = exact[np.argsort(exact[:, 0])]
        reasons[exact[:, 0]] = Reason.EXACT_COPY
    hashes = Bands(workspace.recipe.similarity).num_hashes
    for _, group in itertools.groupby(workspace.parts, lambda part: part.start // BLOCK_DOCUMENTS):
        block = list(group)
        first, stop = block[0].start, block[-1].start + block[-1].documents
        copy_of, similarity = np.full(stop - first, -1, np.int64), np.full(stop - first, np.nan, np.float32)
        own = exact[slice(*np.searchsorted(exact[:, 0], [first, stop]))]
        copy_of[own[:, 0] - first], similarity[own[:, 0] - first] = own[:, 1], 1
        if workspace.recipe.duplicates == "near":
            # Ordered by the later document, so that the earlier one is decided.
            for later, earlier, equal in near_copies(workspace, first, stop).tolist():
                if reasons[earlier] == reasons[later] == Reason.KEPT:
                    reasons[later] = Reason.NEAR_COPY
                    copy_of[later - first], similarity[later - first] = earlier, equal / hashes
        for part in block:
            inside = slice(part.start - first, part.start - first + part.documents)
            path = directory / f"copies-{part.number:06d}.npz"
            np.savez(path, copy_of=copy_of[inside], similarity=similarity[inside])
    return reasons


def _reasons(part: Part, copies: npt.NDArray[np.uint8], arrays: Arrays) -> npt.NDArray[np.uint8]:
    return np.maximum(arrays["reason"], copies[part.start : part.start + part.documents])


def _gram_documents(workspace: Workspace, copies: npt.NDArray[np.uint8]) -> npt.NDArray[np.int64]:
    """Counts the kept documents with each gram of the tasks."""
    if not workspace.recipe.tasks:
        return np.zeros(0, np.int64)
    counts = np.zeros(len(load(workspace.result("grams", 0) / "grams.npz")["grams"]), np.int64)
    for part in workspace.parts:
        arrays = measured(workspace, part)
        kept = _reasons(part, copies, arrays) == Reason.KEPT
        overlaps = arrays["overlaps"][kept[arrays["overlaps"][:, 0]]]
        pairs = np.unique(overlaps[:, :2], axis=0)
        counts += np.bincount(pairs[:, 1], minlength=len(counts))
    return counts


def _selected(workspace: Workspace, part: Part, copies: npt.NDArray[np.uint8], common: npt.NDArray[np.bool_]) -> Arrays:
    arrays = measured(workspace, part)
    reason = _reasons(part, copies, arrays)
    overlaps = arrays["overlaps"]
    overlaps = overlaps[~common[overlaps[:, 1]]] if len(overlaps) else overlaps
    found: list[tuple[int, int, int]] = []
    for index in np.flatnonzero(reason == Reason.KEPT).tolist():
        begin, stop = np.searchsorted(overlaps[:, 0], [index, index + 1])
        length = int(arrays["characters"][index])
        whole = pieces(overlaps[begin:stop, 2:], length) if stop > begin else [(0, length)]
        if not whole:
            reason[index] = Reason.CONTAMINATED
        found += [(index, *piece) for piece in whole]
    return {"reason": reason, "pieces": np.array(found, np.int64).reshape(-1, 3)}
