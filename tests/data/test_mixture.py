"""Mixtures: each source has its own stream and validation split; rows do not depend on kills or on processes."""

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from gptjax.config import DataConfig, UserError, load_config
from gptjax.data import tokenizers
from gptjax.data.mixture import Mixture, open_mixture, parts, short_names
from gptjax.data.pipeline import batches, open_corpus
from gptjax.data.tokenizers import BytesTokenizer, Tokenizer
from tests.data.test_pipeline import validation_text, write_jsonl

WEIGHTS = {"news": 60.0, "wiki": 22.0, "books": 8.0, "mails": 8.0, "code": 3.0}
CONTEXT = 16
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataConfig:
    """Five sources, of which each document begins with the source's name; code has 2 epochs in 200 rows."""
    directory = tmp_path_factory.mktemp("sources")
    mixture = []
    for name, weight in WEIGHTS.items():
        documents = [f"{name} {i} " * 4 for i in range(3 if name == "code" else 30)]
        mixture.append((write_jsonl(directory / f"{name}.jsonl", documents), weight))
    cache = str(directory / "cache")
    return DataConfig(mixture=tuple(mixture), tokenizer="bytes", validation_fraction=0.1, cache_dir=cache)


def opened(data: DataConfig, **fields: Any) -> Mixture:
    return open_mixture(dataclasses.replace(data, **fields), context_length=CONTEXT, seed=3)


@pytest.fixture(scope="module")
def mixture(data: DataConfig) -> Mixture:
    return opened(data)


def test_each_source_is_read_as_it_is_alone(data: DataConfig, mixture: Mixture) -> None:
    alone = [open_corpus(part.data, context_length=CONTEXT, seed=3) for part in mixture.parts]
    next_row = [0] * len(alone)
    for row in range(300):
        source, number = mixture.interleaving.place(row)
        assert number == next_row[source]
        next_row[source] += 1
        np.testing.assert_array_equal(mixture.train[row]["targets"], alone[source].train[number]["targets"])
    assert next_row == mixture.interleaving.counts(300)
    for part, corpus in zip(mixture.parts, mixture.corpora, strict=True):
        assert part.name in validation_text(corpus)
        assert all(name not in validation_text(corpus) for name in WEIGHTS if name != part.name)


def test_a_source_that_is_read_whole_repeats_in_another_order(mixture: Mixture) -> None:
    (code,) = [corpus.train for part, corpus in zip(mixture.parts, mixture.corpora, strict=True) if part.name == "code"]
    size = code.examples_per_epoch
    row = next(row for row in range(1000) if mixture.interleaving.place(row) == (4, size))
    assert mixture.epochs(row)["code"] == 1.0 < mixture.epochs(row + 1)["code"]
    assert mixture.repeated_in(row - 5, row + 5) == mixture.repeated_in(row, row + 1) == ["code"]
    assert mixture.repeated_in(row - 5, row) == mixture.repeated_in(row + 1, row + 5 * size) == []
    first, second = (np.stack([code[epoch * size + i]["targets"] for i in range(size)]) for epoch in range(2))
    assert not np.array_equal(first, second)


PROCESSES: dict[int, list[list[int]]] = {
    1: [list(range(8))],
    2: [[0, 1, 2, 3], [4, 5, 6, 7]],
    4: [[0, 4], [1, 5], [2, 6], [3, 7]],
}
KILLS = [0, 3, 4, 9, 17, 21]  # batches of 8 rows read before each start


@pytest.mark.parametrize("count", PROCESSES)
def test_batches_are_the_same_after_five_kills_in_any_number_of_processes(data: DataConfig, count: int) -> None:
    schedule = ((40 * CONTEXT + 1, (0.0, 1.0, 1.0, 1.0, 1.0)), (1000, (1.0,) * 5))
    scheduled = dataclasses.replace(data, mixture_schedule=schedule)
    whole = batches(opened(scheduled).train, start=0, batch_size=8, prefetch=2)
    expected = [next(whole).arrays["tokens"] for _ in range(30)]
    for start, stop in zip(KILLS, [*KILLS[1:], 30], strict=True):
        rows = opened(scheduled).train  # as of a new process
        of_processes = [
            batches(rows, start=8 * start, batch_size=8, rows=share, prefetch=2) for share in PROCESSES[count]
        ]
        for number in range(start, stop):
            found = np.full_like(expected[0], -1)
            for share, read in zip(PROCESSES[count], of_processes, strict=True):
                found[share] = next(read).arrays["tokens"]
            np.testing.assert_array_equal(found, expected[number])


