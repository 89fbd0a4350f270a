"""Prepares a corpus: the steps in their order, each resumed where it was stopped."""

import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.corpus import contamination, duplicates, quality, source_parts, token_shards
from gptjax.corpus.corpus_report import write_report
from gptjax.corpus.document_measures import measure
from gptjax.corpus.executors import POLL, Executor, Run
from gptjax.corpus.near_copies import Bands
from gptjax.corpus.recipe import Recipe, check
from gptjax.corpus.selection import select
from gptjax.corpus.workspace import Workspace
from gptjax.data.preparation import FORMAT_VERSION, PreparedSplit
from gptjax.data.prepared_directories import locked, sync
from gptjax.data.sources import Source
from gptjax.files import is_in_bucket, read_json, unfinished_name, write_whole

RECIPE_FILE = "recipe.json"
FAILURE_FILE = "failure.txt"  # in work/, the message of the user error that ended the last attempt


def prepare_corpus(recipe: Recipe, output: Path, cache_dir: Path, executor: Executor) -> str:
    """Prepares a corpus in `output`, or resumes its preparation; a complete corpus is left as it is.

    The files do not depend on the executor, and not on how often the preparation was stopped.

    Args:
      recipe: what to prepare.
      output: a directory of its own. Several machines must see the same.
      cache_dir: directory of OpenAI's vocabularies and trained tokenizers.
      executor: where the steps run.

    Returns:
      The report, as text.

    Raises:
      UserError: a setting is invalid, `output` holds something else, or the source or a task cannot be read.
    """
    check(recipe)
    executor.check()
    workspace = Workspace(recipe, output, cache_dir)
    _check_directory(workspace)
    if workspace.is_complete:
        shutil.rmtree(output / "work", ignore_errors=True)  # of a process that was killed while it removed them
    else:
        try:
            with _only_process(workspace, executor), executor:
                _prepare(workspace, executor)
        except (FileNotFoundError, UserError):
            # A machine that had nothing left to do was slow: another has finished, and removed what it was about to
            # read, so that it failed or found no documents.
            if executor.is_first or not workspace.is_complete:
                raise
    return (output / "report.txt").read_text(encoding="utf-8")


@contextlib.contextmanager
def _only_process(workspace: Workspace, executor: Executor) -> Iterator[None]:
    """Raises UserError if another process runs the same shard of the preparation."""
    work = workspace.output / "work"
    work.mkdir(exist_ok=True)
    try:
        with locked(work / f"shard-{executor.shard[0]}.lock", wait=False):
            yield
    except BlockingIOError:
        raise UserError(f"another process prepares {workspace.output}: wait for it, or stop it") from None


def _prepare(workspace: Workspace, executor: Executor) -> None:
    source = workspace.recipe.open_source()
    if executor.is_first:
        if executor.shard[1] == 1:
            _remove_unfinished(workspace.output)
        _claim(workspace, source)
    else:
        _wait_for_claim(workspace)
    try:
        _run_steps(workspace, executor, source)
    except UserError as error:
        with contextlib.suppress(OSError):  # a full disk, or a corpus that another machine has finished
            (workspace.output / "work" / FAILURE_FILE).write_text(f"{error}\n", encoding="utf-8")
        raise


def _has_failed(workspace: Workspace) -> bool:
    """Whether a user error, such as a wrong field, has ended the preparation, so that other settings may follow.

    Preparations of several machines are not begun anew, as some may still be working.
    """
    work = workspace.output / "work"
    others = [path for path in work.glob("shard-*.lock") if path.name != "shard-0.lock"]
    return (work / FAILURE_FILE).exists() and not others and not workspace.is_complete


def _begin_anew(workspace: Workspace, recorded: dict[str, Any], identity: dict[str, Any]) -> None:
    """Removes the results of a preparation that failed, except the documents that were read in the same way."""
    print(f"{workspace.output}: its preparation with other settings or files failed, and begins anew", flush=True)
    names = ("source", "document_separator", "invalid_utf8", "on_corrupt", "part_bytes")
    one, other = (
        [each.get("format"), each.get("source_fingerprint"), *(each["settings"].get(name) for name in names)]
        for each in (recorded, identity)
    )
    (workspace.output / RECIPE_FILE).unlink()  # first, so that no result is taken for one of these settings
    for path in (*workspace.output.glob("*"), *workspace.output.glob("work/*")):
        if path.name != "work" and path.suffix != ".lock" and not (path.name == "read" and one == other):
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_unfinished(output: Path) -> None:
    """Removes what killed processes left: files and directories named by `unfinished_path`."""
    for path in (*output.glob(".*"), *output.glob("work/*/.*")):
        if unfinished_name(path) is not None:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _check_directory(workspace: Workspace) -> None:
    output = workspace.output
    if is_in_bucket(output):
        raise UserError(f"--output={output} is in a bucket: name a directory, such as one where the bucket is mounted")
    if output.exists() and not output.is_dir():
        raise UserError(f"--output={output} is a file: name a directory")
    # Listed first: other machines may begin at this moment, with their locks and then the recipe, before all else.
    paths = [*output.glob("*"), *output.glob("work/*")]
    if any(not _is_of_beginning(path, output) for path in paths) and not (output / RECIPE_FILE).exists():
        raise UserError(f"--output={output} holds files that are not of a preparation: name another directory")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output={output} cannot be made: {error.strerror}") from None
    _compare(workspace)


