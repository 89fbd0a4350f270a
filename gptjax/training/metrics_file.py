"""Writes and reads the metrics of a run.

`metrics.jsonl` is the record; TensorBoard and Weights & Biases are views of it. Its first line is {"run": {...}}, each
later line one object: {"step": 10, "tokens": 5242880, "split": "train", "seconds": 61.5, "loss": 9.1, ...}. `seconds`
is wall-clock time since the start of the run, downtime excluded. A NaN or infinite value is null: JSON has neither.
"""

import json
import math
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from gptjax.config import LoggingConfig, UserError
from gptjax.files import append_to, expand, local_directory, write_whole
from gptjax.object_store import EventFiles

METRICS_FILE = "metrics.jsonl"
# Of the validation metrics.
LOWER_IS_BETTER = (
    *("loss", "perplexity", "bits_per_byte", "mean_squared_error"),
    *("left_to_right_loss", "middle_loss"),
)
# Size of the queue of TensorBoard's thread. With its default, 10, a thread that dies between `_tensorboard_lives` and
# the values of a record leaves the run waiting forever for room in the queue.
WAITING_EVENTS = 100_000
CLOSING_SECONDS = 5  # time to close TensorBoard's file once its thread has ended
_PLACE = {"step": int, "tokens": int, "split": str}  # in every record
_WANDB_ID = re.compile(r"[\w-]{1,64}")


