"""Non-finite updates are skipped, spikes are detected, and runs rewind or stop with an explanation."""

import dataclasses
import json
import re
from itertools import islice

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.checkpoint.state import create_state, state_shardings
from gptjax.config import Config, StabilityConfig, UserError, replace
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages import pretrain
from gptjax.stages.builders import BUILDERS, build
from gptjax.training import loop
from gptjax.training.debug_bundles import load_bundle
from gptjax.training.loss_monitor import LossMonitor, LossSpike, NotFinite
from gptjax.training.metrics_file import read_metrics
from gptjax.training.step import make_train_step


def with_bad_examples(monkeypatch, first: int, stop: int, factor: float) -> None:
    """The loss of the examples [first, stop) of the data is multiplied, by way of their weights."""

    def changed_build(*args):
        stage = pretrain.build(*args)
        size = stage.config.sequences_per_microbatch

        def batches(start: int, run):
            for number, batch in enumerate(stage.batches(start, run)):
                begin = start + number * size
                bad = np.full_like(batch.arrays["weights"], factor if first <= begin < stop else 1.0)
                yield batch._replace(arrays=batch.arrays | {"bad": bad})

        def loss(params, batch, rng):
            total, *rest = stage.objective.loss(params, batch, rng)
            return total * jnp.max(batch["bad"]), *rest

        return dataclasses.replace(
            stage, batches=batches, objective=dataclasses.replace(stage.objective, stage_loss=loss)
        )

    monkeypatch.setitem(BUILDERS, "pretrain", changed_build)


def records(workdir, split: str) -> list[dict]:
    clock = ("seconds", "tokens_per_second", "mfu")
    return [{k: v for k, v in r.items() if k not in clock} for r in read_metrics(workdir)[1] if r["split"] == split]


# --- the monitor ------------------------------------------------------------------------------------------------------


def test_a_spike_is_the_first_of_high_losses_after_a_full_window():
    config = StabilityConfig(spike_deviations=4.0, spike_window=8)
    monitor = LossMonitor(config)
    losses = [9.0, 3.1, 3.0, 2.9, 3.0, 3.1, 2.9, 3.0, 3.0, 3.1, 5.0, 5.0, 3.0]
    found = [monitor.add(step, step, loss, 1.0, False) for step, loss in enumerate(losses)]
    assert [step for step, spike in enumerate(found) if spike is not None] == [10]
    assert found[10].usual == pytest.approx(np.mean(losses[2:10]))


def test_a_loss_that_hardly_moves_makes_no_spike_of_little():
    monitor = LossMonitor(StabilityConfig(spike_deviations=4.0, spike_window=8))
    assert [monitor.add(step, step, loss, 1.0, False) for step, loss in enumerate([1.0] * 8 + [1.03])] == [None] * 9


def test_a_monitor_continues_from_its_state():
    config = StabilityConfig(spike_deviations=4.0, spike_window=8, max_skipped_updates=3, on_spike="rewind")
    numbers = [(3.0, False)] * 9 + [(np.nan, True), (np.nan, True), (3.0, False), (9.0, False)]

    def go(restores: bool) -> str:
        monitor = LossMonitor(config)
        for step, (loss, skipped) in enumerate(numbers):
            if restores:
                monitor = LossMonitor(config, json.loads(json.dumps(monitor.state())))
            spike = monitor.add(step, 10 * step, loss, 1.0, skipped)
            if isinstance(spike, LossSpike):
                return f"{spike.step} {spike.examples} {spike.loss} {spike.usual} {monitor.skipped}"
        return "nothing"

    assert go(restores=True) == go(restores=False) == "12 120 9.0 3.0 2"


def test_only_updates_skipped_in_a_row_stop_a_run():
    monitor = LossMonitor(StabilityConfig(max_skipped_updates=2))
    monitor.add(1, 1, np.nan, np.nan, True)
    assert monitor.next_may_stop
    monitor.add(2, 2, 3.0, 1.0, False)
    assert not monitor.next_may_stop
    monitor.add(3, 3, np.nan, np.nan, True)
    problem = monitor.add(4, 4, np.inf, np.nan, True)
    assert isinstance(problem, NotFinite)
    assert "the loss of step 4 is inf" in str(problem)
    monitor.add(5, 5, np.nan, np.nan, True)  # a run that resumes after it has as many again
    assert monitor.skipped == 4


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_an_update_that_is_not_finite_changes_the_step_alone(tiny, bad):
    stage = build(tiny, make_mesh(tiny.mesh), None)
    mesh = make_mesh(tiny.mesh)
    rows = next(stage.batches(0, None)).arrays
    with jax.set_mesh(mesh):
        placement = state_shardings(stage.objective.parameters, mesh)

        def loss(params, batch, rng):
            total, *rest = stage.objective.loss(params, batch, rng)
            # The loss stays finite where only a gradient is not: sqrt' at 0 is infinite.
            total += jnp.sum(jnp.sqrt(params["final_norm"]["bias"])) * (np.isinf(bad)) + (bad if np.isnan(bad) else 0.0)
            return total, *rest

        step = make_train_step(dataclasses.replace(stage.objective, stage_loss=loss), placement)
        state = create_state(stage.objective.parameters, mesh)
        before = jax.device_get(state)
        batch = {name: jnp.stack([array, array]) for name, array in rows.items()}
        state, metrics = step(state, batch, np.int32(2), {"lr": np.float32(1e-2)})
        after = jax.device_get(state)
    assert metrics["skipped"] == 1
    assert bool(np.isfinite(metrics["loss"])) == np.isinf(bad)
    assert not np.isfinite(metrics["grad_norm"])
    assert after.step == before.step + 1
    for name in ("params", "opt_state", "ema", "rng"):
        assert jax.tree.all(jax.tree.map(np.array_equal, getattr(before, name), getattr(after, name))), name


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_skipped_update_is_counted_and_the_run_goes_on(tiny, tmp_path, monkeypatch, capsys):
    with_bad_examples(monkeypatch, 16, 24, np.nan)  # the third of six steps
    run(replace(tiny, {"logging": {"every_steps": 2}}), tmp_path / "run")
    train = records(tmp_path / "run", "train")
    assert [r["skipped_updates"] for r in train] == [0, 1, 1]
    assert all(np.isfinite(r["loss"]) for r in train)  # the mean of a record leaves the skipped step out
    assert "step 3: loss nan, gradient norm nan: the update was skipped" in capsys.readouterr().out