def _is_of_beginning(path: Path, output: Path) -> bool:
    """Whether a preparation may have written `path` before it recorded the recipe."""
    if path.parent == output:
        return path.name == "work" or unfinished_name(path) == RECIPE_FILE
    return re.fullmatch(r"shard-\d+\.lock", path.name) is not None


def _compare(workspace: Workspace) -> dict[str, Any] | None:
    """Returns the recorded recipe, None if there is none; raises UserError if it is another one that has not failed."""
    path = workspace.output / RECIPE_FILE
    if not path.exists():
        return None
    try:
        recorded = read_json(path)
        settings: dict[str, Any] = recorded["settings"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged, remove {workspace.output} and start again: {error!r}") from None
    for name, value in workspace.recipe.settings().items():
        if settings.get(name) != value and not _has_failed(workspace):
            raise UserError(
                f"{workspace.output} holds a corpus of --{name}={_flag(settings.get(name))}, not {_flag(value)}: "
                "remove it, or name another --output"
            )
    return dict(recorded)


def _flag(value: Any) -> str:
    return ",".join(value) if isinstance(value, list) else str(value)


def _claim(workspace: Workspace, source: Source) -> None:
    """Records the recipe and the fingerprint of the source, or compares them with the recorded ones."""
    recorded = _compare(workspace)
    identity = {
        "format": FORMAT_VERSION,
        "settings": workspace.recipe.settings(),
        "source_fingerprint": source.fingerprint(),
        "task_files": [
            hashlib.sha256(Path(task).expanduser().read_bytes()).hexdigest()
            for task in workspace.recipe.tasks
            if task.endswith(".jsonl")
        ],
    }
    if (reference := workspace.recipe.quality_reference) is not None:
        identity["reference_fingerprint"] = workspace.recipe.open_source(reference).fingerprint()
    identity["content"] = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:24]
    if recorded is not None and recorded != identity and _has_failed(workspace):
        _begin_anew(workspace, recorded, identity)
        recorded = None
    (workspace.output / "work" / FAILURE_FILE).unlink(missing_ok=True)
    if recorded is None:
        write_whole(workspace.output / RECIPE_FILE, json.dumps(identity, indent=2) + "\n")
    elif recorded != identity:
        raise UserError(
            f"the source, the reference or a task file has changed since {workspace.output} was begun: remove it, or "
            "name another --output"
        )


def _wait_for_claim(workspace: Workspace) -> None:
    print(f"waiting for --shard=0, which writes {workspace.output / RECIPE_FILE}", flush=True)
    while _compare(workspace) is None:
        time.sleep(POLL)


def _run_steps(workspace: Workspace, executor: Executor, source: Source) -> None:
    recipe = workspace.recipe

    def run(name: str, function: Run, items: int, title: str) -> None:
        results = [workspace.result(name, item) for item in range(items)]
        executor.run(title, function, workspace, results)

    run("read", source_parts.read_unit, len(source.divide(recipe.part_bytes)), "Reading")
    source.check_unchanged()
    source_parts.check_not_empty(workspace)
    parts = len(workspace.parts)
    if recipe.quality_reference is not None:
        run("classifier", quality.train_classifier, 1, "Training the quality classifier")
    if recipe.tasks:
        run("grams", contamination.collect_grams, 1, "Reading the tasks")
    run("measure", measure, parts, "Filtering and hashing")
    if recipe.duplicates != "none":
        run("exact", duplicates.find_exact, duplicates.num_ranges(workspace), "Finding exact copies")
    if recipe.duplicates == "near":
        bands = Bands(recipe.similarity).bands
        run("near", duplicates.find_near, bands * duplicates.num_ranges(workspace), "Finding near copies")
    run("select", select, 1, "Selecting")
    run("tokenizer", token_shards.save_tokenizer, 1, "Opening the tokenizer")
    run("tokenise", token_shards.tokenise, parts, "Tokenising")
    shards = token_shards.shards(workspace)
    paths = [token_shards.shard_path(workspace, shard) for shard in shards]
    executor.run("Writing shards", token_shards.write_shard, workspace, paths)
    if executor.is_first:
        _finish(workspace)
    else:
        while not workspace.is_complete:
            time.sleep(POLL)


def _finish(workspace: Workspace) -> None:
    """Writes the report and then metadata.json, and removes the results of the steps."""
    output = workspace.output
    tokenizer = token_shards.open_tokenizer(workspace)
    metadata = {
        **read_json(output / RECIPE_FILE),
        "source": workspace.recipe.source,
        "tokenizer": workspace.recipe.tokenizer,
        "tokenizer_fingerprint": tokenizer.encoding_fingerprint,
        "vocab_size": tokenizer.vocab_size,
        "end_of_text": tokenizer.end_of_text,
        "dtype": token_shards.token_dtype(tokenizer).str,
        "splits": token_shards.finish_splits(workspace),
    }
    for split in token_shards.SPLITS:
        try:
            PreparedSplit(output, split, metadata)  # not every failed write raises
        except (OSError, ValueError, RuntimeError) as error:
            raise UserError(f"the shards in {output} are incomplete: remove it and prepare again: {error}") from None
    shutil.copytree(workspace.result("tokenizer", 0), output / "tokenizer", dirs_exist_ok=True)
    write_report(workspace, metadata["splits"])
    for path in output.iterdir():
        if path.is_file():
            sync(path)
    write_whole(output / "metadata.json", json.dumps(metadata, indent=2) + "\n")
    shutil.rmtree(output / "work", ignore_errors=True)  # other machines may still hold their locks in it
