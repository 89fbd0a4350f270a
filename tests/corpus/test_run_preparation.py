"""Preparation: the same files by one process, several, several machines, or after kills; runs that read them."""

import dataclasses
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.corpus import executors, source_parts, token_shards
from gptjax.corpus.executors import Executor
from gptjax.corpus.recipe import Recipe
from gptjax.corpus.run_preparation import _check_directory, prepare_corpus
from gptjax.corpus.workspace import Workspace
from gptjax.data import pipeline, preparation
from gptjax.data.pipeline import held_out_documents, open_corpus
from gptjax.data.preparation import prepare
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.files import unfinished_path
from tests.commands import run_command


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.fixture
def recipe(documents: list[str], recipe_of: Callable[..., Recipe], tmp_path: Path) -> Recipe:
    """All steps but the quality filter, over 7 parts; the documents are copied, and one overlaps the task."""
    (tmp_path / "task.jsonl").write_text(json.dumps({"text": documents[3][:200]}) + "\n")
    texts = [*documents, *documents[:5], *(text + " end" for text in documents[:5])]
    return recipe_of(texts, duplicates="near", tasks=(str(tmp_path / "task.jsonl"),), languages=())


@pytest.fixture
def expected(recipe: Recipe, tmp_path: Path) -> dict[str, bytes]:
    prepare_corpus(recipe, tmp_path / "expected", tmp_path, Executor())
    return files_of(tmp_path / "expected")


