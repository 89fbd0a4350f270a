"""The corpus of the preparation drill: what is planted is found by a preparation, and seen where none looks for it."""

import dataclasses
import json
from pathlib import Path

import pytest

from benchmarks import planted_corpus, prepare_drill
from benchmarks.planted_corpus import Left
from gptjax.corpus.executors import Executor
from gptjax.corpus.recipe import Recipe
from gptjax.corpus.run_preparation import prepare_corpus
from tests.commands import run_command


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> planted_corpus.Planted:
    monkeypatch.setattr(planted_corpus, "VOCABULARY", 2000)
    monkeypatch.setattr(planted_corpus, "MEAN_WORDS", 200)
    for name in ("EXACT", "NEAR", "OVERLAP"):
        monkeypatch.setattr(planted_corpus, name, 0.1)
    monkeypatch.setattr(planted_corpus, "FILE_BYTES", 100_000)
    return planted_corpus.write(tmp_path, 250_000, seed=1)


def recipe_of(directory: Path, **attributes: object) -> Recipe:
    return Recipe(f"jsonl:{directory}/[0-9]*.jsonl", "bytes", part_bytes=100_000, **attributes)  # type: ignore[arg-type]


def test_all_that_is_planted_is_found(planted: planted_corpus.Planted, tmp_path: Path) -> None:
    lines = "".join(path.read_text() for path in sorted(tmp_path.glob("0*.jsonl"))).splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    counts = [len(planted.lengths), sum(planted.exact.values()), len(planted.near), len(planted.overlaps)]
    assert min(counts) >= 10
    assert len(texts) == sum(counts)
    assert sum(map(len, texts)) == planted.num_bytes
    assert 0.8 <= min(planted.similarities) < max(planted.similarities) < 1
    output = tmp_path / "out"
    prepare_corpus(recipe_of(tmp_path, tasks=(str(tmp_path / "task.jsonl"),)), output, tmp_path, Executor())
    assert planted_corpus.left(planted, output, tmp_path) == Left(0, 0, 0, 0, 0)


def test_what_is_left_is_counted(planted: planted_corpus.Planted, tmp_path: Path) -> None:
    prepare_corpus(recipe_of(tmp_path, duplicates="none"), tmp_path / "out", tmp_path, Executor())
    counts = (sum(planted.exact.values()), len(planted.near), len(planted.overlaps))
    assert planted_corpus.left(planted, tmp_path / "out", tmp_path) == Left(*counts, 0, 0)
    own = next(iter(planted.lengths))
    more = {own: planted.lengths[own] + 1, "another": 3}
    changed = dataclasses.replace(planted, lengths=planted.lengths | more)
    assert planted_corpus.left(changed, tmp_path / "out", tmp_path) == Left(*counts, 1, 1)


def test_files_that_differ_are_named(tmp_path: Path) -> None:
    for name, content in {"one/a": "1", "two/a": "1", "one/b": "1", "two/b": "2", "two/c": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(content)
    assert prepare_drill.compare(tmp_path / "one", tmp_path / "two") == ["b", "c"]


@pytest.mark.slow
def test_the_drill(tmp_path: Path) -> None:
    flags = ["--megabytes=3", "--tokenizer=bytes", "--part_bytes=1000000", "--max_delay=0.1"]
    done = run_command("benchmarks.prepare_drill", *flags, f"--directory={tmp_path / 'drill'}")
    assert done.returncode == 0, done.stderr
    assert "files that differ: none" in done.stdout
    assert "other documents:   0 of" in done.stdout
    assert done.stdout.count(": killed") >= 5