@pytest.mark.slow
def test_many_skipped_updates_stop_the_run_with_a_bundle_that_replays(tiny, tmp_path, monkeypatch):
    config = replace(tiny, {"stability": {"max_skipped_updates": 2}})
    with monkeypatch.context() as patch:
        with_bad_examples(patch, 20, 32, np.nan)  # from the second microbatch of the third step on
        with pytest.raises(UserError, match=r"the loss of step 4 is nan.*: 2 updates in a row") as error:
            run(config, tmp_path / "run")
    bundle = tmp_path / "run" / "debug" / "step_00000004"
    assert f"python -m gptjax.replay --bundle={bundle}" in str(error.value)
    report = json.loads((bundle / "report.json").read_text())
    assert [numbers["loss"] for numbers in report["microbatches"]] == ["nan", "nan"]
    assert report["norms"]["layers/1/mlp/up/kernel"]["not_finite"] == 16 * 64
    step, batch = load_bundle(bundle)
    assert step == 4
    monkeypatch.undo()
    whole = next(build(tiny, make_mesh(tiny.mesh), None).batches(24, None)).arrays
    np.testing.assert_array_equal(batch["tokens"][0], whole["tokens"])
    # The data that follows is good: the same command resumes, from the state before the first skipped update.
    assert run(config, tmp_path / "run").step == 6
    assert [r["skipped_updates"] for r in records(tmp_path / "run", "train")] == [0, 0, 1, 2, 2]


@pytest.mark.slow
def test_a_run_goes_back_before_a_spike_and_passes_over_its_data(tiny, tmp_path, monkeypatch, capsys):
    settings = {"spike_deviations": 6.0, "spike_window": 8, "on_spike": "rewind", "rewind_batches": 1}
    sections = {
        "stability": settings,
        "batch": {"total_tokens": 16 * 128},
        "checkpoint": {"every_tokens": 4 * 128},
    }
    config = replace(tiny, sections)
    with_bad_examples(monkeypatch, 80, 88, 100.0)  # step 11
    run(config, tmp_path / "run")
    assert re.search(r"the loss of step 11 is \d+\.\d+, after \d\.\d+: back to step 8", capsys.readouterr().out)
    (rewind,) = records(tmp_path / "run", "rewind")
    # Passed over: the steps 9, 10 and 11, and one batch more.
    assert (rewind["step"], rewind["spike_step"], rewind["skipped_examples"]) == (9, 11, 4 * 8)
    assert [r["step"] for r in records(tmp_path / "run", "train")] == list(range(1, 17))
    # As if the data had never had them: from the checkpoint on the examples are those after the spike.
    monkeypatch.undo()

    def changed_build(*args):
        stage = pretrain.build(*args)

        def batches(start: int, run):
            assert start == 0
            yield from islice(stage.batches(0, run), 64 // stage.config.sequences_per_microbatch)
            yield from stage.batches(64 + 32, run)

        return dataclasses.replace(stage, batches=batches)

    monkeypatch.setitem(BUILDERS, "pretrain", changed_build)
    run(replace(config, {"stability": {"spike_deviations": None}}), tmp_path / "other")
    assert [r["loss"] for r in records(tmp_path / "run", "train")] == [
        r["loss"] for r in records(tmp_path / "other", "train")
    ]


@pytest.mark.slow
def test_spikes_that_come_again_stop_the_run(tiny, tmp_path, monkeypatch):
    settings = {"spike_deviations": 6.0, "spike_window": 8, "on_spike": "rewind", "rewind_batches": 0}
    with_bad_examples(monkeypatch, 80, 10**6, 100.0)
    config: Config = replace(tiny, {"stability": settings, "batch": {"total_tokens": 16 * 128}})
    with pytest.raises(UserError, match=rf"it spiked {loop.MAX_REWINDS + 1} times after checkpoint 10"):
        run(config, tmp_path / "run")
