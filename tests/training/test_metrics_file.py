import json
import math
import re
import sys
import threading
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.event_file_writer import _EventLoggerThread
from tensorboardX.proto.event_pb2 import Event

from gptjax.config import LoggingConfig, UserError
from gptjax.training.metrics_file import MetricsWriter, read_metrics
from gptjax.training.plots import limits_without_start, plot_loss

RUN = {"parameters": 124_439_808, "devices": "8 x TPU v4"}
QUIET = LoggingConfig(tensorboard=False)


def train(workdir: Path, steps: range, resume_step: int | None = None, logging: LoggingConfig = QUIET) -> None:
    with MetricsWriter(workdir, RUN, logging, resume_step) as metrics:
        for step in steps:
            metrics.write(step, 100 * step, "train", loss=10 / step)


def steps_of(workdir: Path) -> list[int]:
    return [record["step"] for record in read_metrics(workdir)[1]]


def test_what_is_written_is_read(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, RUN, QUIET) as metrics:
        metrics.write(0, 0, "validation", loss=10.5, bits_per_byte=np.float32(2.5))
        metrics.write(1, 100, "train", loss=jnp.float32(9.5), mfu=None)
    text = (tmp_path / "metrics.jsonl").read_text()
    assert all(0 <= record["seconds"] < 1000 for record in read_metrics(tmp_path)[1])
    assert re.sub(r'"seconds": [\d.]+, ', "", text).splitlines() == [
        '{"run": {"parameters": 124439808, "devices": "8 x TPU v4"}}',
        '{"step": 0, "tokens": 0, "split": "validation", "loss": 10.5, "bits_per_byte": 2.5}',
        '{"step": 1, "tokens": 100, "split": "train", "loss": 9.5, "mfu": null}',
    ]
    header, records = read_metrics(tmp_path)
    assert header == RUN
    assert [record["loss"] for record in records] == [10.5, 9.5]


def test_a_record_is_on_disk_before_the_run_ends(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, RUN, QUIET) as metrics:
        metrics.write(1, 100, "train", loss=1.0)
        assert steps_of(tmp_path) == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, np.float32("nan"), jnp.inf])
def test_non_finite_values_are_null(tmp_path: Path, value: Any) -> None:
    with MetricsWriter(tmp_path, RUN, QUIET) as metrics:
        metrics.write(1, 100, "train", loss=value)
    assert read_metrics(tmp_path)[1][0]["loss"] is None


def test_resuming_drops_what_the_checkpoint_does_not_know(tmp_path: Path) -> None:
    train(tmp_path, range(1, 6))
    train(tmp_path, range(4, 7), resume_step=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4, 5, 6]
    assert (tmp_path / "metrics.jsonl").read_text().count('"run"') == 1


def test_resuming_keeps_the_first_header(tmp_path: Path) -> None:
    train(tmp_path, range(1, 3))
    MetricsWriter(tmp_path, {"devices": "another machine"}, QUIET, resume_step=2).close()
    assert read_metrics(tmp_path)[0] == RUN


def test_starting_from_scratch_drops_all(tmp_path: Path) -> None:
    train(tmp_path, range(1, 6))
    train(tmp_path, range(1, 3))
    assert steps_of(tmp_path) == [1, 2]


def test_resuming_without_a_file_starts_one(tmp_path: Path) -> None:
    train(tmp_path, range(4, 6), resume_step=3)
    assert read_metrics(tmp_path)[0] == RUN
    assert steps_of(tmp_path) == [4, 5]


@pytest.mark.parametrize("cut", [1, 5, 20])
def test_a_torn_last_line_is_dropped(tmp_path: Path, cut: int) -> None:
    train(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes()[:-cut])
    assert steps_of(tmp_path) == [1, 2]
    train(tmp_path, range(3, 5), resume_step=3)
    assert steps_of(tmp_path) == [1, 2, 3, 4]


def test_a_failed_rewrite_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(tmp_path, range(1, 4))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        MetricsWriter(tmp_path, RUN, QUIET, resume_step=1)
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_damaged_file_is_named_with_its_line(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    path.write_text(path.read_text().replace('{"step": 2,', "oops"))
    with pytest.raises(UserError, match=r"metrics\.jsonl:3 is not a metrics record"):
        read_metrics(tmp_path)


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist: give the workdir of a run"):
        read_metrics(tmp_path)


def tensorboard_values(workdir: Path) -> list[tuple[str, int, float]]:
    values = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):  # length (8 bytes), its checksum (4), the event, its checksum (4)
            length = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + length])
            values += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            at += 16 + length
    return values


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, RUN, LoggingConfig()) as metrics:
        metrics.write(5, 500, "train", loss=2.5, mfu=None)
        metrics.write(5, 500, "validation", loss=3.0)
        metrics.write_text(5, "sample", "first line\nsecond line")
    values = tensorboard_values(tmp_path)
    assert values[:2] == [("train/loss", 5, 2.5), ("validation/loss", 5, 3.0)]
    assert [tag for tag, *_ in values[2:]] == ["sample/text_summary"]


def test_a_thread_of_tensorboard_that_dies_keeps_no_run_waiting(tmp_path: Path, monkeypatch) -> None:
    """Not when it dies behind the question whether it lives: a full disk was seen to do so."""
    monkeypatch.setattr(_EventLoggerThread, "run", lambda self: None)
    monkeypatch.setattr(MetricsWriter, "_tensorboard_lives", lambda self: True)
    writing = threading.Thread(target=train, args=(tmp_path, range(1, 41), None, LoggingConfig()), daemon=True)
    writing.start()
    writing.join(1000)
    assert not writing.is_alive()
    assert len(read_metrics(tmp_path)[1]) >= 40