def test_without_filters_the_files_are_those_of_a_run(
    recipe_of: Callable[..., Recipe], tmp_path: Path, documents: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in (preparation, token_shards):
        monkeypatch.setattr(module, "PIECE_TOKENS", 32)
        monkeypatch.setattr(module, "SHARD_BYTES", 32 * 2 * 300)
    for count in (60, 10, 9, 2, 1):  # every 10th is held out, or the last one, or the tail of a single one
        recipe = recipe_of(documents[:count], f"corpus{count}")
        prepare_corpus(recipe, tmp_path / f"{count}", tmp_path, Executor())
        prepare(recipe.open_source(), BytesTokenizer(), tmp_path / f"cache{count}", validation_fraction=0.1)
        (cached,) = (path for path in (tmp_path / f"cache{count}" / "corpora").iterdir() if path.is_dir())
        own = files_of(tmp_path / f"{count}")
        expected = {name: content for name, content in files_of(cached).items() if name != "metadata.json"}
        assert {name: own[name] for name in expected} == expected
        assert sum("train-" in name for name in expected) > (1 if count == 60 else 0)


def test_processes_and_parts_do_not_change_the_files(
    recipe: Recipe, expected: dict[str, bytes], tmp_path: Path
) -> None:
    prepare_corpus(recipe, tmp_path / "two", tmp_path, Executor(2))
    assert files_of(tmp_path / "two") == expected
    prepare_corpus(dataclasses.replace(recipe, part_bytes=50_000), tmp_path / "parts", tmp_path, Executor())
    differ = ("recipe.json", "metadata.json", "report.json")  # which hold part_bytes
    found = {name: content for name, content in files_of(tmp_path / "parts").items() if name not in differ}
    assert found == {name: content for name, content in expected.items() if name not in differ}


def test_machines_share_the_work(
    recipe: Recipe, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(executors, "POLL", 0.01)
    monkeypatch.setattr("gptjax.corpus.run_preparation.POLL", 0.01)
    ran: dict[str, set[str]] = {}
    original = executors._call

    def spied(run: Callable[..., None], workspace: Workspace, item: int) -> str | None:
        ran.setdefault(run.__name__, set()).add(threading.current_thread().name)
        return original(run, workspace, item)

    monkeypatch.setattr(executors, "_call", spied)
    shards = [
        threading.Thread(
            name=str(i), target=prepare_corpus, args=(recipe, tmp_path / "shared", tmp_path, Executor(shard=(i, 3)))
        )
        for i in (2, 1, 0)
    ]
    for shard in shards:
        shard.start()
    for shard in shards:
        shard.join()
    assert files_of(tmp_path / "shared") == expected
    assert ran["measure"] == {"0", "1", "2"}
    assert ran["select"] == {"0"}


def test_a_slow_machine_without_work_does_not_fail_when_the_others_have_finished(
    recipe_of: Callable[..., Recipe], documents: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is about to read is removed at the end."""
    monkeypatch.setattr(executors, "POLL", 0.01)
    monkeypatch.setattr("gptjax.corpus.run_preparation.POLL", 0.01)
    recipe = recipe_of(documents, part_bytes=10**6)  # one part, and two shards
    check, output = source_parts.check_not_empty, tmp_path / "out"
    first, second = (
        threading.Thread(target=prepare_corpus, args=(recipe, output, tmp_path, Executor(shard=(i, 3)))) for i in (0, 1)
    )

    def check_late(workspace: Workspace) -> None:
        if threading.current_thread() not in (first, second):
            second.start()  # without it the first does not end
            for machine in (first, second):
                machine.join()
        check(workspace)

    monkeypatch.setattr(source_parts, "check_not_empty", check_late)
    first.start()
    assert "documents" in prepare_corpus(recipe, output, tmp_path, Executor(shard=(2, 3)))
    assert not (output / "work").exists()


@pytest.mark.parametrize("last", ["work/", "work/shard-1.lock", f".recipe.json-{'0' * 32}"])
def test_another_machine_begins_at_this_moment(last: str, recipe: Recipe, tmp_path: Path) -> None:
    """What another machine writes before the recipe, up to `last`, is no reason to refuse the directory."""
    output = tmp_path / "out"
    (output / "work").mkdir(parents=True)
    if not last.endswith("/"):
        (output / last).touch()
    _check_directory(Workspace(recipe, output, tmp_path))
    (output / "work" / "notes.txt").touch()
    with pytest.raises(UserError, match="holds files that are not of a preparation"):
        _check_directory(Workspace(recipe, output, tmp_path))


def test_a_killed_preparation_resumes(
    recipe: Recipe, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped before each item in turn, with a torn result left behind, it computes no finished item again."""

    class Killed(BaseException):
        pass

    ran: list[tuple[str, int]] = []
    original = executors._call

    def one_more(run: Callable[..., None], workspace: Workspace, item: int) -> str | None:
        if ran and ran[-1] == ("killed", 0):
            ran.pop()
        elif len(ran) % 5 == 4:
            torn = unfinished_path(workspace.output / "work" / "read" / "000000")
            torn.mkdir(exist_ok=True)
            (torn / "index.json").write_text("{")
            ran.append(("killed", 0))
            raise Killed
        ran.append((run.__name__, item))
        return original(run, workspace, item)

    monkeypatch.setattr(executors, "_call", one_more)
    output, kills = tmp_path / "killed", 0
    while not (output / "metadata.json").exists():
        try:
            prepare_corpus(recipe, output, tmp_path, Executor())
        except Killed:
            kills += 1
    assert kills >= 5
    assert len(set(ran)) == len(ran)
    assert files_of(output) == expected


def test_a_complete_corpus_stays_and_another_recipe_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    output = tmp_path / "out"
    report = prepare_corpus(recipe, output, tmp_path, Executor())
    before = files_of(output)
    assert prepare_corpus(recipe, output, tmp_path, Executor()) == report
    assert files_of(output) == before
    with pytest.raises(UserError, match=r"holds a corpus of --similarity=0.8, not 0.9"):
        prepare_corpus(dataclasses.replace(recipe, similarity=0.9), output, tmp_path, Executor())
    shutil.rmtree(output)
    output.mkdir()
    (output / "work").mkdir()
    (output / ".mine").write_text("")
    with pytest.raises(UserError, match="holds files that are not of a preparation"):
        prepare_corpus(recipe, output, tmp_path, Executor())


def test_a_source_that_changed_since_the_start_is_refused(recipe: Recipe, tmp_path: Path) -> None:
    output = tmp_path / "out"
    prepare_corpus(recipe, output, tmp_path, Executor())
    (output / "metadata.json").unlink()
    with Path(recipe.source.removeprefix("jsonl:")).open("a") as file:
        file.write('{"text": "more"}\n')
    with pytest.raises(UserError, match="has changed since"):
        prepare_corpus(recipe, output, tmp_path, Executor())


def test_a_damaged_line_is_named_by_a_worker(recipe: Recipe, tmp_path: Path) -> None:
    path = Path(recipe.source.removeprefix("jsonl:"))
    path.write_text('{"text": "good"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"corpus.jsonl:2: field 'text' is not a string"):
        prepare_corpus(recipe, tmp_path / "out", tmp_path, Executor())


def test_a_damaged_result_is_named(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object) -> None:
        raise UserError("stopped")

    with monkeypatch.context() as patch:
        patch.setattr("gptjax.corpus.run_preparation.select", stop)
        with pytest.raises(UserError, match="stopped"):
            prepare_corpus(recipe, tmp_path / "out", tmp_path, Executor())
    damaged = tmp_path / "out" / "work" / "measure" / "000002" / "documents.npz"
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(UserError, match=r"000002/documents.npz is damaged"):
        prepare_corpus(recipe, tmp_path / "out", tmp_path, Executor())


def test_a_run_reads_the_corpus(recipe: Recipe, tmp_path: Path, tiny: object) -> None:
    prepare_corpus(dataclasses.replace(recipe, tokenizer="bpe:300"), tmp_path / "out", tmp_path / "cache", Executor())
    data = dataclasses.replace(
        tiny.data,  # type: ignore[attr-defined]
        source=f"prepared:{tmp_path / 'out'}",
        tokenizer="bpe:300",
    )
    corpus = open_corpus(data, context_length=16, seed=0)
    assert corpus.train[0]["tokens"].shape == (16,)
    split = corpus.validation.split
    texts = [corpus.tokenizer.decode(split.read(i, 0, int(n) - 1)) for i, n in enumerate(split.lengths)]
    assert list(held_out_documents(data, corpus.tokenizer)) == texts
    again = open_corpus(data, context_length=16, seed=0, tokenizer=corpus.tokenizer)
    np.testing.assert_array_equal(again.train[3]["tokens"], corpus.train[3]["tokens"])
    for wrong in ("bytes", "bpe:400"):
        with pytest.raises(UserError, match=f"data.tokenizer={wrong}, but .* was tokenised with bpe:300"):
            open_corpus(dataclasses.replace(data, tokenizer=wrong), context_length=16, seed=0)
    (tmp_path / "out" / "metadata.json").unlink()
    with pytest.raises(UserError, match=r"data.source: .*its preparation was stopped"):
        open_corpus(data, context_length=16, seed=0)
    with pytest.raises(UserError, match=r"data.source: .*there is no prepared corpus"):
        open_corpus(dataclasses.replace(data, source="prepared:/nowhere"), context_length=16, seed=0)
    assert pipeline.is_prepared(data.source)


def test_the_command(recipe: Recipe, tmp_path: Path) -> None:
    flags = [f"--source={recipe.source}", f"--output={tmp_path / 'out'}", "--tokenizer=bytes", "--processes=2"]
    filters = ["--languages=en,de", f"--quality_reference=text:{recipe.tasks[0]}", f"--tasks={recipe.tasks[0]}"]
    failed = run_command("gptjax.prepare", *flags, *filters)
    assert failed.returncode == 2
    assert "a classifier needs many" in failed.stderr
    output = tmp_path / "again"
    done = run_command("gptjax.prepare", *flags, filters[0], filters[2], f"--output={output}")
    assert done.returncode == 0, done.stderr
    assert "other languages:" in done.stdout
    report = json.loads((output / "report.json").read_text())["steps"]
    assert {f"{step}.png" for step in report} == {path.name for path in output.glob("*.png")}
    for flag, message in {"--shard=4": "write i/n", "--shard=2/2": "i from 0 to n - 1"}.items():
        failed = run_command("gptjax.prepare", *flags, flag)
        assert failed.returncode == 2
        assert message in failed.stderr
        assert len(failed.stderr.splitlines()) == 1
