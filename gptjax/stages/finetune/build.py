"""Stage "finetune": supervised fine-tuning on labelled rows (Radford et al. 2018, sections 3.2 and 3.3)."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, UserError, naming
from gptjax.data import task_inputs
from gptjax.data.augmentation import with_copies
from gptjax.data.buckets import Buckets
from gptjax.data.labelled import Row, check_spec, read_rows, split_rows
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import processes
from gptjax.files import write_whole
from gptjax.metrics.report_files import plot_confusion, write_predictions
from gptjax.models import low_precision
from gptjax.models.attention_backends import check_backend
from gptjax.parallel.mesh import check_fit
from gptjax.parallel.rows import process_rows
from gptjax.stages.finetune.predictor import Predictor, measure
from gptjax.stages.finetune.task_model import TASK_FILE, TaskModel, completed
from gptjax.stages.reading import find_tokenizer, refuse_settings_of_pretraining
from gptjax.training.intervals import in_tokens
from gptjax.training.objective import Objective
from gptjax.training.stage import Stage, describe_data

METRICS_FILE, PREDICTIONS_FILE, CONFUSION_FILE = "report.json", "predictions.jsonl", "confusion.png"


@dataclasses.dataclass(frozen=True)
class RowSplits:
    """The labelled rows of a run."""

    train: list[Row]
    validation: list[Row]
    test: list[Row]  # for the final report


def build(
    config: Config, mesh: Mesh, tokenizer: Tokenizer | None, make_objective: Callable[[Config], Objective]
) -> Stage:
    """Builds the stage on `mesh`.

    Args:
      tokenizer: of the run to resume; None: that of the weights to start from, or the one that the config names.
      make_objective: complete config -> parameters and loss.

    Raises:
      UserError: rows that cannot be read or have no label, missing weights, sizes that do not divide over the mesh.
    """
    refuse_settings_of_pretraining(config, mesh, "labelled row")
    check_backend(config.model, mesh.devices.flat[0].platform, has_segments=False)
    low_precision.check_device(config.model, mesh.devices.flat[0].platform)
    rows = processes.first_then_others(lambda: read(config))
    if tokenizer is None:
        tokenizer = find_tokenizer(config, [text for row in rows.train for text in _texts(row)])
    task_fields = _task_fields(rows.train, config)
    if config.task.kind in task_inputs.NAMED:
        for other in (rows.validation, rows.test):
            task_inputs.check_labels(other, task_fields["labels"])
    config = completed(config, tokenizer.vocab_size, task_fields)
    task, context = config.task, config.model.context_length
    size = config.sequences_per_microbatch
    train = with_copies(rows.train, config.regularisation, config.seed)
    encoded = task_inputs.encode(train, task, task.labels, tokenizer, context)
    examples = Buckets(
        encoded,
        context_length=context,
        batch_size=config.batch.tokens_per_batch // context,
        microbatch_size=size,
        seed=config.seed,
    )
    config = in_tokens(config, examples.tokens_per_epoch)
    check_fit(config, mesh)
    objective = make_objective(config)
    predictor = Predictor(TaskModel(config), tokenizer, mesh, size, assemble=objective.parameters.merge)
    batch = config.batch
    epochs = 0.0 if batch.epochs is None else batch.epochs
    tokens = batch.total_tokens or math.ceil(epochs * examples.tokens_per_epoch)
    return Stage(
        objective=objective,
        tokenizer=tokenizer,
        total_tokens=tokens,
        batches=lambda start, run: examples.microbatches(start, process_rows(mesh, size), config.data.prefetch_batches),
        evaluate=_evaluate(config, predictor, rows.validation),
        sample=None,
        conclude=_conclude(config, predictor, rows.test),
        files={TASK_FILE: json.dumps(task_fields, indent=2) + "\n"},
        description=describe_data("examples", len(train), len(rows.validation), examples.tokens_per_epoch, tokens),
    )


def read(config: Config) -> RowSplits:
    """Reads the rows that `config` names; raises as `read_rows`."""
    data, task = config.data, config.task
    sources = {"data.source": data.source, "data.validation_source": data.validation_source}
    for field, source in (sources | {"task.test_source": task.test_source}).items():
        if source is not None:
            with naming(field):
                check_spec(source)

    def rows(spec: str) -> list[Row]:
        return read_rows(spec, task.kind, dict(task.columns), invalid_utf8=data.invalid_utf8)

    train = rows(data.source)
    if data.validation_source is None:
        train, validation = split_rows(train, data.validation_fraction)
    else:
        validation = rows(data.validation_source)
    return RowSplits(train, validation, validation if task.test_source is None else rows(task.test_source))


def _texts(row: Row) -> list[str]:
    """Returns all text of a row that a model reads, to train a tokenizer on."""
    texts = [value for role, value in row.fields.items() if isinstance(value, str) and role != "label"]
    return [*texts, " ".join(row.fields.get("tokens", [])), *row.fields.get("choices", [])]


def _task_fields(rows: list[Row], config: Config) -> dict[str, Any]:
    """Determines the fields of `task` that the config leaves to the training rows: the content of TASK_FILE."""
    task = config.task
    labels = task_inputs.find_labels(rows, task.kind, task.labels)
    weights = task_inputs.balanced_weights(rows, labels) if task.balanced_labels else task.label_weights
    if weights and len(weights) != len(labels):
        raise UserError(f"task.label_weights={weights} needs one weight for each of {len(labels)} labels")
    mean, std = task.target_mean, task.target_std
    if task.kind == "regression":
        targets = np.array([row.fields["label"] for row in rows])
        mean = float(np.mean(targets)) if mean is None else mean
        if std is None:
            std = float(np.std(targets)) or 1.0  # all targets are equal: any scale is valid
    return {"labels": labels, "label_weights": tuple(weights), "target_mean": mean, "target_std": std}


def _evaluate(config: Config, predictor: Predictor, rows: list[Row]) -> Callable[[Any], dict[str, float]]:
    """Returns a function from parameters to the loss and metrics on the validation rows."""
    encoded = predictor.encode(rows)

    def evaluate(params: Any) -> dict[str, float]:
        return measure(config.task, rows, predictor(params, rows, encoded)).metrics

    return evaluate


def _conclude(config: Config, predictor: Predictor, rows: list[Row]) -> Callable[[Any, int, Path], str]:
    """Returns a function that writes the report on the test rows to a workdir and returns it as text."""

    def conclude(params: Any, step: int, workdir: Path) -> str:
        predictions = predictor(params, rows, predictor.encode(rows))
        report = measure(config.task, rows, predictions)
        if jax.process_index() == 0:
            records = (
                {"place": row.place, **row.fields, "predicted": details}
                for row, details in zip(rows, predictions.details, strict=True)
            )
            write_predictions(workdir / PREDICTIONS_FILE, records)
            if report.confusion is not None:
                plot_confusion(workdir / CONFUSION_FILE, report.confusion, report.labels)
            try:
                write_whole(workdir / METRICS_FILE, json.dumps(report.as_json(), indent=2) + "\n")
            except OSError as error:
                raise UserError(f"cannot write in --workdir={workdir}: {error.strerror}") from None
        return f"{report.text}\npredictions: {workdir / PREDICTIONS_FILE}"

    return conclude
