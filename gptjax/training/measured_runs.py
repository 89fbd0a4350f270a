"""Finished runs as points of a scaling law: parameters, tokens, FLOPs and held-out loss, read from their workdirs."""

import dataclasses
import hashlib
import math
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import Config, UserError, read_config
from gptjax.scaling.flops import flops_per_token
from gptjax.scaling.model_sizes import COUNTS
from gptjax.scaling.run_table import RunTable
from gptjax.training.metrics_file import METRICS_FILE, read_metrics


@dataclasses.dataclass(frozen=True)
class MeasuredRun:
    """A run and its held-out losses.

    Attributes:
      started: ISO 8601 time of its first start.
      parameters: as counted, see `COUNTS`.
      flops_per_token: of a training step.
      tokens, losses: (evaluations,), in the order of training.
    """

    workdir: Path
    config: Config
    started: str
    parameters: int
    flops_per_token: float
    tokens: tuple[int, ...]
    losses: tuple[float, ...]


def measured_run(workdir: Path, count: str = "total") -> MeasuredRun:
    """Reads a finished run.

    Raises:
      UserError: it has no held-out loss, a loss that is not finite, or has not read all its tokens.
    """
    header, records = read_metrics(workdir)
    config = read_config(workdir)
    # config.json has the vocabulary as it was given; the header has that of the tokenizer.
    size = header.get("config", {}).get("model", {}).get("vocab_size") or config.model.vocab_size
    if size is None:
        raise UserError(f"{workdir / METRICS_FILE} does not state the size of the vocabulary: it has no header")
    model = dataclasses.replace(config.model, vocab_size=size)
    found = [record for record in records if record["split"] == "validation" and "loss" in record]
    if not found:
        raise UserError(f"{workdir} has no held-out loss: evaluate during training (evaluation.every_tokens)")
    for record in found:
        if record["loss"] is None or not (math.isfinite(record["loss"]) and record["loss"] > 0):
            raise UserError(f"{workdir}: the held-out loss at step {record['step']} is not a positive number")
    trained, wanted = max(record["tokens"] for record in records), config.batch.total_tokens
    if wanted is not None and trained + config.batch.tokens_per_batch <= wanted:
        raise UserError(f"{workdir} has read {trained:,} of {wanted:,} tokens: let the run finish")
    if found[-1]["tokens"] < trained:
        raise UserError(
            f"{workdir} was not evaluated at its end, only at {found[-1]['tokens']:,} of {trained:,} tokens"
        )
    return MeasuredRun(
        *(workdir, dataclasses.replace(config, model=model), str(header.get("started", ""))),
        *(COUNTS[count](model), flops_per_token(model)),
        tuple(record["tokens"] for record in found if record["tokens"] > 0),
        tuple(float(record["loss"]) for record in found if record["tokens"] > 0),
    )


def table_of_runs(workdirs: Sequence[Path], count: str = "total", curves: bool = False) -> RunTable:
    """Returns the runs as a table.

    Args:
      count: what N counts, see `COUNTS`.
      curves: a row for each evaluation, instead of one for each run.

    Raises:
      UserError: see `measured_run`; losses of different stages or held-out data.
    """
    runs = [measured_run(workdir, count) for workdir in workdirs]
    for other in runs[1:]:
        for what, here, there in zip(("stage", *_HELD_OUT), _same(runs[0]), _same(other), strict=True):
            if here != there:
                raise UserError(
                    f"the losses of {runs[0].workdir} and {other.workdir} cannot be compared: {what} is {here!r} and "
                    f"{there!r}"
                )
    digest = hashlib.sha256()
    names: list[str] = []
    columns: dict[str, list[float]] = {name: [] for name in ("parameters", "tokens", "flops", "loss")}
    for run in runs:
        points = list(zip(run.tokens, run.losses, strict=True))
        for tokens, loss in points if curves else points[-1:]:
            names.append(str(run.workdir))
            row = (run.parameters, tokens, run.flops_per_token * tokens, loss)
            for column, value in zip(columns.values(), row, strict=True):
                column.append(float(value))
            digest.update(repr((run.parameters, tokens, loss)).encode())
    source = "workdir " + str(workdirs[0]) if len(runs) == 1 else f"{len(runs)} workdirs from {workdirs[0]}"
    return RunTable(source, tuple(names), {name: np.array(of) for name, of in columns.items()}, digest.hexdigest())


_HELD_OUT = (
    *("data.source", "data.validation_source", "data.validation_fraction", "data.tokenizer", "data.objective"),
    "evaluation.max_tokens",
)


def _same(run: MeasuredRun) -> tuple[Any, ...]:
    """What must be the same in runs whose losses are compared: the stage, and _HELD_OUT."""
    return run.config.stage, *(attrgetter(key)(run.config) for key in _HELD_OUT)
