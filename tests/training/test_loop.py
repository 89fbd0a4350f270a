"""Runs from start to end: their files; stopping and resuming changes no bit."""

import contextlib
import dataclasses
import io
import re
import shutil
import sys
from itertools import islice
from logging import makeLogRecord
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from absl import logging

from gptjax.config import Config, UserError, replace
from gptjax.data import tokenizers
from gptjax.parallel.mesh import make_mesh
from gptjax.run import RunReport, dry_run, run
from gptjax.scaling.flops import flops_per_token
from gptjax.stages import pretrain
from gptjax.stages.builders import BUILDERS, build
from gptjax.training.metrics_file import read_metrics
from tests.tiny_tasks import run_config, with_method


def saved(workdir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint, by item and path."""
    manager = ocp.CheckpointManager(workdir.absolute() / "checkpoints")
    items = {name: ocp.args.StandardRestore() for name in ("params", "ema", "train")}
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(**items))
    leaves = jax.tree_util.tree_leaves_with_path(dict(restored.items()))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def steps(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdigit())


def records(workdir: Path, split: str) -> list[dict]:
    """Without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(workdir)[1] if r["split"] == split]


def train_and_die(config: Config, workdir: Path, microbatches: int, monkeypatch) -> None:
    """Trains until the data source breaks."""

    def build(*args):
        stage = pretrain.build(*args)

        def broken(start: int, run):
            yield from islice(stage.batches(start, run), microbatches)
            raise ConnectionError("the data is gone")

        return dataclasses.replace(stage, batches=broken)

    with monkeypatch.context() as patch:
        patch.setitem(BUILDERS, "pretrain", build)
        with pytest.raises(ConnectionError):
            run(config, workdir)


@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        pytest.param({"name": "muon", "first_moment_dtype": "bfloat16"}, marks=pytest.mark.slow),
        pytest.param(
            {"name": "adafactor", "min_factored_dim": 8, "first_moment_dtype": "bfloat16"}, marks=pytest.mark.slow
        ),
    ],
)
def test_stop_restore_train_on_equals_uninterrupted(optimizer, tiny, tmp_path, monkeypatch):
    config = replace(tiny, {"checkpoint": {"every_tokens": 3 * 128, "keep_last": 2}, "optimizer": optimizer})
    run(config, tmp_path / "whole")
    if optimizer:  # the state of a process that dies in step 6 before it saves
        shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
        shutil.rmtree(tmp_path / "resumed" / "checkpoints" / "6")
    else:
        train_and_die(config, tmp_path / "resumed", 11, monkeypatch)  # in the middle of step 6
    assert steps(tmp_path / "resumed") == [3]
    assert max(r["step"] for r in records(tmp_path / "resumed", "train")) > 3  # will be done again
    run(config, tmp_path / "resumed")
    whole, resumed = saved(tmp_path / "whole"), saved(tmp_path / "resumed")
    assert whole.keys() == resumed.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, resumed[name], err_msg=name)
    for split in ("train", "validation"):
        assert records(tmp_path / "whole", split) == records(tmp_path / "resumed", split)


@dataclasses.dataclass(frozen=True)
class Finished:
    """A run that nobody may change."""

    config: Config
    workdir: Path
    report: RunReport
    output: str


@pytest.fixture(scope="module")
def whole(make_tiny, tmp_path_factory) -> Finished:
    directory = tmp_path_factory.mktemp("whole")
    config = make_tiny(directory)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        report = run(config, directory / "run")
    return Finished(config, directory / "run", report, output.getvalue())


@pytest.fixture
def finished(whole, tmp_path) -> Finished:
    """A copy of a run."""
    return dataclasses.replace(whole, workdir=shutil.copytree(whole.workdir, tmp_path / "run"))


def test_a_run_writes_its_workdir(whole):
    report, workdir = whole.report, whole.workdir
    header, _ = read_metrics(workdir)
    assert header["parameters"] == sum(a.size for name, a in saved(workdir).items() if name.startswith("['params']"))
    train, validation = records(workdir, "train"), records(workdir, "validation")
    assert [(r["step"], r["tokens"]) for r in train] == [(i, 128 * i) for i in range(1, 7)]
    assert [r["step"] for r in validation] == [0, 2, 4, 6]
    assert validation[-1]["loss"] < validation[0]["loss"] == pytest.approx(np.log(257), abs=0.1)
    assert validation[-1]["perplexity"] == pytest.approx(np.exp(validation[-1]["loss"]))
    documents = sorted((workdir.parent / "text").iterdir())
    held_out = sum(path.stat().st_size for path in documents[9::10])
    tokens_per_byte = (held_out + 4) / held_out  # a token a byte, and an end-of-text for each of the 4
    bits = validation[0]["loss"] / np.log(2) * tokens_per_byte
    assert validation[0]["bits_per_byte"] == pytest.approx(bits, rel=1e-9)
    assert report.validation["loss"] == validation[-1]["loss"]
    assert all(np.isfinite(r["grad_norm"]) and r["learning_rate"] > 0 for r in train)
    for name in ("config.json", "loss.png", "tokenizer/spec.json", "samples/step_00000006.txt"):
        assert (workdir / name).stat().st_size > 0, name
    assert tokenizers.load(workdir / "tokenizer").vocab_size == 257
    assert "trained on 768 tokens in 6 steps" in whole.output
    assert report.sample in whole.output


