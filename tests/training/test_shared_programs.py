"""Runs of one process share their compiled programs, and nothing else."""

import dataclasses
import gc

import jax
import pytest

from gptjax.config import computation, replace
from gptjax.run import run
from gptjax.stages import registry
from gptjax.training.metrics_file import read_metrics
from gptjax.training.step import step_programs
from tests.tiny_runs import tiny_config

ELSEWHERE = {
    "batch": {"total_tokens": 4 * 128},
    "evaluation": {"every_tokens": None, "sample_prompt": "A"},
    "checkpoint": {"every_tokens": 128},
    "logging": {"every_steps": 2},
    "optimizer": {"schedule": "constant"},
}


def losses(workdir) -> list[float]:
    return [record["loss"] for record in read_metrics(workdir)[1]]


@pytest.mark.slow
def test_a_second_run_compiles_nothing_and_is_as_if_it_were_the_first(tmp_path, capsys):
    for name in "ab":
        (tmp_path / name).mkdir()
    first = replace(tiny_config(tmp_path / "a"), {"optimizer": {"schedule": "constant"}})
    second = replace(tiny_config(tmp_path / "b"), ELSEWHERE)  # other paths, another length, other intervals
    step_programs.cache_clear()
    run(second, tmp_path / "alone")
    step_programs.cache_clear()
    run(first, tmp_path / "first")
    assert "compiled the training step" in capsys.readouterr().out
    gc.collect()
    live = len(jax.live_arrays())
    run(second, tmp_path / "second")
    gc.collect()
    assert len(jax.live_arrays()) <= live  # no parameters of a run that has ended
    assert "reused the training step" in (out := capsys.readouterr().out)
    assert "compiled" not in out
    assert losses(tmp_path / "second") == losses(tmp_path / "alone")


@pytest.mark.parametrize(
    "changes",
    [
        {"model": {"residual_dropout": 0.2}},
        {"optimizer": {"weight_decay": 0.2}},
        {"data": {"objective": "prefix"}},
    ],
)
def test_what_is_computed_decides(tiny, changes):
    config = tiny.completed(257)
    same = registry.objective(replace(config, ELSEWHERE | {"optimizer": {}, "data": {"source": "text:elsewhere/*"}}))
    assert registry.objective(config) == same
    assert registry.objective(config).loss is same.loss
    others = (replace(config, changes), dataclasses.replace(config, seed=1))
    assert all(registry.objective(other) != same for other in others)


def test_what_is_left_out_cannot_be_read(tiny):
    reduced = computation(tiny)
    for section in ("evaluation", "checkpoint", "stability", "logging", "init_from"):
        assert getattr(reduced, section) is None
    assert reduced.data.source is reduced.data.cache_dir is None
    assert reduced.batch.total_tokens is None