@pytest.mark.slow
def test_wandb_offline_keeps_its_run_over_a_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logging = LoggingConfig(tensorboard=False, wandb_project="gptjax-test")
    train(tmp_path, range(1, 3), logging=logging)
    train(tmp_path, range(3, 4), resume_step=2, logging=logging)
    run_id = (tmp_path / "wandb" / "run_id").read_text()
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert runs
    assert {path.name for path in runs} == {f"run-{run_id}.wandb"}
    assert steps_of(tmp_path) == [1, 2, 3]


def test_a_missing_wandb_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'gptjax\[wandb\]'"):
        MetricsWriter(tmp_path, RUN, LoggingConfig(wandb_project="any"))


@pytest.mark.parametrize("log_tokens", [False, True])
def test_the_plot_is_a_picture(tmp_path: Path, log_tokens: bool) -> None:
    with MetricsWriter(tmp_path, RUN, QUIET) as metrics:
        metrics.write(0, 0, "validation", loss=10.8)
        metrics.write(1, 100, "train", loss=9.0)
        metrics.write(2, 200, "train", loss=math.nan)
        metrics.write(2, 200, "validation", loss=8.0)
    path = plot_loss(tmp_path, log_tokens)
    assert path == tmp_path / "loss.png"
    assert path.read_bytes().startswith(b"\x89PNG")


def drawn(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, records: list[dict], run: dict) -> list[tuple]:
    """(y label, {curve: values}, y limits) of each panel of loss.png."""
    figures = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: figures.append(figure))
    with MetricsWriter(tmp_path, run, QUIET) as metrics:
        for record in records:
            metrics.write(record["tokens"], **record)
    plot_loss(tmp_path)
    return [
        (
            axes.get_ylabel(),
            {line.get_label().split()[0]: [float(value) for value in line.get_ydata()] for line in axes.lines},
            axes.get_ylim(),
        )
        for axes in figures[0].axes
    ]


def test_training_and_validation_of_a_task_are_the_same_quantity(tmp_path, monkeypatch) -> None:
    records = [
        {"tokens": 0, "split": "validation", "loss": 0.7, "accuracy": 0.5, "macro_f1": 0.4},
        {"tokens": 10, "split": "train", "loss": 3.5, "task_loss": 0.5},
        {"tokens": 20, "split": "validation", "loss": 0.4, "accuracy": 0.9, "macro_f1": 0.8},
    ]
    run = RUN | {"config": {"evaluation": {"metric": "loss"}}}
    (label, curves, _), (metric, metrics, _) = drawn(monkeypatch, tmp_path, records, run)
    assert (label, curves) == ("loss of the task", {"train": [0.5], "validation": [0.7, 0.4]})
    assert (metric, metrics) == ("accuracy", {"validation": [0.5, 0.9]})
    run = RUN | {"config": {"evaluation": {"metric": "macro_f1"}}}
    assert drawn(monkeypatch, tmp_path, records, run)[1][0] == "macro f1"


def test_a_policy_is_plotted_by_its_reward(tmp_path, monkeypatch) -> None:
    records = [
        {"tokens": 0, "split": "validation", "reward": 0.1, "kl": 0.0},
        {"tokens": 0, "split": "rollout", "reward": 0.2, "kl": 0.0},
        {"tokens": 10, "split": "train", "loss": -0.03},
        {"tokens": 10, "split": "rollout", "reward": 0.4, "kl": 1.0},
    ]
    ((label, curves, _),) = drawn(monkeypatch, tmp_path, records, RUN)
    assert label.startswith("reward")
    assert curves == {"train": [0.2, 0.4], "validation": [0.1]}


def test_the_steep_start_does_not_squash_the_rest(tmp_path, monkeypatch) -> None:
    losses = {0: 10.8, 50: 7.0, 200: 4.0, 500: 3.8, 1000: 3.7}
    records = [
        {"tokens": tokens, "split": "validation", "loss": loss, "perplexity": 1.0} for tokens, loss in losses.items()
    ]
    ((label, _, (low, high)),) = drawn(monkeypatch, tmp_path, records, RUN)
    assert label == "loss (nats per token)"
    assert 3.6 < low < 3.7 < 4.0 < high < 4.1
    assert limits_without_start([(0, 2.0), (500, 1.5), (1000, 1.0)]) is None
    assert limits_without_start([(0, 2.0), (1000, 1.0)]) is None
    assert limits_without_start([]) is None


def test_a_run_without_records_has_an_empty_plot(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, RUN, QUIET).close()
    assert plot_loss(tmp_path).exists()


def test_the_file_is_json_lines_for_any_reader(tmp_path: Path) -> None:
    train(tmp_path, range(1, 4))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert all(isinstance(json.loads(line, parse_constant=pytest.fail), dict) for line in lines)


def test_callbacks_get_each_record_as_it_is_written(tmp_path: Path) -> None:
    got: list[dict] = []
    with MetricsWriter(tmp_path, RUN, QUIET, callbacks=[got.append]) as metrics:
        metrics.write(1, 100, "train", loss=9.5)
        metrics.write(2, 200, "train", loss=math.inf)
        assert metrics.seconds == got[-1]["seconds"]
    assert got == read_metrics(tmp_path)[1]


def test_seconds_continue_where_a_run_resumes(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, RUN, QUIET) as metrics:
        metrics.write(1, 100, "train", loss=9.5)
    path = tmp_path / "metrics.jsonl"
    path.write_text(re.sub(r'"seconds": [\d.]+', '"seconds": 500.0', path.read_text()))
    with MetricsWriter(tmp_path, RUN, QUIET, resume_step=1) as metrics:
        metrics.write(2, 200, "train", loss=9.0)
    first, second = (record["seconds"] for record in read_metrics(tmp_path)[1])
    assert first == 500.0
    assert 500.0 <= second < 1500.0
