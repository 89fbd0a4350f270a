"""Contamination: every shared 13-gram is cut out with its window, by the rules of the paper."""

import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.corpus.contamination import GRAM_WORDS, MAX_PIECES, MIN_PIECE, WINDOW, pieces
from gptjax.corpus.executors import Executor
from gptjax.corpus.recipe import Recipe
from gptjax.corpus.run_preparation import prepare_corpus
from gptjax.corpus.word_grams import find_words, gram_hashes
from gptjax.files import read_json
from tests.corpus.conftest import kept_texts, sentence


def task_file(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_every_planted_overlap_is_removed(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    generator = random.Random(0)
    examples = [sentence(generator, 16) for _ in range(20)]
    texts = [sentence(generator, 400) for _ in range(60)]
    for i in range(40):  # upper case, other white space and punctuation do not hide it
        words = texts[i].split(" ")
        planted = examples[i % 20].split(" ")[2:15]
        words[generator.randrange(400) : 0] = [word.upper() + generator.choice(["", ",", "!\n"]) for word in planted]
        texts[i] = " ".join(words)
    recipe = recipe_of(texts, tasks=(task_file(tmp_path / "task.jsonl", examples),))
    prepare_corpus(recipe, tmp_path / "out", tmp_path, Executor())
    grams = np.concatenate([gram_hashes(find_words(text).hashes, GRAM_WORDS) for text in examples])
    kept = kept_texts(tmp_path / "out")
    assert not any(np.isin(gram_hashes(find_words(text).hashes, GRAM_WORDS), grams).any() for text in kept)
    report = read_json(tmp_path / "out" / "report.json")["steps"]["contamination"]
    assert report["cut_documents"] + report["dropped_documents"] == 40
    assert report["tasks"][0]["examples_in_corpus"] == 20
    assert report["tasks"][0]["task"].endswith("task.jsonl")
    assert [len(find_words(cut["overlap"]).hashes) for cut in report["cuts"]] == [GRAM_WORDS] * 5
    assert set(texts[40:]) <= set(kept)


def test_common_grams_and_short_examples_stay_and_are_reported(
    tmp_path: Path, recipe_of: Callable[..., Recipe]
) -> None:
    generator = random.Random(0)
    phrase = sentence(generator, 13)
    texts = [f"{sentence(generator, 100)} {phrase} {sentence(generator, 100)}" for _ in range(11)]
    task = task_file(tmp_path / "task.jsonl", [phrase, "too short"])
    prepare_corpus(recipe_of(texts, tasks=(task,)), tmp_path / "common", tmp_path, Executor())
    prepare_corpus(recipe_of(texts[1:], "ten", tasks=(task,)), tmp_path / "ten", tmp_path, Executor())
    common, ten = (read_json(tmp_path / name / "report.json")["steps"]["contamination"] for name in ("common", "ten"))
    assert common["cut_documents"] == 0
    assert common["tasks"][0]["grams_too_common"] == 1
    assert common["tasks"][0]["examples_without_13_words"] == 1
    assert ten["cut_documents"] == 10


def test_the_pieces_of_a_document() -> None:
    def cut(*overlaps: tuple[int, int], length: int = 10_000) -> list[tuple[int, int]]:
        return pieces(np.array(overlaps), length)

    assert cut((5000, 5080)) == [(0, 5000 - WINDOW), (5080 + WINDOW, 10_000)]
    assert cut((5000, 5080), (5010, 5090)) == [(0, 4800), (5290, 10_000)]
    assert cut((300, 400)) == [(600, 10_000)], "a piece of 100 characters is discarded"
    assert cut((100, 200), length=10_000) == [(400, 10_000)]
    assert cut((WINDOW + MIN_PIECE, 500))[0] == (0, MIN_PIECE)
    assert cut((100, 200), length=500) == []
    many = [(1000 * i, 1000 * i + 80) for i in range(1, MAX_PIECES + 1)]
    assert len(cut(*many[:-1], length=20_000)) == MAX_PIECES
    assert cut(*many, length=20_000) == [], "11 pieces are too many"


def test_a_task_without_any_gram_is_an_error(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    recipe = recipe_of(["text"], tasks=(task_file(tmp_path / "task.jsonl", ["too short"]),))
    with pytest.raises(UserError, match="no example has 13 words"):
        prepare_corpus(recipe, tmp_path / "out", tmp_path, Executor())
