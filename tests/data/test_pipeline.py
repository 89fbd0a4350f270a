"""Packing and order: every token is a target once per epoch, and runs resume with any batch size."""

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.config import DataConfig, UserError
from gptjax.data import pipeline, preparation, tokenizers
from gptjax.data.pipeline import PackedExamples, batches, open_corpus
from gptjax.data.preparation import PreparedSplit, prepare
from gptjax.data.sources import open_source
from gptjax.data.tokenizers import BytesTokenizer, Tokenizer

END = 0


class NumberTokenizer(Tokenizer):
    """Documents are written as their token ids, so that a test can give every token of a corpus its own id."""

    vocab_size = 50_000
    end_of_text = END

    def encode(self, text: str) -> np.ndarray:
        return np.array(text.split(), np.int32)

    def _decode(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))

    def _spec(self) -> dict[str, str]:
        return {"kind": "numbers"}


def write_jsonl(path: Path, documents: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return f"jsonl:{path}"


def prepared(directory: Path, documents: list[list[int]]) -> PreparedSplit:
    spec = write_jsonl(directory / "numbers.jsonl", [" ".join(map(str, ids)) for ids in documents])
    return prepare(open_source(spec), NumberTokenizer(), directory, validation_fraction=0.0)[0]


@pytest.fixture
def numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PreparedSplit:
    """30 documents of 1 to 60 tokens and their end-of-texts, 960 tokens in all, numbered through from 1."""
    monkeypatch.setattr(preparation, "PIECE_TOKENS", 50)
    lengths = np.random.default_rng(0).integers(1, 61, 30)
    lengths[0] += 960 - 30 - lengths.sum()
    assert lengths[0] > 0
    ids = iter(range(1, 10_000))
    return prepared(tmp_path, [list(itertools.islice(ids, int(length))) for length in lengths])


def every_token(split: PreparedSplit) -> list[int]:
    return sorted(np.concatenate([split.read(i, 0, int(length)) for i, length in enumerate(split.lengths)]).tolist())


def epoch_targets(examples: PackedExamples, epoch: int) -> np.ndarray:
    """int32 (examples of the epoch, T)."""
    first = epoch * examples.examples_per_epoch
    return np.stack([examples[first + i]["targets"] for i in range(examples.examples_per_epoch)])


# --- examples ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("context_length", [1, 16, 96, 960])
@pytest.mark.parametrize("seed", [None, 0])
def test_every_token_is_a_target_once(numbers: PreparedSplit, context_length: int, seed: int | None) -> None:
    examples = PackedExamples(numbers, context_length, seed=seed)
    for epoch in range(1 if seed is None else 3):
        assert sorted(epoch_targets(examples, epoch).ravel().tolist()) == every_token(numbers)


def test_inputs_are_the_tokens_before_the_targets(numbers: PreparedSplit) -> None:
    first_tokens = {int(numbers.read(i, 0, 1)[0]) for i in range(numbers.num_documents)}
    examples = PackedExamples(numbers, 16, seed=3)
    for i in range(2 * examples.examples_per_epoch):
        example = examples[i]
        assert example["tokens"].dtype == example["targets"].dtype == np.int32
        assert example["weights"].dtype == np.float32
        assert example["weights"].all()
        for token, target in zip(example["tokens"], example["targets"], strict=True):
            if target != END:
                assert token == (END if int(target) in first_tokens else target - 1)


def test_training_leaves_out_only_what_fills_no_example(numbers: PreparedSplit) -> None:
    examples = PackedExamples(numbers, 100, seed=0)
    targets = [epoch_targets(examples, epoch) for epoch in range(3)]
    for of_epoch in targets:
        assert of_epoch.shape == (9, 100)
        ids = of_epoch[of_epoch != END]
        assert len(np.unique(ids)) == len(ids)
    assert set(targets[0].ravel()) != set(targets[1].ravel())  # another tail each time
    assert len(examples) > 10**15


def test_order_is_a_function_of_seed_and_epoch(numbers: PreparedSplit) -> None:
    examples = PackedExamples(numbers, 16, seed=0)
    first, second = epoch_targets(examples, 0), epoch_targets(examples, 1)
    np.testing.assert_array_equal(first, epoch_targets(PackedExamples(numbers, 16, seed=0), 0))
    np.testing.assert_array_equal(second, epoch_targets(PackedExamples(numbers, 16, seed=0), 1))  # epoch 0 unseen
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, epoch_targets(PackedExamples(numbers, 16, seed=1), 0))


