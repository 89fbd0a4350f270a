"""Runs that are compared: their configs, the keys in which these differ, and groups of runs with the same config."""

import dataclasses
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gptjax.comparison.sweep_record import read_record
from gptjax.config import Config, UserError, read_config
from gptjax.metrics.measurement import Measurement, mean
from gptjax.scaling.flops import flops_per_token
from gptjax.training.metrics_file import LOWER_IS_BETTER, METRICS_FILE, read_metrics

# Keys that do not change what a run computes, and so make no other group.
IRRELEVANT = ("seed", "data.cache_dir", "data.prefetch_batches", "logging.")


@dataclasses.dataclass(frozen=True)
class Quantity:
    """What is compared: a value of the records of one split, such as the validation loss."""

    split: str
    metric: str

    @property
    def lower_is_better(self) -> bool:
        return self.metric in LOWER_IS_BETTER

    def __str__(self) -> str:
        return f"{self.split} {self.metric.replace('_', ' ')}"


@dataclasses.dataclass(frozen=True)
class Run:
    """A run, which may still be running.

    Attributes:
      name: the path of its workdir below the directory that all compared runs share.
      settings: the values of its config by key, as text.
      records: of its metrics.jsonl.
      swept: what its sweep sets in it, as text, by config key, or "config" for the config file; empty: it has no sweep.
    """

    name: str
    config: Config
    settings: dict[str, str]
    header: dict[str, Any]
    records: list[dict[str, Any]]
    swept: dict[str, str] = dataclasses.field(default_factory=dict)

    def curve(self, quantity: Quantity) -> list[tuple[dict[str, Any], float]]:
        """Returns the records that have the quantity, with its value, in order."""
        found = [record for record in self.records if record["split"] == quantity.split]
        return [(r, float(r[quantity.metric])) for r in found if isinstance(r.get(quantity.metric), int | float)]

    @property
    def tokens(self) -> int:
        """Number of tokens trained on at the last record."""
        return max((record["tokens"] for record in self.records), default=0)

    def final(self, quantity: Quantity) -> float | None:
        """The last value."""
        curve = self.curve(quantity)
        return curve[-1][1] if curve else None

    def best(self, quantity: Quantity) -> float | None:
        """The best value of trained weights."""
        values = [value for record, value in self.curve(quantity) if record["step"] > 0]
        return (min if quantity.lower_is_better else max)(values, default=None)

    def speed(self) -> float | None:
        """Tokens per second: the median of the training records."""
        speeds = [r["tokens_per_second"] for r in self.records if isinstance(r.get("tokens_per_second"), int | float)]
        return statistics.median(speeds) if speeds else None

    def x_of(self, axis: str) -> Callable[[dict[str, Any]], float]:
        """Returns the function that gives the place of a record on an axis: tokens, flops or seconds.

        Raises:
          UserError: the run does not say how many FLOPs a token costs.
        """
        if axis != "flops":
            return lambda record: float(record.get(axis) or 0)
        per_token = self.header.get("flops_per_token")
        if not isinstance(per_token, int | float):  # runs before the header had it
            if self.header.get("parameters") != self.header.get("trained_parameters"):
                raise UserError(f"{self.name} does not say how many FLOPs a token costs: use --x=tokens")
            vocabulary = self.header.get("config", {}).get("model", {}).get("vocab_size")
            per_token = flops_per_token(dataclasses.replace(self.config.model, vocab_size=vocabulary))
        return lambda record: float(record["tokens"] * per_token)


@dataclasses.dataclass(frozen=True)
class Group:
    """Runs with the same config except for the seed.

    Attributes:
      settings: the values of the keys in which groups differ, by key; "config" is the config file of a run.
      runs: by seed.
    """

    settings: dict[str, str]
    runs: dict[int, Run]

    @property
    def label(self) -> str:
        """Such as "optimizer.peak_lr=0.001, optimizer.name=muon"; the name of the run where nothing differs."""
        parts = [f"{key}={value}" for key, value in self.settings.items()]
        return ", ".join(parts) or next(iter(self.runs.values())).name

    def measured(self, value: Callable[[Run], float | None]) -> Measurement | None:
        """The mean over the seeds that have a value; None: none has."""
        found = [number for run in self.runs.values() if (number := value(run)) is not None and math.isfinite(number)]
        return mean(found) if found else None


