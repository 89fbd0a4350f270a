"""Predictions of a fine-tuned model on rows, and their metrics where the rows have labels."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from gptjax.config import Config, TaskConfig, UserError
from gptjax.data.buckets import Buckets
from gptjax.data.labelled import Row
from gptjax.data.task_inputs import EncodedRow, decode_spans, decode_tags, encode
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import preemption
from gptjax.metrics.task_reports import TaskReport, report
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.rows import global_array, process_rows
from gptjax.stages.finetune.task_model import TaskModel
from gptjax.stages.saved_weights import load_parts
from gptjax.stages.trained_model import predicting

PREFETCH = 4  # microbatches


@dataclasses.dataclass(frozen=True)
class Predictions:
    """The predictions for rows, in their order.

    Attributes:
      values: for each row the index of its label or option, its number, the tags of its words, or its answer.
      details: the same with probabilities or scores, as JSON values.
      loss: the weighted mean of the task's loss; None if the rows have no labels.
    """

    values: list[Any]
    details: list[dict[str, Any]]
    loss: float | None


def load_predictor(
    workdir: Path,
    mesh: Mesh,
    batch_size: int,
    *,
    best: bool = True,
    step: int | None = None,
    given: dict[Path, Any] | None = None,
) -> tuple[Config, Callable[[Sequence[Row]], Predictions]]:
    """Loads a fine-tuned run; returns its complete config and a function from rows to predictions.

    Args:
      mesh: in use (`jax.set_mesh`) here and when the function is called.
      batch_size: rows per batch, rounded up to a multiple of the number of batch shards.
      best, step, given: as in `load_parts`; by default the best checkpoint.

    Raises:
      UserError: as `load_parts`, or the run is of another stage.
    """
    parts = load_parts(workdir, mesh, best=best, step=step, given=given)
    config = predicting(parts.parameters.config)
    if config.stage != "finetune":
        raise UserError(f"{workdir} is of stage {config.stage}, not finetune: use gptjax.generate or gptjax.chat")
    shards = batch_shards(mesh)
    predictor = Predictor(
        TaskModel(config), parts.tokenizer, mesh, math.ceil(batch_size / shards) * shards, assemble=parts.join
    )
    return config, lambda rows: predictor((parts.base, parts.trained), rows, predictor.encode(rows))


class Predictor:
    """Applies a fine-tuned model to rows, in batches of similar length, on the mesh in use."""

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer,
        mesh: Mesh,
        batch_size: int,
        assemble: Callable[[Any], Any] = lambda params: params,
    ):
        """Compiles nothing yet.

        Args:
          batch_size: rows per batch, over all devices; a multiple of the number of batch shards.
          assemble: maps the `params` of `__call__` to the parameters of `model`, low-rank matrices merged.
        """
        self._model, self._tokenizer, self._mesh, self._batch_size = model, tokenizer, mesh, batch_size
        # Replicated, so that every process has the predictions of all rows.
        self._predict = jax.jit(
            lambda params, batch: model.predict(assemble(params), batch),
            out_shardings=jax.NamedSharding(mesh, PartitionSpec()),
        )

    def encode(self, rows: Sequence[Row]) -> list[EncodedRow]:
        """Encodes rows as token sequences; raises as `task_inputs.encode`."""
        config = self._model.config
        return encode(rows, config.task, config.task.labels, self._tokenizer, config.model.context_length)

    def __call__(self, params: Any, rows: Sequence[Row], encoded: Sequence[EncodedRow]) -> Predictions:
        """Predicts rows.

        Args:
          params: the argument of `assemble`.
          encoded: `encode(rows)`.
        """
        buckets = Buckets(
            encoded,
            context_length=self._model.config.model.context_length,
            batch_size=self._batch_size,
            microbatch_size=self._batch_size,
            seed=None,
        )
        outputs: list[dict[str, Any]] = [{} for _ in encoded]
        local_rows, total, weight = process_rows(self._mesh, self._batch_size), 0.0, 0.0
        for microbatch in buckets.microbatches(0, local_rows, PREFETCH):
            preemption.check()
            batch = {
                name: global_array(self._mesh, local_rows, array, self._batch_size)
                for name, array in microbatch.arrays.items()
            }
            arrays = jax.device_get(self._predict(params, batch))
            if "losses" in arrays:
                total += float(arrays.pop("losses").sum(dtype=np.float64))
                weight += float(arrays.pop("counts").sum(dtype=np.float64))
            for index, example in enumerate(arrays.pop("examples").tolist()):
                if example >= 0:
                    outputs[example] = {name: array[index] for name, array in arrays.items()}
        values, details = _decode(self._model.config.task, rows, encoded, outputs)
        return Predictions(values, details, total / weight if weight > 0 else None)


def _decode(
    task: TaskConfig, rows: Sequence[Row], encoded: Sequence[EncodedRow], outputs: Sequence[dict[str, Any]]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Converts the model's outputs for examples to the values and details of `Predictions` for rows."""
    if task.kind == "tagging":
        tags = decode_tags(encoded, [output["tags"] for output in outputs], task.labels)
        return list(tags), [{"tags": row_tags} for row_tags in tags]
    if task.kind == "question_answering":
        starts, stops = ([output[name] for output in outputs] for name in ("start_nats", "stop_nats"))
        spans = decode_spans(encoded, starts, stops, rows)
        return [span.text for span in spans], [
            {"answer": span.text, "answer_start": span.start, "score": round(span.score, 4)} for span in spans
        ]
    if task.kind == "regression":
        values = [float(output["values"]) for output in outputs]
        return values, [{"value": round(value, 6)} for value in values]
    best = [int(np.argmax(output["probabilities"])) for output in outputs]
    if task.kind == "multiple_choice":
        return best, [{"choice": i, "probabilities": _rounded(o)} for i, o in zip(best, outputs, strict=True)]
    return best, [
        {"label": task.labels[i], "probabilities": dict(zip(task.labels, _rounded(output), strict=True))}
        for i, output in zip(best, outputs, strict=True)
    ]


def _rounded(output: dict[str, Any]) -> list[float]:
    return [round(value, 6) for value in output["probabilities"].tolist()]


def measure(task: TaskConfig, rows: Sequence[Row], predictions: Predictions) -> TaskReport:
    """Computes the metrics of predictions on labelled rows, with the task's loss as "loss"."""
    if task.kind == "tagging":
        gold = [row.fields["tags"] for row in rows]
    elif task.kind == "question_answering":
        gold = [row.fields["answers"]["text"] for row in rows]
    elif task.kind in ("regression", "multiple_choice"):
        gold = [row.fields["label"] for row in rows]
    else:
        gold = [task.labels.index(row.fields["label"]) for row in rows]
    measured = report(task.kind, gold, predictions.values, task.labels)
    assert predictions.loss is not None
    return dataclasses.replace(measured, metrics={"loss": predictions.loss, **measured.metrics})