def test_neighbours_in_the_stream_are_apart(tmp_path: Path) -> None:
    one_document = prepared(tmp_path, [list(range(1, 3201))])
    examples = PackedExamples(one_document, 16, seed=0)
    starts = [epoch_targets(examples, epoch)[:, 0] for epoch in range(2)]
    for of_epoch in starts:
        assert sorted(of_epoch) == list(range(1, 3201, 16))
        assert np.mean(np.abs(np.diff(of_epoch)) == 16) < 0.1
    assert not np.array_equal(starts[0], starts[1])


def test_packing_by_hand(tmp_path: Path) -> None:
    split = prepared(tmp_path, [[1, 2], [3], [4, 5, 6, 7]])
    expected = [
        {"tokens": [0, 1, 2, 0], "targets": [1, 2, 0, 3], "segments": [1, 1, 1, 2], "positions": [0, 1, 2, 0]},
        {"tokens": [3, 0, 4, 5], "targets": [0, 4, 5, 6], "segments": [1, 2, 2, 2], "positions": [0, 0, 1, 2]},
        {"tokens": [6, 7, 0, 0], "targets": [7, 0, 0, 0], "segments": [1, 1, 0, 0], "positions": [0, 1, 0, 1]},
    ]
    weights = [[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]]
    segmented = PackedExamples(split, 4, packing="segment", seed=None)
    concatenated = PackedExamples(split, 4, packing="concatenate", seed=None)
    assert len(segmented) == len(concatenated) == 3
    for i in range(3):
        by_hand = expected[i] | {"weights": weights[i]}
        assert {name: value.tolist() for name, value in segmented[i].items()} == by_hand
        assert segmented[i]["segments"].dtype == segmented[i]["positions"].dtype == np.int32
        del by_hand["segments"], by_hand["positions"]
        assert {name: value.tolist() for name, value in concatenated[i].items()} == by_hand
    with pytest.raises(IndexError):
        segmented[3]


# --- batches ----------------------------------------------------------------------------------------------------------


