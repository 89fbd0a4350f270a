"""Files of what each example adds to each score, from which scores of several models are compared in pairs.

`X.samples.json`, next to the results `X.json`, has for each task the hashes of its examples, and for each of its scores
the terms of `gptjax/metrics/resampling.py:Sample`, column by column.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from gptjax.config import UserError
from gptjax.files import read_json, write_whole
from gptjax.metrics.measurement import Measurement
from gptjax.metrics.resampling import Sample


class TaskSamples(NamedTuple):
    """The hashes of a task's examples, and the sample of each of its scores."""

    identities: list[str]
    samples: dict[str, Sample]


def samples_path(results: Path) -> Path:
    """Returns the path of the samples that belong to the results X.json."""
    return results.with_suffix(".samples.json")


def task_samples(identities: list[str], metrics: Mapping[str, Measurement]) -> TaskSamples:
    """Returns the samples of those scores that have one."""
    return TaskSamples(identities, {name: m.sample for name, m in metrics.items() if m.sample is not None})


def write_samples(results: Path, tasks: Mapping[str, TaskSamples]) -> None:
    """Writes the samples that belong to `results`; raises UserError if they cannot be written."""
    tree = {
        name: {
            "examples": task.identities,
            "metrics": {
                metric: {
                    "form": sample.form,
                    "weights": sample.weights,
                    "strata": [terms.T.tolist() for terms in sample.strata],
                }
                for metric, sample in task.samples.items()
            },
        }
        for name, task in tasks.items()
    }
    path = samples_path(results)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(tree) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def read_samples(results: Path) -> dict[str, TaskSamples]:
    """Reads the samples that belong to `results`, by task.

    Raises:
      UserError: there is no such file, or it is damaged.
    """
    path = samples_path(results)
    if not path.is_file():
        raise UserError(f"there is no {path}: run gptjax.evaluate again, which computes recorded scores only once")
    try:
        return {name: TaskSamples(list(map(str, task["examples"])), _samples(task)) for name, task in _items(path)}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}): run gptjax.evaluate again") from None


def _items(path: Path) -> list[tuple[str, Any]]:
    return list(read_json(path).items())


def _samples(task: Any) -> dict[str, Sample]:
    found = {}
    for metric, entry in task["metrics"].items():
        if entry["form"] not in ("ratio", "exponential", "bleu"):
            raise ValueError(f"unknown form {entry['form']!r}")
        strata = tuple(np.array(columns, np.float64).T for columns in entry["strata"])
        if len(strata) != len(entry["weights"]) or any(terms.ndim != 2 for terms in strata):
            raise ValueError(f"malformed terms of {metric}")
        found[metric] = Sample(strata, tuple(map(float, entry["weights"])), entry["form"])
    return found
