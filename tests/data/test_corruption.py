"""Damaged data: a clear error or, with data.on_corrupt="skip", left out and counted; never a hang."""

import gzip
import json
import shutil
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import zstandard

from gptjax.config import DataConfig, UserError
from gptjax.data import sources
from gptjax.data.pipeline import Corpus, batches, open_corpus
from gptjax.data.sources import open_source


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Four files of two lines each, of which the second .jsonl line, and what follows in .gz and .zst, are damaged."""
    lines = [json.dumps({"text": f"{name} {'text ' * 20000}"}).encode() + b"\n" for name in ("one", "two", "three")]
    (tmp_path / "a.jsonl").write_bytes(lines[0] + b'{"text": "cut\n' + lines[1] + b'["no object"]\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines[0]) + gzip.compress(lines[1])[:-100])
    flipped = bytearray(zstandard.compress(lines[2]))
    flipped[-8] ^= 255
    (tmp_path / "c.jsonl.zst").write_bytes(zstandard.compress(lines[0]) + flipped)
    (tmp_path / "d.jsonl").write_bytes(lines[2])
    return tmp_path


def test_what_is_damaged_is_an_error_that_names_the_place(damaged):
    for name, place in [("a.jsonl", "a.jsonl:2 is not JSON"), ("b.jsonl.gz", "b.jsonl.gz"), ("c.jsonl.zst", "c.jsonl")]:
        with pytest.raises(UserError, match=place):
            list(open_source(f"jsonl:{damaged}/{name}").documents())


def test_what_is_damaged_can_be_left_out_and_counted(damaged, caplog):
    source = open_source(f"jsonl:{damaged}/*", on_corrupt="skip")
    for _ in range(2):  # counted from 0 each time
        assert [text.split()[0] for text in source.documents()] == ["one", "two", "one", "one", "three"]
        assert source.skipped == 4
    assert "a.jsonl:2 is not JSON" in caplog.text
    assert open_source(f"jsonl:{damaged}/*").fingerprint() != source.fingerprint()


def test_a_file_that_vanishes_is_an_error_or_left_out(damaged):
    for name in ("b.jsonl.gz", "c.jsonl.zst"):
        (damaged / name).unlink()
    strict, lenient = (open_source(f"jsonl:{damaged}/*", on_corrupt=policy) for policy in ("error", "skip"))
    (damaged / "a.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl"):
        list(strict.documents())
    with pytest.raises(UserError, match=r"cannot read .*a\.jsonl"):
        strict.fingerprint()
    lenient.fingerprint()
    assert len(list(lenient.documents())) == 1
    assert lenient.skipped == 1


def test_where_all_is_damaged_nothing_is_trained(tmp_path):
    (tmp_path / "a.jsonl").write_text("no\nJSON\n")
    with pytest.raises(UserError, match=r"has no text: .* 2 were skipped as damaged"):
        list(open_source(f"jsonl:{tmp_path}/a.jsonl", on_corrupt="skip").documents())


def test_an_example_of_a_dataset_that_cannot_be_read_is_named_or_left_out(monkeypatch):
    class Examples(list):
        def __getitem__(self, index):
            if index == 1:
                raise RuntimeError("hash mismatch\nand more")
            return super().__getitem__(index)

    opened = (None, Examples([{"text": b"one"}, {"text": b"two"}, {"text": b"three"}]))
    monkeypatch.setattr(sources._TfdsSource, "_opened", opened)
    with pytest.raises(UserError, match=r"cannot read example 1 of tfds:lm1b: hash mismatch$"):
        list(open_source("tfds:lm1b").documents())
    source = open_source("tfds:lm1b", on_corrupt="skip")
    assert list(source.documents()) == ["one", "three"]
    assert source.skipped == 1


# --- the prepared corpus, while it is read ----------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": f"line {i} " * 20}) + "\n" for i in range(2000)))

    def open_(on_corrupt: str) -> Corpus:
        data = DataConfig(
            source=f"jsonl:{tmp_path}/a.jsonl", tokenizer="bytes", cache_dir=str(tmp_path), on_corrupt=on_corrupt
        )
        return open_corpus(data, context_length=64, seed=0)

    return open_


def damage(directory: Path, kind: str) -> None:
    for shard in directory.glob("corpora/*/train-*.array_record"):
        if kind == "vanish":
            shutil.rmtree(shard.parent)
        elif kind == "truncate":
            with shard.open("r+b") as file:
                file.truncate(shard.stat().st_size // 2)
        else:
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)


@pytest.mark.parametrize("kind", ["vanish", "truncate", "flip"])
def test_a_shard_that_is_damaged_in_mid_run_ends_it_or_its_examples_are_left_out(corpus, tmp_path, kind):
    strict, lenient = corpus("error"), corpus("skip")
    if kind == "truncate":  # of a shard that is open, ArrayRecord then gives empty records; one that vanishes stays
        assert strict.train[0]["weights"].sum() == lenient.train[0]["weights"].sum() == 64
    damage(tmp_path, kind)
    epoch = islice(batches(strict.train, start=0, batch_size=8, prefetch=2), strict.train.examples_per_epoch // 8)
    with pytest.raises(UserError, match=r"prepared corpus is damaged, delete .* and start again"):
        list(epoch)
    examples = [lenient.train[i] for i in range(lenient.train.examples_per_epoch)]
    weights = np.array([example["weights"].sum() for example in examples])
    assert set(weights) <= {0, 64}
    assert lenient.train.skipped == np.sum(weights == 0) > 0
    if kind == "flip":
        assert np.sum(weights == 64) > 0
    assert all(np.all(example["tokens"] == 256) for example in examples if example["weights"].sum() == 0)


def test_opened_again_a_damaged_corpus_is_prepared_again(corpus, tmp_path):
    whole = corpus("error").train[3]
    damage(tmp_path, "truncate")
    np.testing.assert_array_equal(corpus("error").train[3]["tokens"], whole["tokens"])