def rows(examples: Any, count: int, **arguments: Any) -> np.ndarray:
    """The targets of the first `count` rows of batches, int32 (count, T)."""
    iterator = batches(examples, prefetch=2, **arguments)
    found = np.concatenate([next(iterator).arrays["targets"] for _ in range(-(-count // arguments["batch_size"]))])
    return found[:count]


@pytest.mark.parametrize(("start", "batch_size"), [(0, 1), (0, 7), (5, 3), (59, 4), (64, 8), (1000, 2)])
def test_start_counts_examples(numbers: PreparedSplit, start: int, batch_size: int) -> None:
    examples = PackedExamples(numbers, 16, seed=0)  # 60 examples in an epoch
    uninterrupted = rows(examples, 1024, start=0, batch_size=8)
    np.testing.assert_array_equal(
        rows(PackedExamples(numbers, 16, seed=0), 24, start=start, batch_size=batch_size),
        uninterrupted[start : start + 24],
    )


@pytest.mark.parametrize("shares_of_rows", [[range(3), range(3, 6)], [[0, 4], [1, 2], [3, 5]], [range(6), range(6)]])
def test_processes_read_the_rows_they_need_of_the_same_batch(numbers: PreparedSplit, shares_of_rows: list) -> None:
    examples = PackedExamples(numbers, 16, seed=0, packing="segment")
    whole = batches(examples, start=5, batch_size=6, prefetch=1)
    shares = [batches(examples, start=5, batch_size=6, rows=rows, prefetch=3) for rows in shares_of_rows]
    for _ in range(12):
        expected, parts = next(whole), [next(share) for share in shares]
        for part, rows in zip(parts, shares_of_rows, strict=True):
            assert part.num_tokens == expected.num_tokens == 6 * 16
            for name, value in expected.arrays.items():
                np.testing.assert_array_equal(part.arrays[name], value[list(rows)])


@pytest.mark.parametrize("wanted", [[0, 1, 2, 3], [0], [3], [1, 3]])
def test_last_validation_batch_is_filled_up(numbers: PreparedSplit, wanted: list[int]) -> None:
    examples = PackedExamples(numbers, 64, seed=None)  # 15 examples
    share = list(batches(examples, start=0, batch_size=4, rows=wanted, prefetch=2))
    assert [batch.arrays["targets"].shape for batch in share] == [(len(wanted), 64)] * 4
    whole_rows = np.concatenate([batch.arrays["weights"] for batch in share]).all(axis=1)
    assert whole_rows.tolist() == [4 * number + row < 15 for number in range(4) for row in wanted]


def test_nothing_is_left_after_the_end(numbers: PreparedSplit) -> None:
    assert list(batches(PackedExamples(numbers, 64, seed=None), start=15, batch_size=4, prefetch=2)) == []


# --- corpora ----------------------------------------------------------------------------------------------------------

WORDS = [f"document {i} says something" for i in range(20)]


def bytes_config(directory: Path, documents: list[str], **fields: Any) -> DataConfig:
    spec = write_jsonl(directory / "corpus.jsonl", documents)
    return DataConfig(source=spec, tokenizer="bytes", cache_dir=str(directory / "cache"), **fields)


def validation_text(corpus: pipeline.Corpus) -> str:
    targets = epoch_targets(corpus.validation, 0).ravel()[: corpus.validation.split.num_tokens]
    return bytes(np.where(targets == 256, ord("|"), targets).tolist()).decode()


def test_open_corpus(tmp_path: Path) -> None:
    corpus = open_corpus(bytes_config(tmp_path, WORDS, validation_fraction=0.1), context_length=32, seed=0)
    assert isinstance(corpus.tokenizer, BytesTokenizer)
    assert validation_text(corpus) == f"{WORDS[9]}|{WORDS[19]}|"
    assert corpus.validation.split.text_bytes == len(WORDS[9] + WORDS[19])
    assert corpus.train.split.num_documents == 18
    assert "segments" not in corpus.train[0]


def test_packing_is_that_of_the_config(tmp_path: Path) -> None:
    corpus = open_corpus(bytes_config(tmp_path, WORDS, packing="segment"), context_length=32, seed=0)
    assert "segments" in corpus.train[0]
    assert "segments" in corpus.validation[0]


def test_validation_source_is_held_out_whole(tmp_path: Path) -> None:
    spec = write_jsonl(tmp_path / "validation.jsonl", ["other", "text"])
    corpus = open_corpus(bytes_config(tmp_path, WORDS, validation_source=spec), context_length=32, seed=0)
    assert validation_text(corpus) == "other|text|"
    assert corpus.train.split.num_documents == len(WORDS)


@pytest.mark.parametrize(("count", "expected"), [(20, WORDS[9:20:10]), (5, WORDS[4:5])])
def test_tokenizer_is_trained_on_training_documents_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int, expected: list[str]
) -> None:
    seen: list[str] = []

    def get_tokenizer(spec: str, *, train_documents: Any, **_: Any) -> Tokenizer:
        seen.extend(train_documents())
        return BytesTokenizer()

    monkeypatch.setattr(tokenizers, "get_tokenizer", get_tokenizer)
    open_corpus(bytes_config(tmp_path, WORDS[:count], validation_fraction=0.1), context_length=32, seed=0)
    assert sorted(seen) == sorted(set(WORDS[:count]) - set(expected))


def test_given_tokenizer_is_used(tmp_path: Path) -> None:
    data = bytes_config(tmp_path, ["1 2 3 4", "5 6"])
    corpus = open_corpus(data, context_length=4, seed=0, tokenizer=NumberTokenizer())
    assert every_token(corpus.train.split) == [0, 1, 2, 3, 4]
    assert every_token(corpus.validation.split) == [0, 5, 6]


def test_single_document_is_enough(tmp_path: Path) -> None:
    document = "to be or not to be " * 50
    corpus = open_corpus(bytes_config(tmp_path, [document]), context_length=32, seed=0)
    held_out = validation_text(corpus).removesuffix("|")
    assert document.endswith(held_out)
    assert 0 < len(held_out) < 30


def test_corpus_shorter_than_a_context(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has 4 training tokens, fewer than one context of 32.*model\.context_length"):
        open_corpus(bytes_config(tmp_path, ["abc", "def"]), context_length=32, seed=0)


def test_sources_are_checked_before_anything_is_read(tmp_path: Path) -> None:
    data = bytes_config(tmp_path, WORDS)
    missing = "text:/nowhere/*"
    for field, mistake in [("source", missing), ("validation_source", missing), ("tokenizer", "byts")]:
        with pytest.raises(UserError):
            open_corpus(
                dataclasses.replace(data, **{field: mistake}),  # type: ignore[arg-type]
                context_length=4,
                seed=0,
            )
    assert not (tmp_path / "cache").exists()
    open_corpus(data, context_length=4, seed=0)
