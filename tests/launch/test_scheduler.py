"""The scheduler of a sweep, on an engine that trains nothing; the division of a machine."""

import json
import os
import signal

import pytest

from gptjax.config import UserError
from gptjax.distributed.preemption import PreemptedError
from gptjax.launch import attempts, local, scheduler
from gptjax.launch.members import make_members


class FakeEngine:
    """Members end at the next call, with the exit codes that are given for each attempt."""

    detached = False

    def __init__(self, codes, room=2):
        self.codes, self._room, self._running, self.started = codes, room, {}, []

    def room(self):
        return self._room - len(self._running)

    def start(self, member):
        self.started.append(member.name)
        self._running[member.name] = self.codes.get(member.name, [0]).pop(0)
        return True

    def ended(self):
        ended, self._running = self._running, {}
        return ended

    def stop(self, name):
        self._running[name] = 75

    def kill(self):
        raise AssertionError


@pytest.fixture
def members(tmp_path):
    return make_members("configs/gpt2.py:runlocal", {}, [{"seed": seed} for seed in range(4)], tmp_path)


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(scheduler, "POLL_SECONDS", 0.001)


def run(members, engine, retries=2):
    lines = []
    found = scheduler.Scheduler(engine, retries, lines.append)
    found.add(members)
    found.run()
    return found, lines


def test_failures_are_retried_and_do_not_stop_others(members):
    engine = FakeEngine({"seed=0": [-9, 1, 0], "seed=1": [2], "seed=2": [1, 1, 1], "seed=3": [0]})
    found, lines = run(members, engine)
    assert found.failed == {"seed=1": 2, "seed=2": 1}  # a user error is not retried
    assert sorted(engine.started) == ["seed=0"] * 3 + ["seed=1"] + ["seed=2"] * 3 + ["seed=3"]
    assert any("seed=0 killed by SIGKILL: retry 1 of 2" in line for line in lines)
    assert any(line.startswith("[4/4] ") for line in lines)


def test_a_preempted_member_is_resumed_without_counting(members):
    engine = FakeEngine({"seed=0": [75] * 5 + [0]})
    found, _ = run(members[:1], engine, retries=0)
    assert not found.failed
    assert engine.started == ["seed=0"] * 6


def test_members_that_are_done_are_not_started(members):
    done = members[1].workdir
    done.mkdir(parents=True)
    attempts.record(done, 0)
    assert attempts.recorded(done) is None  # the status alone, without a run
    (done / "metrics.jsonl").touch()
    engine = FakeEngine({})
    run(members, engine)
    assert engine.started == ["seed=0", "seed=2", "seed=3"]


def test_a_member_that_is_dropped_is_stopped_and_has_not_failed(members):
    engine = FakeEngine({}, room=1)
    found = scheduler.Scheduler(engine, 0, lambda line: None)
    found.add(members[:2])
    found._engine.ended = dict  # the first one runs on
    found.step()
    found.drop("seed=0")
    found.drop("seed=1")  # has not been started
    del found._engine.ended
    found.run()
    assert engine.started == ["seed=0"]
    assert not found.failed
    assert found.is_over("seed=0")


def test_a_request_to_stop_is_passed_on(members):
    engine = FakeEngine({})
    real_stop = engine.stop
    stopped = []

    def ask():
        if not stopped:
            os.kill(os.getpid(), signal.SIGTERM)
        engine.ended = dict
        return {}

    def stop(name):
        stopped.append(name)
        real_stop(name)
        engine.ended = lambda: FakeEngine.ended(engine)

    engine.ended, engine.stop = ask, stop
    with pytest.raises(PreemptedError, match="SIGTERM"):
        run(members, engine)
    assert stopped == ["seed=0", "seed=1"]


def test_a_machine_is_divided_evenly(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(10)), raising=False)
    monkeypatch.setattr(local, "accelerators", lambda: ("", []))
    assert [slot.cpus for slot in local.slots(3, 9)] == ["0,1,2", "3,4,5", "6,7,8"]
    assert len(local.slots(None, 9)) == 2
    assert len(local.slots(8, 3)) == 3
    assert [slot.cpus for slot in local.slots(12, 12)][-2:] == ["0", "1"]
    monkeypatch.setattr(local, "accelerators", lambda: ("CUDA_VISIBLE_DEVICES", ["2", "3"]))
    assert [slot.environment for slot in local.slots(None, 9)] == [{"CUDA_VISIBLE_DEVICES": n} for n in "23"]
    assert local.slots(1, 9)[0].environment == {}
    shared = local.slots(4, 9)
    assert [slot.environment["CUDA_VISIBLE_DEVICES"] for slot in shared] == ["2", "3", "2", "3"]
    assert shared[0].environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.450"
    monkeypatch.setattr(local, "accelerators", lambda: ("TPU_VISIBLE_CHIPS", ["0", "1", "2", "3"]))
    assert local.slots(4, 9)[1].environment["TPU_VISIBLE_CHIPS"] == "1"
    with pytest.raises(UserError, match="--processes=2 for 4 TPU chips"):
        local.slots(2, 9)
    with pytest.raises(UserError, match="--processes=8, but a TPU chip runs one process"):
        local.slots(8, 9)


def test_accelerators_are_found_without_jax(tmp_path, monkeypatch):
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia10"):
        (tmp_path / name).touch()
    assert local.accelerators(tmp_path) == ("", [])  # JAX_PLATFORMS=cpu
    monkeypatch.delenv("JAX_PLATFORMS")
    assert local.accelerators(tmp_path) == ("CUDA_VISIBLE_DEVICES", ["0", "1", "10"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert local.accelerators(tmp_path) == ("CUDA_VISIBLE_DEVICES", ["1"])


def test_the_status_of_an_attempt(tmp_path):
    (tmp_path / "metrics.jsonl").touch()
    assert attempts.recorded(tmp_path) is None
    attempts.record(tmp_path, -9)
    assert attempts.recorded(tmp_path) == -9
    attempts.forget(tmp_path)
    (tmp_path / "sweep_status.json").write_text(json.dumps([1]))
    assert attempts.recorded(tmp_path) is None