def read_runs(paths: Iterable[Path], say: Callable[[str], None]) -> list[Run]:
    """Reads runs.

    Args:
      paths: workdirs, or directories of sweeps. Files are ignored, so that `sweeps/x/*` names all runs of a sweep.
      say: prints a line about runs of sweeps that have no metrics yet, and are left out.

    Raises:
      UserError: a directory is neither, or there are no runs, or a file in a workdir is damaged.
    """
    workdirs: list[Path] = []
    for path in paths:
        if not path.exists():
            raise UserError(f"there is no {path}: give the workdirs of runs, or the directory of a sweep")
        if path.is_dir():
            record = read_record(path)
            found = [path] if record is None else [path / name for name in record["members"]]
            workdirs += [workdir for workdir in found if _has_metrics(workdir, say)]
    workdirs = list(dict.fromkeys(workdirs))
    if not workdirs:
        raise UserError("no runs to compare: give the workdirs of runs, or the directory of a sweep")
    return [_read_run(workdir, name) for workdir, name in zip(workdirs, relative_names(workdirs), strict=True)]


def _has_metrics(workdir: Path, say: Callable[[str], None]) -> bool:
    """Whether a directory is the workdir of a run; raises UserError unless it is in the directory of a sweep."""
    if (workdir / METRICS_FILE).exists():
        return True
    sweep = read_record(workdir.parent)
    if sweep is None:
        raise UserError(f"{workdir} is not a workdir: it has no {METRICS_FILE}")
    if workdir.name in sweep["members"]:
        say(f"{workdir} has no metrics yet, and is left out")
    return False


def relative_names(workdirs: Sequence[Path]) -> list[str]:
    """Returns the paths of workdirs below the directory that they share."""
    absolute = [os.path.abspath(workdir) for workdir in workdirs]
    shared = os.path.commonpath([os.path.dirname(path) for path in absolute])
    return [os.path.relpath(path, shared) for path in absolute]


def _read_run(workdir: Path, name: str) -> Run:
    header, records = read_metrics(workdir)
    config = read_config(workdir)
    members = (read_record(workdir.parent) or {"members": {}})["members"]
    swept = _flat(members.get(workdir.name) or {})
    return Run(name, config, _flat(dataclasses.asdict(config)), header, records, swept)


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """The values of nested dicts by dotted key, as text; strings without quotes."""
    found: dict[str, str] = {}
    for key, value in tree.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{key}.")
        else:
            found[prefix + key] = value if isinstance(value, str) else repr(value)
    return found


def group_runs(runs: Sequence[Run], say: Callable[[str], None]) -> list[Group]:
    """Groups runs whose configs differ in the seed alone, in the order of their first runs.

    Args:
      say: prints a line about a run that repeats the config and the seed of another, and is left out.
    """
    groups: dict[tuple[str, ...], Group] = {}
    for run, settings in zip(runs, _settings(runs), strict=True):
        group = groups.setdefault(tuple(settings.values()), Group(settings, {}))
        if (other := group.runs.setdefault(run.config.seed, run)) is not run:
            say(f"{run.name} has the config and the seed of {other.name}, and is left out")
    return list(groups.values())


def _settings(runs: Sequence[Run]) -> list[dict[str, str]]:
    """What distinguishes runs: the keys in which their configs differ; of a sweep over config files, what it sets."""
    keys = differing_keys(runs)
    settings = [{key: run.settings[key] for key in keys} for run in runs]
    if not all("config" in run.swept for run in runs):
        return settings
    names = dict.fromkeys(key for run in runs for key in run.swept if not key.startswith(IRRELEVANT))
    swept = [{name: run.swept.get(name) or run.settings[name] for name in names} for run in runs]
    # Runs of several sweeps may have the same file with another content.
    pairs = {(*a.values(), *b.values()) for a, b in zip(settings, swept, strict=True)}
    counts = {len({tuple(found.values()) for found in each}) for each in (settings, swept)}
    return swept if counts == {len(pairs)} else settings


def differing_keys(runs: Sequence[Run]) -> list[str]:
    """Returns the config keys that have several values, apart from the seed and what does not change results."""
    return [
        key
        for key in runs[0].settings
        if not key.startswith(IRRELEVANT) and len({run.settings[key] for run in runs}) > 1
    ]


def choose_quantity(runs: Sequence[Run], split: str, metric: str | None) -> Quantity:
    """Returns what to compare: by default the metric by which the runs choose their best checkpoint.

    Raises:
      UserError: no run has measured it.
    """
    chosen = {run.config.evaluation.metric for run in runs}
    name = metric or (chosen.pop() if len(chosen) == 1 and split == "validation" else "loss")
    quantity = Quantity(split, name)
    if not any(run.curve(quantity) for run in runs):
        of_split = [record for run in runs for record in run.records if record["split"] == split]
        if not of_split:
            splits = {record["split"] for run in runs for record in run.records}
            raise UserError(f"no run has records of the split {split!r}: {_known('splits', splits)}")
        raise UserError(f"no run has measured {quantity}: {_known('metrics', set().union(*of_split) - _NOT_METRICS)}")
    return quantity


_NOT_METRICS = {"step", "tokens", "split", "seconds"}


def _known(what: str, names: set[str]) -> str:
    return f"the {what} are {', '.join(sorted(names))}" if names else f"there are no {what} yet"
