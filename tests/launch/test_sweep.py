"""A sweep of real runs whose worker and driver are killed; runs that fail; the other engines."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from gptjax import config as c
from gptjax.checkpoint.lock import is_held_here, wait_until_free
from gptjax.launch import attempts, on_ray
from gptjax.launch.members import make_members, read_sweep
from gptjax.launch.sweep_report import write_tables
from tests.commands import Command, processes_of, run_command, start_command

LIMIT = 1000  # seconds, in which what hangs is found out
FILE = """
import json, sys, time
from pathlib import Path
from gptjax import config as c
from gptjax.distributed import preemption
from gptjax.launch import grid

def get_config():
    with open({path!r}) as file:
        return c.resolve(json.load(file))

def sweep():
    return grid.values("seed", range(2))

def sweep_bad():
    return [{{"data.source": "text:/nowhere"}}]

check, hold = preemption.check, Path({hold!r})

def check_and_hold():
    check()
    (workdir,) = (Path(flag.partition("=")[2]) for flag in sys.argv if flag.startswith("--workdir="))
    while hold.exists() and any(path.name.isdecimal() for path in workdir.glob("checkpoints/*")):
        time.sleep(0.02)
        check()

if "--start_over" in sys.argv:  # a member: it stays at its first checkpoint, like a long run
    preemption.check = check_and_hold
