"""Results of `gptjax.evaluate` of several workdirs, read to be compared in pairs on the same examples."""

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from gptjax.comparison.runs import relative_names
from gptjax.comparison.sweep_record import read_record
from gptjax.config import UserError
from gptjax.evaluation.sample_files import TaskSamples, read_samples
from gptjax.files import read_json
from gptjax.metrics.resampling import PairedTest, holm, paired_test

ALL = "all"  # the value of --metric for all scores


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """The result of a workdir on a task.

    Attributes:
      file: JSON file that it is from.
      step: step of the evaluated checkpoint.
      entry: the task's entry of the report.
      tokenizer: fingerprint of the model's tokenizer.
    """

    file: Path
    step: int
    entry: dict[str, Any]
    tokenizer: str
    samples: TaskSamples


@dataclasses.dataclass(frozen=True)
class Evaluated:
    """The results of a workdir by task; with few-shot examples, their number is part of the task's name."""

    name: str
    tasks: dict[str, TaskResult]


@dataclasses.dataclass(frozen=True)
class Comparison:
    """A score of a workdir, compared with the score of the baseline.

    Attributes:
      entry: the JSON fields of the score.
      baseline: name of the workdir from which differences are taken.
      test: of the difference from the baseline; None: this is the baseline, or one of the two has no sample.
      p_holm: the p-value adjusted for the number of all tests of the comparison.
    """

    task: str
    metric: str
    name: str
    entry: dict[str, Any]
    baseline: str
    test: PairedTest | None = None
    p_holm: float | None = None


def read_evaluations(paths: Iterable[Path]) -> list[Evaluated]:
    """Reads the results of workdirs: of each task those of the highest step and, of equal steps, the latest.

    Args:
      paths: workdirs, directories of sweeps, or JSON files of results.

    Raises:
      UserError: a path has no results, or a file is damaged.
    """
    places: list[Path] = []
    for path in paths:
        record = read_record(path) if path.is_dir() else None
        places += [path] if record is None else [path / name for name in record["members"]]
    places = list(dict.fromkeys(places))
    if len(places) < 2:
        raise UserError("needs the results of at least two workdirs to compare")
    return [Evaluated(name, _read_tasks(place)) for place, name in zip(places, relative_names(places), strict=True)]


def _read_tasks(place: Path) -> dict[str, TaskResult]:
    if place.is_file():
        files = [place]
    elif place.is_dir():
        found = (place / "evaluation").glob("*.json")
        files = sorted(file for file in found if not file.name.endswith(".samples.json"))
    else:
        raise UserError(f"there is no {place}: give workdirs, or the JSON files of results")
    if not files:
        raise UserError(
            f"{place} has no results to compare: run python -m gptjax.evaluate --workdir={place} --tasks=..."
        )
    results: dict[str, tuple[tuple[int, float], TaskResult]] = {}
    for file in files:
        report, samples = _read_report(file), read_samples(file)
        age = (report["step"], file.stat().st_mtime)
        for name, entry in report["results"].items():
            shots = entry.get("num_fewshot")
            key = f"{name} {shots}-shot" if shots else name
            if name not in samples:
                raise UserError(f"{file} is not of the same evaluation as its samples: run gptjax.evaluate again")
            if key not in results or results[key][0] < age:
                found_here = TaskResult(file, report["step"], entry, str(report.get("tokenizer")), samples[name])
                results[key] = age, found_here
    return {key: result for key, (_, result) in results.items()}


def _read_report(file: Path) -> dict[str, Any]:
    try:
        report = read_json(file)
        if not isinstance(report["step"], int) or not all(entry["metrics"] for entry in report["results"].values()):
            raise ValueError("it is no report of an evaluation")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is damaged, or not from gptjax.evaluate ({error!r})") from None
    return dict(report)


def check_same_examples(evaluations: Sequence[Evaluated]) -> None:
    """Raises UserError where two workdirs were evaluated on different examples of a task, naming the first."""
    first: dict[str, tuple[str, TaskResult]] = {}
    for evaluated in evaluations:
        for task, result in evaluated.tasks.items():
            name, other = first.setdefault(task, (evaluated.name, result))
            ours, theirs = result.samples.identities, other.samples.identities
            fix = "evaluate both with the same data, --limit, --num_fewshot and --seed"
            if len(ours) != len(theirs):
                raise UserError(f"{task}: {evaluated.name} has {len(ours)} examples, {name} {len(theirs)}: {fix}")
            unequal = next((i for i, pair in enumerate(zip(ours, theirs, strict=True)) if pair[0] != pair[1]), None)
            if unequal is not None:
                raise UserError(
                    f"{task}: example {unequal} of {evaluated.name} ({result.file}) is not that of {name} "
                    f"({other.file}): {fix}"
                )


def compare_evaluations(
    evaluations: Sequence[Evaluated], metric: str | None = None, baseline: str | None = None
) -> list[Comparison]:
    """Compares the scores of all workdirs with those of one, on the same examples.

    Args:
      metric: score to compare; ALL: all; None: of each task the first one, of perplexity the bits per byte, which do
        not depend on the tokenizer.
      baseline: name of the workdir from which differences are taken; None: the first.

    Raises:
      UserError: there is no such score or baseline, or the examples of a task differ.
    """
    check_same_examples(evaluations)
    names = [evaluated.name for evaluated in evaluations]
    if baseline is not None and baseline not in names:
        raise UserError(f"--baseline={baseline} is none of {', '.join(names)}")
    reference = evaluations[0 if baseline is None else names.index(baseline)]
    found: list[Comparison] = []
    for task in dict.fromkeys(task for evaluated in evaluations for task in evaluated.tasks):
        results = {each.name: each.tasks[task] for each in evaluations if task in each.tasks}
        for score in _chosen(results, metric):
            for name, result in results.items():
                if (entry := result.entry["metrics"].get(score)) is not None:
                    other = results.get(reference.name) if name != reference.name else None
                    test = _tested(result, other, score)
                    found.append(Comparison(task, score, name, entry, reference.name, test))
    if not found:
        raise UserError(f"no task has the score --metric={metric}")
    tested = [index for index, each in enumerate(found) if each.test is not None]
    adjusted = holm([found[index].test.p_value for index in tested])  # type: ignore[union-attr]
    for index, p_value in zip(tested, adjusted, strict=True):
        found[index] = dataclasses.replace(found[index], p_holm=p_value)
    return found


def _chosen(results: dict[str, TaskResult], metric: str | None) -> list[str]:
    """The scores of a task to compare."""
    scores = list(dict.fromkeys(score for result in results.values() for score in result.entry["metrics"]))
    if metric is None:
        return ["bits_per_byte" if "bits_per_byte" in scores else scores[0]]
    return scores if metric == ALL else [score for score in scores if score == metric]


def _tested(result: TaskResult, baseline: TaskResult | None, score: str) -> PairedTest | None:
    if baseline is None or score not in result.samples.samples or score not in baseline.samples.samples:
        return None
    try:
        return paired_test(result.samples.samples[score], baseline.samples.samples[score])
    except ValueError as error:  # such as a mixture whose weights changed
        raise UserError(f"{score} of {result.file} and {baseline.file}: {error}") from None
