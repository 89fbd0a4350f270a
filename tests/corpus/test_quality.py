"""Quality filter: the keep rule of the paper, and a classifier that separates two kinds of text."""

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.corpus.document_keys import content_keys, uniform
from gptjax.corpus.document_measures import Reason
from gptjax.corpus.executors import Executor
from gptjax.corpus.quality import PARETO_SHAPE, pareto
from gptjax.corpus.recipe import Recipe
from gptjax.corpus.run_preparation import prepare_corpus
from gptjax.files import read_json
from tests.corpus.conftest import WORDS, kept_texts


def test_the_random_number_has_numpys_pareto_distribution() -> None:
    numbers = np.array([pareto(uniform(int(content_keys(f"document {i}")[0]), 3)) for i in range(4000)])
    expected = np.random.default_rng(0).pareto(PARETO_SHAPE, 100_000)
    shares = np.linspace(0.05, 0.95, 10)
    np.testing.assert_allclose(np.quantile(numbers, shares), np.quantile(expected, shares), rtol=0.15)


def test_it_keeps_most_good_documents_and_few_others(tmp_path: Path, recipe_of: Callable[..., Recipe]) -> None:
    generator = random.Random(1)
    good, bad = WORDS[:100], WORDS[100:]

    def texts(words: list[str], count: int) -> list[str]:
        return [" ".join(generator.choice(words) for _ in range(50)) for _ in range(count)]

    reference = recipe_of(texts(good, 200), "reference").source
    rare = texts(good, 40)
    recipe = recipe_of(rare + texts(bad, 600), quality_reference=reference)
    prepare_corpus(recipe, tmp_path / "out", tmp_path, Executor())
    kept = kept_texts(tmp_path / "out")
    assert sum(text in kept for text in rare) >= 10
    assert sum(text not in rare for text in kept) <= 12
    step = read_json(tmp_path / "out" / "report.json")["steps"]["quality"]
    assert step["dropped_documents"] == 640 - len(kept)
    assert step["examples"]
    assert all(example["score"] < 0.5 for example in step["examples"])


def test_the_choice_depends_on_text_and_seed_only() -> None:
    keys = [int(content_keys(f"document {i}")[0]) for i in range(50)]
    assert [uniform(key, 1) for key in keys] == [uniform(key, 1) for key in keys]
    assert [uniform(key, 1) for key in keys] != [uniform(key, 2) for key in keys]
    assert Reason.KEPT == 0  # arrays of reasons are combined by their maximum


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ({"quality_reference": "text:/nowhere/*.txt"}, "--quality_reference: .*nowhere"),
        ({"quality_reference": "SOURCE"}, "is --source itself"),
        ({"languages": ("en", "klingon")}, "unknown language 'klingon'"),
        ({"tasks": ("lambda",)}, "--tasks: unknown task 'lambda': did you mean 'lambada'"),
        ({"tasks": ("none.jsonl",)}, "no task file none.jsonl"),
        ({"similarity": 0.2}, "--similarity=0.2"),
        ({"validation_fraction": 1.0}, "--validation_fraction=1.0"),
        ({"tokenizer": "gpt5"}, "--tokenizer: unknown tokenizer 'gpt5'"),
        ({"source": "text:/nowhere/*.txt"}, "--source: "),
    ],
)
def test_a_setting_that_is_wrong_is_named(
    attributes: dict[str, object], message: str, tmp_path: Path, recipe_of: Callable[..., Recipe]
) -> None:
    recipe = recipe_of(["text"])
    if attributes.get("quality_reference") == "SOURCE":
        attributes = {"quality_reference": recipe.source}
    recipe = dataclasses.replace(recipe, **attributes)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message):
        prepare_corpus(recipe, tmp_path / "out", tmp_path, Executor())
    assert not (tmp_path / "out").exists()