"""


@pytest.fixture
def config_file(tiny, tmp_path) -> str:
    """A config file of tiny runs, of 40 steps with a checkpoint every 8."""
    tokens = tiny.batch.tokens_per_batch
    changes = {
        "batch": {"total_tokens": 40 * tokens},
        "evaluation": {"every_tokens": 20 * tokens, "sample_tokens": 0},
        "checkpoint": {"every_tokens": 8 * tokens},
    }
    tiny = c.replace(tiny, changes)
    (tmp_path / "config.json").write_text(c.to_json(tiny))
    (tmp_path / "own.py").write_text(FILE.format(path=str(tmp_path / "config.json"), hold=str(tmp_path / "hold")))
    return str(tmp_path / "own.py")


def wait_for(command: Command, condition) -> None:
    deadline = time.monotonic() + LIMIT
    while not condition():
        assert command.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)


def checkpoints(workdir: Path) -> int:
    return len([path for path in workdir.glob("checkpoints/*") if path.name.isdecimal()])


@pytest.mark.slow
def test_a_sweep_whose_worker_and_driver_are_killed_has_the_same_table(config_file, tmp_path):
    from gptjax.run import run

    sweep = [f"--config={config_file}", f"--workdir={tmp_path / 'sweep'}", "--processes=1"]
    first, second = make_members(config_file, {}, read_sweep(config_file, []), tmp_path / "sweep")
    (tmp_path / "hold").touch()
    driver = start_command("gptjax.sweep", *sweep)
    wait_for(driver, lambda: checkpoints(first.workdir) > 0)
    os.kill(json.loads((first.workdir / "run.lock").read_text())["pid"], signal.SIGKILL)
    wait_for(driver, lambda: checkpoints(second.workdir) > 0)  # the others run before a retry
    driver.kill()
    driver.close()
    assert attempts.recorded(first.workdir) == -signal.SIGKILL
    wait_until_free(second.workdir)  # the worker that lost its driver has saved
    assert not is_held_here(second.workdir)
    (tmp_path / "hold").unlink()

    result = run_command("gptjax.sweep", *sweep)
    assert result.returncode == 0, result.stderr
    for member in (first, second):
        assert member.log.read_text().count("resuming from step") == 1
        assert attempts.recorded(member.workdir) == 0

    undisturbed = make_members(config_file, {}, read_sweep(config_file, []), tmp_path / "undisturbed")
    for member in undisturbed:
        run(member.config, member.workdir)
    assert write_tables(tmp_path / "undisturbed", undisturbed, {}) == result.stdout
    for name in ("table.txt", "table.csv"):
        assert (tmp_path / "sweep" / name).read_bytes() == (tmp_path / "undisturbed" / name).read_bytes()


def test_runs_that_fail_are_named_with_their_logs(config_file, tmp_path):
    result = run_command(
        "gptjax.sweep", f"--config={config_file}", "--sweep=bad", f"--workdir={tmp_path / 'sweep'}", "--processes=1"
    )
    assert result.returncode == 2, result.stderr
    assert "1 of 1 runs failed" in result.stderr
    last = result.stderr.splitlines()[-1]
    assert "source=text-nowhere: exit code 2: error: data.source" in last
    assert last.endswith(f"({tmp_path}/sweep/source=text-nowhere/log.txt)")
    assert not (tmp_path / "sweep" / "table.txt").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--workdir={directory}/x"], "needs --config=FILE and --workdir=DIR"),
        (["--config=configs/gpt2.py", "--workdir={directory}"], "something other than a sweep"),
        (["--config=configs/gpt2.py", "--workdir={directory}/x", "--sweep=rate"], "sweep_rate(): did you mean"),
        (["--config=configs/gpt2.py", "--workdir={directory}/x", "--resources=num_cpus=1"], "--resources is for"),
        (["--config=configs/gpt2.py", "--workdir={directory}/x", "--search=", "--sweep=lr"], "drop --sweep"),
        (["--config=configs/gpt2.py", "--workdir={directory}/x", "--pruner=asha"], "--pruner: only a search has"),
    ],
)
def test_bad_flags_are_one_line_and_write_nothing(flags, words, tmp_path):
    (tmp_path / "a_file").touch()
    given = [flag.format(directory=tmp_path) for flag in flags]
    if not any("--sweep" in flag for flag in given):
        given.append("--sweep=lr")
    result = run_command("gptjax.sweep", *given)
    assert result.returncode == 2
    assert words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_the_runs_of_a_sweep_can_be_listed(tmp_path):
    result = run_command(
        "gptjax.sweep", "--config=configs/gpt2.py:runlocal", "--sweep=seed", f"--workdir={tmp_path / 'x'}", "--list"
    )
    assert result.stdout.splitlines()[1] == "seed=1 --config=configs/gpt2.py:runlocal --config.seed=1"
    assert list(tmp_path.iterdir()) == []


@pytest.mark.filterwarnings("ignore:os.fork")  # by submitit, before it starts another program
@pytest.mark.filterwarnings("ignore:subprocess")  # a job that has reported its end
def test_slurm_jobs_report_their_exit_codes(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    from gptjax.launch import on_slurm

    monkeypatch.setattr(on_slurm, "ASK_EVERY", 0.1)
    (member,) = make_members("configs/gpt2.py", {}, [{"data.source": "text:/nowhere"}], tmp_path)
    engine = on_slurm.SlurmEngine(tmp_path, {"timeout_min": 5}, cluster="local")
    assert engine.start(member)
    deadline, codes = time.monotonic() + LIMIT, {}
    while not codes and time.monotonic() < deadline:
        codes = engine.ended()
        time.sleep(0.1)
    assert codes == {member.name: 2}
    assert "data.source" in attempts.last_line(member)
    with pytest.raises(c.UserError, match=r"--engine=slurm: .*partitio"):
        on_slurm.SlurmEngine(tmp_path, {"partitio": "x"}, cluster="local")


def test_a_slurm_job_that_is_preempted_before_its_member_has_started_is_queued_again(tmp_path):
    submitit = pytest.importorskip("submitit")
    from gptjax.launch import on_slurm

    job = on_slurm.MemberJob(attempts.Task(str(tmp_path), (), str(tmp_path)))
    assert isinstance(job.checkpoint(), submitit.helpers.DelayedSubmission)


def test_a_request_to_stop_reaches_a_ray_actor_before_its_process_has_started(monkeypatch):
    actor = on_ray.ProcessActor()

    def start(task, environment):
        actor.stop()
        return subprocess.Popen(["sleep", "600"])

    monkeypatch.setattr(attempts, "start_when_free", start)
    assert actor.run(attempts.Task("", (), ""), {}) == -signal.SIGTERM


@pytest.mark.filterwarnings("ignore:os.fork")  # by Ray, before it starts other programs
def test_ray_actors_report_their_exit_codes(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    (member,) = make_members("configs/gpt2.py", {}, [{"data.source": "text:/nowhere"}], tmp_path)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        engine = on_ray.RayEngine({})
        assert engine.start(member)
        deadline, codes = time.monotonic() + LIMIT, {}
        while not codes and time.monotonic() < deadline:
            codes = engine.ended()
            time.sleep(0.1)
        assert codes == {member.name: 2}
        with pytest.raises(c.UserError, match=r"--engine=ray: .*num_cpu"):
            on_ray.RayEngine({"num_cpu": 1})
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:os.fork")  # by Ray, before it starts other programs
def test_a_run_of_several_hosts_resumes_after_one_is_killed(config_file, tmp_path, monkeypatch):
    """Two nodes of Ray on this machine, and a process of the run on each; the process of the second one is killed."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    from gptjax.launch.on_ray import RayEngine
    from gptjax.launch.scheduler import Scheduler

    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    (member,) = make_members(config_file, {}, [{}], tmp_path / "sweep", ["run"])
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    said: list[str] = []
    try:
        cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        ray.init(address=cluster.address, log_to_driver=False)
        scheduler = Scheduler(RayEngine({}, hosts=2), retries=1, say=said.append)
        scheduler.add([member])
        deadline, killed = time.monotonic() + 300, False
        while not scheduler.idle and time.monotonic() < deadline:
            scheduler.step()
            if not killed and checkpoints(member.workdir) > 0:
                (other,) = processes_of("--process_id=1", str(member.workdir))
                os.kill(other, signal.SIGKILL)
                killed = True
            time.sleep(0.05)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert killed
    assert [line.partition(":")[0] for line in said] == ["run exit code 1", "[1/1] run done"]
    header, *records = map(json.loads, (member.workdir / "metrics.jsonl").read_text().splitlines())
    assert header["run"]["processes"] == 2
    assert max(record["step"] for record in records) == 40
    assert "resuming from step" in member.log.read_text()
