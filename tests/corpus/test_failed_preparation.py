"""A preparation that a wrong setting or file has ended: the corrected command takes its directory."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gptjax.config import UserError
from gptjax.corpus import executors
from gptjax.corpus.executors import Executor
from gptjax.corpus.recipe import Recipe
from gptjax.corpus.run_preparation import prepare_corpus
from tests.commands import run_command
from tests.corpus.test_run_preparation import files_of


@pytest.fixture
def recipe(documents: list[str], recipe_of: Callable[..., Recipe]) -> Recipe:
    return recipe_of([*documents, documents[0]], duplicates="near")


@pytest.fixture
def expected(recipe: Recipe, tmp_path: Path) -> dict[str, bytes]:
    prepare_corpus(recipe, tmp_path / "expected", tmp_path, Executor())
    return files_of(tmp_path / "expected")


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the steps whose items are run."""
    names: list[str] = []
    original = executors._call

    def spied(run: Callable[..., None], workspace: Any, item: int) -> str | None:
        names.append(run.__name__)
        return original(run, workspace, item)

    monkeypatch.setattr(executors, "_call", spied)
    return names


def test_a_wrong_field_is_corrected(
    recipe: Recipe, expected: dict[str, bytes], tmp_path: Path, ran: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    wrong, output = dataclasses.replace(recipe, source=f"{recipe.source}#body"), tmp_path / "out"
    for _ in range(2):  # the same command again has the same error
        with pytest.raises(UserError, match="has no field 'body'"):
            prepare_corpus(wrong, output, tmp_path, Executor())
    assert capsys.readouterr().out == ""
    prepare_corpus(recipe, output, tmp_path, Executor())
    assert "begins anew" in capsys.readouterr().out
    assert files_of(output) == expected


def test_a_damaged_file_is_corrected(recipe: Recipe, expected: dict[str, bytes], tmp_path: Path) -> None:
    path = Path(recipe.source.removeprefix("jsonl:"))
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"text": 3}\n')
    with pytest.raises(UserError, match="is not a string"):
        prepare_corpus(recipe, tmp_path / "out", tmp_path, Executor())
    path.write_bytes(whole)
    prepare_corpus(recipe, tmp_path / "out", tmp_path, Executor())
    assert files_of(tmp_path / "out") == expected


def test_documents_are_not_read_again_for_another_filter(
    recipe: Recipe, expected: dict[str, bytes], tmp_path: Path, ran: list[str]
) -> None:
    (tmp_path / "task.jsonl").write_text(json.dumps({"text": "too short"}) + "\n")
    wrong, output = dataclasses.replace(recipe, tasks=(str(tmp_path / "task.jsonl"),)), tmp_path / "out"
    with pytest.raises(UserError, match="no example has 13 words"):
        prepare_corpus(wrong, output, tmp_path, Executor())
    ran.clear()
    prepare_corpus(recipe, output, tmp_path, Executor())
    assert "read_unit" not in ran
    assert files_of(output) == expected


def test_only_a_failed_preparation_gives_way(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other, output = dataclasses.replace(recipe, similarity=0.9), tmp_path / "out"

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gptjax.corpus.run_preparation.select", interrupted)
        with pytest.raises(KeyboardInterrupt):
            prepare_corpus(recipe, output, tmp_path, Executor())
    for _ in range(2):  # a refusal is no failure of the preparation
        with pytest.raises(UserError, match=r"--similarity=0\.8, not 0\.9: remove it, or name another --output"):
            prepare_corpus(other, output, tmp_path, Executor())
    # Another machine may be at work with the recorded settings.
    (output / "work" / "failure.txt").write_text("a machine failed")
    (output / "work" / "shard-1.lock").touch()
    with pytest.raises(UserError, match=r"--similarity=0\.8, not 0\.9"):
        prepare_corpus(other, output, tmp_path, Executor())
    prepare_corpus(recipe, output, tmp_path, Executor())


@pytest.mark.slow
def test_the_corrected_command_works(recipe: Recipe, expected: dict[str, bytes], tmp_path: Path) -> None:
    flags = [f"--output={tmp_path / 'out'}", "--tokenizer=bytes", "--part_bytes=10000", "--validation_fraction=0.1"]
    failed = run_command("gptjax.prepare", f"--source={recipe.source}#body", *flags, "--processes=2")
    assert failed.returncode == 2
    assert "has no field 'body'" in failed.stderr
    done = run_command("gptjax.prepare", f"--source={recipe.source}", *flags, "--processes=2")
    assert done.returncode == 0, done.stderr