class MetricsWriter:
    """Writes a run's metrics; only one process of a run makes one.

    Args:
      workdir: existing directory of the run; gets metrics.jsonl and, as `logging` says, tensorboard/ and wandb/.
      run: the header: what describes the run and does not change (versions, devices, config hash, parameters).
      logging: which views of metrics.jsonl to write.
      resume_step: the step that the run resumes from; records of later steps, and a last line that was cut off, are
        dropped. None: from scratch, all earlier records are dropped.
      callbacks: each is called with every record, once it is on disk.

    Attributes:
      seconds: wall-clock time from the start of the run to the last record, downtime excluded.

    Raises:
      UserError: Weights & Biases is asked for and not installed, or metrics.jsonl is damaged.
    """

    def __init__(
        self,
        workdir: Path,
        run: dict[str, Any],
        logging: LoggingConfig,
        resume_step: int | None = None,
        callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
    ) -> None:
        self._workdir, self._run, self._logging, self._callbacks = workdir, run, logging, callbacks
        self._tensorboard: Any = None
        self._wandb: Any = None
        if logging.wandb_project is not None:
            self._wandb = _start_wandb(workdir, logging.wandb_project, run)
        self._started = time.monotonic()
        self._started -= self._open(resume_step)
        self.seconds = time.monotonic() - self._started

    def _open(self, resume_step: int | None) -> float:
        """Opens the files to append after the records of `resume_step`; returns the `seconds` of the last of those."""
        path = self._workdir / METRICS_FILE
        header, records = ({}, []) if resume_step is None else _read(path)
        kept = [record for record in records if record["step"] <= (resume_step or 0)]
        write_whole(path, "".join(_line(record) for record in [{"run": header or self._run}, *kept]))
        self._last = {record["split"]: record["step"] for record in kept}
        self._file = append_to(path)
        if self._logging.tensorboard:
            from tensorboardX import SummaryWriter
            from tensorboardX.record_writer import register_writer_factory

            register_writer_factory("gs", EventFiles())
            purge_step = 0 if resume_step is None else resume_step + 1
            directory = str(self._workdir / "tensorboard")
            self._tensorboard = SummaryWriter(directory, purge_step=purge_step, max_queue=WAITING_EVENTS)
        return max((record.get("seconds") or 0.0 for record in kept), default=0.0)

    def go_back(self, step: int) -> None:
        """Drops the records of later steps."""
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._open(step)

    def has(self, step: int, split: str) -> bool:
        """Whether the newest record of `split` is that of `step`."""
        return self._last.get(split) == step

    def sync(self) -> None:
        """Flushes all records to the disk or the bucket, so that they survive a power failure."""
        self._file.sync()

    def write(self, step: int, tokens: int, split: str, **values: Any) -> None:
        """Appends one record, on disk when this returns; in a bucket by the next `sync`, or half a minute later.

        Args:
          step, tokens: how far training is.
          split: "train", "validation", ...
          **values: numbers (Python's, numpy's or jax's scalars) or None, by name.
        """
        numbers = {name: _number(value) for name, value in values.items()}
        self.seconds = round(time.monotonic() - self._started, 3)
        record = {"step": step, "tokens": tokens, "split": split, "seconds": self.seconds, **numbers}
        self._file.write(_line(record))
        self._last[split] = step
        known = {f"{split}/{name}": value for name, value in numbers.items() if value is not None}
        if self._tensorboard is not None and self._tensorboard_lives():
            for tag, value in known.items():
                self._tensorboard.add_scalar(tag, value, step)
        if self._wandb is not None:
            self._wandb.log({"step": step, "tokens": tokens, **known})
        for callback in self._callbacks:
            callback(dict(record))

    def write_text(self, step: int, name: str, text: str) -> None:
        """Writes `text`, such as a sample, to TensorBoard; metrics.jsonl contains only numbers."""
        if self._tensorboard is not None and self._tensorboard_lives():
            # TensorBoard reads Markdown: a code block keeps the line breaks.
            self._tensorboard.add_text(name, "".join(f"    {line}\n" for line in text.splitlines()), step)

    def _tensorboard_lives(self) -> bool:
        """Whether its thread is alive: with one that died of a full disk, every write would wait forever."""
        events = self._tensorboard.file_writer.event_writer
        return events._worker is not None and events._worker.is_alive()

    def close(self) -> None:
        """Flushes and closes all files; may be called more than once."""
        with suppress(OSError):  # every record was flushed already; a full disk raises again
            self._file.close()
        if self._tensorboard is not None and self._tensorboard_lives():
            # Its thread writes its queue, however long that takes. If it dies of a full disk, `close` waits forever.
            worker = self._tensorboard.file_writer.event_writer._worker
            closing = threading.Thread(target=self._tensorboard.close, daemon=True)
            closing.start()
            while closing.is_alive() and worker.is_alive():
                closing.join(0.1)
            closing.join(CLOSING_SECONDS)
        if self._wandb is not None:
            self._wandb.finish()
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def read_metrics(workdir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the records of a run, which may still be running.

    Raises:
      UserError: there is no metrics.jsonl, or a line of it, other than a cut-off last one, is not a record.
    """
    path = expand(os.fspath(workdir)) / METRICS_FILE
    if not path.exists():
        raise UserError(f"{path} does not exist: give the workdir of a run")
    return _read(path)


def shown_name(metric: str) -> str:
    """Returns the name of a metric for people; the name of a source in it, after a slash, stays as it is."""
    name, slash, source = metric.partition("/")
    return name.replace("_", " ") + slash + source


def _read(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Header and records; both empty without a file. A last line without its end was cut off by a kill: ignored."""
    if not path.exists():
        return {}, []
    header: dict[str, Any] = {}
    records: list[dict[str, Any]] = []
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if number == 1:
                header = dict(record["run"])
            else:
                if not all(type(record[name]) is kind for name, kind in _PLACE.items()):
                    raise ValueError(record)
                records.append(record)
        except (ValueError, KeyError, TypeError, RecursionError):
            raise UserError(f"{path}:{number} is not a metrics record: correct or remove the line") from None
    return header, records


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, allow_nan=False) + "\n"


def _number(value: Any) -> int | float | None:
    """`value` as JSON can hold it."""
    if hasattr(value, "item"):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(workdir: Path, project: str, run: dict[str, Any]) -> Any:
    """The Weights & Biases run of this workdir: the same one after a restart."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "logging.wandb_project is set but wandb is not installed: pip install 'gptjax[wandb]'"
        ) from None
    id_file = workdir / "wandb" / "run_id"
    if not id_file.exists():
        id_file.parent.mkdir(exist_ok=True)
        write_whole(id_file, uuid.uuid4().hex[:8])
    run_id = id_file.read_bytes().decode(errors="replace")
    if not _WANDB_ID.fullmatch(run_id):
        raise UserError(f"{id_file} has no valid Weights & Biases run id: remove it to log to a new run")
    directory = local_directory(workdir)
    directory.mkdir(parents=True, exist_ok=True)
    started = wandb.init(project=project, name=workdir.name, id=run_id, resume="allow", dir=directory, config=run)
    # W&B's own step may only increase; ours decreases when a killed run resumes from its last checkpoint.
    started.define_metric("*", step_metric="step")
    return started
