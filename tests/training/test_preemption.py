"""A run that is asked to stop loses nothing: the resumed run equals one that was never stopped."""

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import Config, replace
from gptjax.distributed import processes
from gptjax.distributed.peers import Boundaries
from gptjax.distributed.preemption import PreemptedError
from gptjax.run import run
from tests.tiny_tasks import write_config
from tests.training.test_loop import records, saved, steps

ROOT = Path(__file__).parents[2]


def stop_at(boundary: int, config: Config, workdir: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Trains until a boundary; what is said there."""
    monkeypatch.setattr(processes, "_boundaries", boundaries := Boundaries())
    boundaries.decide(boundary, "SIGTERM")
    with pytest.raises(PreemptedError) as request:
        run(config, workdir)
    monkeypatch.setattr(processes, "_boundaries", Boundaries())
    return str(request.value)


@pytest.mark.slow
def test_stopped_anywhere_it_goes_on_as_if_undisturbed(tiny, tmp_path, monkeypatch):
    # 4 batches an evaluation; before step 1 there are 4 boundaries, and one after every step.
    config = replace(tiny, {"batch": {"ramp_start_tokens": 64, "ramp_tokens": 256}, "logging": {"every_steps": 3}})
    run(config, tmp_path / "whole")
    workdir = tmp_path / "stopped"
    assert stop_at(5, config, workdir, monkeypatch) == "SIGTERM, step 1 is saved"
    # Then after step 2, and at the second batch of the evaluation due at step 4, made up for when it resumes.
    assert stop_at(1, config, workdir, monkeypatch) == "SIGTERM, step 2 is saved"
    assert stop_at(1 + 2, config, workdir, monkeypatch) == "SIGTERM, step 4 is saved"
    monkeypatch.setattr(processes, "_boundaries", Boundaries())
    run(config, workdir)
    whole, stopped = saved(tmp_path / "whole"), saved(workdir)
    assert whole.keys() == stopped.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, stopped[name], err_msg=name)
    for split in ("train", "validation"):
        assert records(tmp_path / "whole", split) == records(workdir, split)


# A command in which something takes for ever, as long as it would on a busy machine.
HANGING = """
import runpy, threading
from {module} import {name}

{name}.{function} = lambda *_, **__: threading.Event().wait()
runpy.run_module("gptjax.main", run_name="__main__", alter_sys=True)
"""


def start(config: Config, workdir: Path, *program: str) -> subprocess.Popen[str]:
    """`python -m gptjax.main`, or another program that runs it, with a config as it is."""
    file = write_config(workdir.with_suffix(".py"), config)
    program = program or ("-m", "gptjax.main")
    command = [sys.executable, *program, f"--config={file}", f"--workdir={workdir}"]
    return subprocess.Popen(
        command, cwd=ROOT, env={**os.environ}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def wait_for(text: str, process: subprocess.Popen[str]) -> None:
    assert process.stdout is not None
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(process.communicate())


@pytest.mark.slow
def test_signals_end_the_command_with_their_exit_codes(tiny, tmp_path):
    long = replace(tiny, {"batch": {"total_tokens": 10**8}, "evaluation": {"every_tokens": None}})
    long = replace(long, {"checkpoint": {"every_tokens": None}})
    workdir = tmp_path / "run"
    process = start(long, workdir)
    wait_for("compiled the training step", process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert err.splitlines()[-1].startswith("stopped by SIGTERM, step ")
    assert err.splitlines()[-1].endswith(" is saved: the same command resumes")
    assert "Traceback" not in err
    (step,) = (int(path.name) for path in (workdir / "checkpoints").iterdir())
    last = json.loads((workdir / "metrics.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["split"]) == (step, "train")

    # Before the first step there is nothing to save: it does not wait for one.
    compiling = HANGING.format(module="gptjax.parallel", name="compiler", function="compile")
    process = start(long, workdir, "-c", compiling)
    wait_for("parameters ", process)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 75, err
    assert err.splitlines()[-1] == "stopped by SIGINT, with nothing to save: run the same command to start again"


@pytest.mark.slow
def test_a_second_signal_ends_the_command_at_once(tiny, tmp_path):
    long = replace(tiny, {"batch": {"total_tokens": 10**8}, "evaluation": {"every_tokens": None}})
    saving = HANGING.format(module="gptjax.checkpoint.manager", name="Checkpoints", function="save")
    process = start(replace(long, {"checkpoint": {"every_tokens": None}}), tmp_path / "run", "-c", saving)
    wait_for("compiled the training step", process)
    process.send_signal(signal.SIGSTOP)  # both are there when it wakes up
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGCONT)
    _, err = process.communicate()
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted"


@pytest.mark.slow
def test_a_lost_terminal_stops_the_command_with_all_saved(tiny, tmp_path):
    long = replace(tiny, {"batch": {"total_tokens": 10**8}, "evaluation": {"every_tokens": None}})
    long = replace(long, {"checkpoint": {"every_tokens": None}})
    file = write_config(tmp_path / "run.py", long)
    terminal, other_end = pty.openpty()
    # The first terminal that the leader of a session opens controls it.
    script = "import os, sys\nfor _ in range(3): os.dup2(os.open(sys.argv[1], os.O_RDWR), _)\n"
    script += "os.execv(sys.executable, [sys.executable, *sys.argv[2:]])"
    command = ["-m", "gptjax.main", f"--config={file}", f"--workdir={tmp_path / 'run'}"]
    process = subprocess.Popen(
        [sys.executable, "-c", script, os.ttyname(other_end), *command], cwd=ROOT, start_new_session=True
    )
    shown = b""
    while b"compiled the training step" not in shown:
        shown += os.read(terminal, 1000)  # OSError when the process has ended
    os.close(other_end)
    os.close(terminal)  # the kernel sends SIGHUP, and writing to the terminal fails from here on
    assert process.wait() == 75
    (step,) = steps(tmp_path / "run")
    assert records(tmp_path / "run", "train")[-1]["step"] == step


def test_the_best_checkpoint_is_known_after_a_stop(tiny, tmp_path, monkeypatch):
    config = replace(tiny, {"optimizer": {"schedule": "constant", "peak_lr": 30.0, "ema_decay": None}})  # gets worse
    workdir = tmp_path / "run"
    assert "step 5 is saved" in stop_at(4 + 2 + 4 + 2 + 4 + 1, config, workdir, monkeypatch)
    run(config, workdir)
    losses = {r["step"]: r["loss"] for r in records(workdir, "validation") if r["step"] > 0}
    best = min(losses, key=losses.get)
    assert best < 5
    assert steps(workdir) == [best, 6]