def test_scheduled_weights_begin_with_the_row_at_their_tokens(data: DataConfig) -> None:
    later = opened(data, mixture_schedule=((40 * CONTEXT + 1, (0.0, 0.0, 0.0, 0.0, 1.0)),))
    same = opened(data)
    for row in range(41):
        np.testing.assert_array_equal(later.train[row]["targets"], same.train[row]["targets"])
    assert {later.interleaving.place(row)[0] for row in range(41, 90)} == {4}


def test_a_tokenizer_is_trained_on_the_training_documents_of_all(
    data: DataConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def get_tokenizer(spec: str, *, train_documents: Any, **_: Any) -> Tokenizer:
        seen.extend(train_documents())
        return BytesTokenizer()

    monkeypatch.setattr(tokenizers, "get_tokenizer", get_tokenizer)
    opened(data)
    assert len(seen) == 4 * 27 + 2
    assert [document.split()[0] for document in seen[::27]] == list(WEIGHTS)


def test_one_source_is_a_mixture_of_one(data: DataConfig) -> None:
    spec = data.mixture[0][0]
    one = opened(data, source=spec, mixture=())
    assert one.train is one.corpora[0].train
    assert (one.mean([3.5]), one.epochs(0)) == (3.5, {"news": 0.0})


def test_sources_that_cannot_be_mixed(data: DataConfig, tmp_path: Path) -> None:
    spec = data.mixture[0][0]
    same = spec.replace("/news.jsonl", "/./news.jsonl")
    short = write_jsonl(tmp_path / "short.jsonl", ["tiny"])
    for source, message in {
        same: f"data.mixture: '{spec}' and '{same}' are the same documents",
        short: f"data.mixture: source '{short}' has 4 training tokens, fewer than one context of 16",
        "sotoo": "data.mixture: unknown source 'sotoo': did you mean 'sotu'",
        "text:/none/*.txt": "data.mixture: no file matches '/none/",
    }.items():
        with pytest.raises(UserError, match=re.escape(message)):
            opened(data, mixture=((spec, 1.0), (source, 1.0)))


def test_gpt3s_mixture_reads_small_files(tmp_path: Path) -> None:
    for file in ("common_crawl-0", "common_crawl-1", "webtext2", "books1", "books2", "wikipedia"):
        write_jsonl(tmp_path / f"{file}.jsonl", [f"document {i} of {file}" for i in range(5)])
    overrides = {"data.tokenizer": "bytes", "data.cache_dir": f"{tmp_path}/cache"}
    config = load_config(f"{ROOT}/configs/gpt3.py:data=mixture,folder={tmp_path},runlocal", overrides)
    found = open_mixture(config.data, context_length=CONTEXT, seed=0)
    assert [part.name for part in found.parts] == ["common_crawl", "webtext2", "books1", "books2", "wikipedia"]
    assert [corpus.train.split.num_documents for corpus in found.corpora] == [9, 4, 4, 4, 4]
    assert [round(101 * part.weight, 9) for part in found.parts] == [60, 22, 8, 8, 3]


@pytest.mark.parametrize(
    ("specs", "names"),
    [
        (["sotu", "shakespeare"], ["sotu", "shakespeare"]),
        (["jsonl:/d/common_crawl*.jsonl*", "jsonl:/d/books1.jsonl.zst#text"], ["common_crawl", "books1"]),
        (["text:/d/books/*.txt", "tfds:wiki40b/en@train[:50%]#text"], ["books", "wiki40b/en"]),
        (["text:*.txt", "hf:owner/name@config:train#text"], ["text", "owner/name"]),
        (["jsonl:/d/wiki/part-*.jsonl", "jsonl:/d/books/part-*.jsonl"], ["wiki", "books"]),
        (["jsonl:/a/d/x.jsonl", "jsonl:/b/d/x.jsonl"], ["jsonl_/a/d/x.jsonl", "jsonl_/b/d/x.jsonl"]),
        (["text:a*", "text:a?"], ["text_a__0", "text_a__1"]),
    ],
)
def test_names_are_short_and_unique(specs: list[str], names: list[str]) -> None:
    assert short_names(specs) == names


def test_parts_are_configs_of_one_source(data: DataConfig) -> None:
    found = parts(dataclasses.replace(data, mixture_schedule=((0, (1.0,) * 5),)))
    assert [part.name for part in found] == list(WEIGHTS)
    assert sum(part.weight for part in found) == pytest.approx(1)
    assert all(part.data.mixture == part.data.mixture_schedule == () for part in found)
    assert [part.data.source for part in found] == [source for source, _ in data.mixture]
