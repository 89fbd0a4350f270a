"""Step `measure`: what later steps need to know of each document, computed from its text."""

import enum

import numpy as np

from gptjax.corpus.contamination import overlaps_of
from gptjax.corpus.document_keys import content_keys
from gptjax.corpus.near_copies import Bands
from gptjax.corpus.quality import QualityFilter
from gptjax.corpus.word_grams import find_words
from gptjax.corpus.workspace import Workspace, committed, read_part


class Reason(enum.IntEnum):
    """Why a document is dropped, in the order of the filters."""

    KEPT = 0
    LANGUAGE = 1
    QUALITY = 2
    EXACT_COPY = 3
    NEAR_COPY = 4
    CONTAMINATED = 5


def measure(workspace: Workspace, item: int) -> None:
    """Measures the documents of a part, and filters them by language and quality.

    Files, for n documents, m of which pass both filters:
      documents.npz: reason, uint8 (n,); characters and text_bytes, int64 (n,); language, str (n,), and score,
        float32 (n,), empty and NaN where they are not computed; overlaps, int64 (overlaps, 4): document, gram, first
        character, last character + 1.
      passed.npy: int64 (m,), the documents that pass, counted within the part.
      keys.npy: uint64 (m, 2), their content keys.
      signatures.npy, bands.npy: uint32 (m, hashes) and uint64 (bands, m), only to find near copies; a document without
        words has the key 0 in all bands.
    """
    recipe, part = workspace.recipe, workspace.parts[item]
    quality = None if recipe.quality_reference is None else QualityFilter(workspace)
    layout = Bands(recipe.similarity) if recipe.duplicates == "near" else None
    grams = overlaps_of(workspace.result("grams", 0) / "grams.npz") if recipe.tasks else None
    reasons, characters, sizes, languages, scores = [], [], [], [], []
    keys, signatures, overlaps = [], [], [np.zeros((0, 4), np.int64)]
    for index, text in enumerate(read_part(part)):
        key = content_keys(text)
        language = _language(text) if recipe.languages else ""
        reason, score = Reason.KEPT, float("nan")
        if recipe.languages and language not in recipe.languages:
            reason = Reason.LANGUAGE
        elif quality is not None:
            score = quality.score(text)
            reason = Reason.KEPT if quality.keeps(int(key[0]), score) else Reason.QUALITY
        reasons.append(reason)
        characters.append(len(text))
        sizes.append(len(text.encode()))
        languages.append(language)
        scores.append(score)
        if reason != Reason.KEPT:
            continue
        keys.append(key)
        if layout is None and grams is None:
            continue
        words = find_words(text)
        if layout is not None:
            empty = np.zeros(layout.num_hashes, np.uint32)
            signatures.append(layout.signature(words.hashes) if len(words.hashes) else empty)
        if grams is not None and len(found := grams.find(words)):
            overlaps.append(np.insert(found, 0, index, axis=1))
    reason_of = np.array(reasons, np.uint8)
    with committed(workspace.result("measure", item)) as directory:
        np.savez(
            directory / "documents.npz",
            reason=reason_of,
            characters=np.array(characters, np.int64),
            text_bytes=np.array(sizes, np.int64),
            language=np.array(languages, np.str_),
            score=np.array(scores, np.float32),
            overlaps=np.concatenate(overlaps),
        )
        np.save(directory / "passed.npy", np.flatnonzero(reason_of == Reason.KEPT))
        np.save(directory / "keys.npy", np.array(keys, np.uint64).reshape(-1, 2))
        if layout is not None:
            values = np.array(signatures, np.uint32).reshape(-1, layout.num_hashes)
            bands = layout.keys(values)
            bands[:, (values == 0).all(1)] = 0
            np.save(directory / "signatures.npy", values)
            np.save(directory / "bands.npy", bands)


def _language(text: str) -> str:
    from gptjax.corpus.language import language_of

    return language_of(text)
