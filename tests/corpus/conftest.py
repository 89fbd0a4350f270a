"""Recipes small enough for a test."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjax.corpus.recipe import Recipe
from gptjax.data.prepared_corpora import PreparedCorpus

WORDS = [f"{a}{b}{c}" for a in "bdfglmnprst" for b in ("a", "e", "io", "ou") for c in ("n", "st", "rk", "", "lling")]


def sentence(generator: random.Random, words: int) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(words))


def kept_texts(output: Path) -> list[str]:
    """All documents of a corpus of bytes."""
    corpus, texts = PreparedCorpus(f"prepared:{output}"), []
    for split in (corpus.train, corpus.validation):
        texts += [bytes(split.read(i, 0, int(length) - 1).tolist()).decode() for i, length in enumerate(split.lengths)]
    return texts


@pytest.fixture(autouse=True)
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing would take most of the time of these tests; that of the command draws."""
    monkeypatch.setattr("gptjax.corpus.corpus_report._figure", lambda *_: None)


@pytest.fixture
def documents() -> list[str]:
    """60 different documents."""
    generator = random.Random(0)
    return [sentence(generator, generator.randint(60, 200)) for _ in range(60)]


@pytest.fixture
def recipe_of(tmp_path: Path) -> Callable[..., Recipe]:
    """Returns a function: documents, attributes -> a recipe of a file with them, in several parts."""

    def make(documents: list[str], name: str = "corpus", **attributes: object) -> Recipe:
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
        settings = {"tokenizer": "bytes", "duplicates": "none", "part_bytes": 10_000, "validation_fraction": 0.1}
        return Recipe(source=f"jsonl:{path}", **{**settings, **attributes})  # type: ignore[arg-type]

    return make