def test_log_lines_do_not_cut_through_the_progress_bar(tiny, tmp_path, capsys, monkeypatch):
    handler = logging.get_absl_handler().python_handler
    monkeypatch.setattr(handler, "stream", sys.stderr)  # the handler is of the process, and capsys of this test
    line = makeLogRecord({"msg": "a library's line", "levelno": 30, "created": 0.0})
    run(tiny, tmp_path / "run", callbacks=[lambda _: handler.handle(line)])
    assert handler.filters == []
    shown = capsys.readouterr().err
    assert "tokens [" in shown
    assert shown.count("a library's line") == 10
    for before_line in shown.split("a library's line")[:-1]:
        assert "%" not in before_line.rpartition("\r")[2].rpartition("\n")[2]


def test_a_finished_run_reports_again_and_trains_no_further(finished):
    before = saved(finished.workdir)
    written = (finished.workdir / "metrics.jsonl").read_text()
    assert run(finished.config, finished.workdir).validation == finished.report.validation
    assert (finished.workdir / "metrics.jsonl").read_text() == written
    after = saved(finished.workdir)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_keeps_the_newest_and_the_best(tiny, tmp_path):
    config = replace(tiny, {"optimizer": {"schedule": "constant", "peak_lr": 30.0, "ema_decay": None}})  # gets worse
    run(config, tmp_path / "run")
    losses = {r["step"]: r["loss"] for r in records(tmp_path / "run", "validation") if r["step"] > 0}
    best = min(losses, key=losses.get)
    assert best != 6
    assert steps(tmp_path / "run") == [best, 6]


def test_the_compute_that_is_described_is_what_mfu_counts(pretrained, tmp_path):
    config = with_method(run_config(tmp_path, "classification", pretrained), "head")
    (total,) = re.findall(r"^compute +.* per token, ([\d.e+]+) FLOP in total$", dry_run(config, tmp_path / "run"), re.M)
    stage = build(config, make_mesh(config.mesh), None)
    counted = stage.objective.parameters.flops_per_token
    assert float(total) == pytest.approx(counted * stage.total_tokens, rel=5e-3)
    assert counted < 0.8 * flops_per_token(stage.config.model)


def test_a_mixture_is_described_with_its_active_parameters(tiny, tmp_path):
    """One expert of four in each of two layers, and no table of positions."""
    described = dry_run(replace(tiny, {"model": {"num_experts": 4, "experts_per_token": 1}}), tmp_path / "run")
    (found,) = re.findall(r"^parameters +([\d,]+) \(([\d,]+) active\)$", described, re.M)
    total, active = (int(number.replace(",", "")) for number in found)
    expert = 16 * 64 + 64 + 64 * 16 + 16
    assert active == total - 2 * 3 * expert - 16 * 16
    (dense,) = re.findall(r"^parameters +([\d,]+)$", dry_run(tiny, tmp_path / "run"), re.M)
    assert total == int(dense.replace(",", "")) + 2 * (3 * expert + 16 * 4)


def test_a_ramped_batch_uses_one_program(tiny, tmp_path):
    config = replace(tiny, {"batch": {"ramp_start_tokens": 64, "ramp_tokens": 256}})
    run(config, tmp_path / "run")
    tokens = [r["tokens"] for r in records(tmp_path / "run", "train")]
    assert list(np.diff([0, *tokens])) == [64, 64, 64, 64, 128, 128, 128, 128]


def test_another_config_is_refused_or_allowed(finished):
    longer = replace(finished.config, {"batch": {"total_tokens": 7 * 128}})
    with pytest.raises(UserError, match=r"batch\.total_tokens: 768 -> 896"):
        run(longer, finished.workdir)
    assert steps(finished.workdir)[-1] == 6
    assert run(longer, finished.workdir, allow_config_changes=True).step == 7
    deeper = replace(finished.config, {"model": {"num_layers": 4}})
    with pytest.raises(UserError, match=r"model\.num_layers: 2 -> 4"):
        run(deeper, finished.workdir, allow_config_changes=True)
    retokenised = replace(finished.config, {"data": {"tokenizer": "bpe:300"}})
    with pytest.raises(UserError, match=r"data\.tokenizer=bytes.* not bpe:300"):
        run(retokenised, finished.workdir, allow_config_changes=True)


def test_init_from_starts_at_the_other_runs_average(whole, tmp_path):
    config = replace(whole.config, {"evaluation": {"sample_tokens": 0}})
    second = dataclasses.replace(config, init_from=str(whole.workdir))
    run(second, tmp_path / "second")
    start = records(tmp_path / "second", "validation")[0]
    assert (start["step"], start["tokens"]) == (0, 0)
    assert start["loss"] == pytest.approx(whole.report.validation["loss"], abs=1e-6)
    with pytest.raises(UserError, match=r"another model: model\.num_layers: 2 -> 4"):
        run(replace(second, {"model": {"num_layers": 4}}), tmp_path / "third")
    with pytest.raises(UserError, match="another tokenizer"):
        run(replace(second, {"data": {"tokenizer": "bpe:300"}}), tmp_path / "third")
    with pytest.raises(UserError, match="not a workdir"):
        run(dataclasses.replace(config, init_from=str(tmp_path)), tmp_path / "third")


def test_a_disk_without_room_stops_before_writing(finished, monkeypatch):
    before = saved(finished.workdir)
    monkeypatch.setattr("gptjax.checkpoint.manager.free_bytes", lambda directory: 1000)
    longer = replace(finished.config, {"batch": {"total_tokens": 9 * 128}})
    with pytest.raises(UserError, match=r"no room for a checkpoint .* the last good checkpoint is step 6"):
        run(longer, finished.workdir, allow_config_changes=True)
    after = saved(finished.workdir)
    assert all(np.array_equal(before[name], after[name]) for name in before)
