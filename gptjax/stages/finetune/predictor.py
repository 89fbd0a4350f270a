"""What a fine-tuned model says of rows, and what that is worth where they have labels."""

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
from gptjax.data.task_inputs import Encoded, decode_spans, decode_tags, encode
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import preemption
from gptjax.metrics.task_reports import Report, report
from gptjax.parallel.mesh import batch_shards
from gptjax.parallel.rows import global_array, process_rows
from gptjax.stages.finetune.task_model import TaskModel
from gptjax.stages.saved_weights import load_parts
from gptjax.stages.trained_model import predicting

PREFETCH = 4  # microbatches


@dataclasses.dataclass(frozen=True)
class Predictions:
    """Of rows, in their order.

    Attributes:
      values: of each row its label, the place of its choice, its number, the tags of its words, or its answer.
      details: of each row the same and how sure the model is, as JSON can hold it.
      loss: the task's, a row; None where rows have no labels.
    """

    values: list[Any]
    details: list[dict[str, Any]]
    loss: float | None


def load_predictor(
    workdir: Path, mesh: Mesh, batch_size: int, *, given: dict[Path, Any] | None = None
) -> tuple[Config, Callable[[Sequence[Row]], Predictions]]:
    """The config of a fine-tuned run, complete, and what its best checkpoint says of rows; `mesh` is in use for both.

    Args:
      batch_size: rows at once, rounded up to a multiple of the devices that they are spread over.
      given: as of `load_parts`.

    Raises:
      UserError: as of `load_parts`; or the run is of another stage.
    """
    parts = load_parts(workdir, mesh, best=True, given=given)
    config = predicting(parts.parameters.config)
    if config.stage != "finetune":
        raise UserError(f"{workdir} is of stage {config.stage}, which learns to write: use gptjax.generate")
    shards = batch_shards(mesh)
    predictor = Predictor(
        TaskModel(config), parts.tokenizer, mesh, math.ceil(batch_size / shards) * shards, assemble=parts.join
    )
    return config, lambda rows: predictor((parts.base, parts.trained), rows, predictor.encode(rows))


class Predictor:
    """Applies a model and its head to rows, in batches of like length, on the mesh in use."""

    def __init__(
        self,
        model: TaskModel,
        tokenizer: Tokenizer,
        mesh: Mesh,
        batch_size: int,
        assemble: Callable[[Any], Any] = lambda params: params,
    ):
        """Takes a model.

        Args:
          batch_size: rows at once, over all devices; a multiple of those that batches are spread over.
          assemble: what is called with -> parameters of `model`, low-rank matrices folded in.
        """
        self._model, self._tokenizer, self._mesh, self._batch_size = model, tokenizer, mesh, batch_size
        # All processes get the predictions of all rows.
        self._predict = jax.jit(
            lambda params, batch: model.predict(assemble(params), batch),
            out_shardings=jax.NamedSharding(mesh, PartitionSpec()),
        )

    def encode(self, rows: Sequence[Row]) -> list[Encoded]:
        """The rows as the model reads them; raises as `task_inputs.encode`."""
        config = self._model.config
        return encode(rows, config.task, config.task.labels, self._tokenizer, config.model.context_length)

    def __call__(self, params: Any, rows: Sequence[Row], encoded: Sequence[Encoded]) -> Predictions:
        """What the model says.

        Args:
          params: what `assemble` takes.
          encoded: what `encode` makes of the rows.
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
            found = jax.device_get(self._predict(params, batch))
            if "losses" in found:
                total += float(found.pop("losses").sum(dtype=np.float64))
                weight += float(found.pop("counts").sum(dtype=np.float64))
            for place, example in enumerate(found.pop("examples").tolist()):
                if example >= 0:
                    outputs[example] = {name: array[place] for name, array in found.items()}
        values, details = _decode(self._model.config.task, rows, encoded, outputs)
        return Predictions(values, details, total / weight if weight > 0 else None)


def _decode(
    task: TaskConfig, rows: Sequence[Row], encoded: Sequence[Encoded], outputs: Sequence[dict[str, Any]]
) -> tuple[list[Any], list[dict[str, Any]]]:
    """Values and details of the rows, of what the model says of their examples."""
    if task.kind == "tagging":
        tags = decode_tags(encoded, [output["tags"] for output in outputs], task.labels)
        return list(tags), [{"tags": of_row} for of_row in tags]
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


def measure(task: TaskConfig, rows: Sequence[Row], predictions: Predictions) -> Report:
    """What predictions of labelled rows are worth; "loss" is among the metrics."""
    if task.kind == "tagging":
        gold = [row.fields["tags"] for row in rows]
    elif task.kind == "question_answering":
        gold = [row.fields["answers"]["text"] for row in rows]
    elif task.kind in ("regression", "multiple_choice"):
        gold = [row.fields["label"] for row in rows]
    else:
        gold = [task.labels.index(row.fields["label"]) for row in rows]
    found = report(task.kind, gold, predictions.values, task.labels)
    assert predictions.loss is not None
    return dataclasses.replace(found, metrics={"loss": predictions.loss, **found.metrics})
