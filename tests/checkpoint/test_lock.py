"""Two runs never share a workdir, and the lock of a dead run is taken over."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gptjax.checkpoint import lock
from gptjax.checkpoint.lock import LOCK_FILE, locked
from gptjax.config import UserError
from gptjax.distributed import process_table
from gptjax.run import run

ROOT = Path(__file__).parents[2]
LIMIT = 1000  # seconds; on a busy machine a heartbeat may be late
HOLD = """
import sys
from pathlib import Path
from gptjax.config import UserError
from gptjax.checkpoint import lock

lock.BEAT = 0.1
try:
    with lock.locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except UserError as error:
    print(f"refused: {error}", flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Owners without a heartbeat count as dead soon; tests of one with heartbeats wait for them for LIMIT."""
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "DEAD", 0.5)


def hold(workdir: Path) -> tuple[subprocess.Popen[str], str]:
    """Another process that holds the workdir, or tried to; and what it says."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, workdir],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline()


def left_by(workdir: Path, **changes: object) -> None:
    """A lock that somebody left, like this process's own but for `changes`."""
    workdir.mkdir(exist_ok=True)
    (workdir / LOCK_FILE).write_text(json.dumps(lock._describe() | {"id": "other"} | changes))


def test_the_second_run_refuses_and_names_the_owner(tiny, tmp_path):
    workdir = tmp_path / "run"
    process, said = hold(workdir)
    assert said == "held\n"
    with pytest.raises(UserError, match=rf"is in use by another run, process {process.pid} on \S+, since \d{{4}}-"):
        run(tiny, workdir)
    assert [path.name for path in workdir.iterdir()] == [LOCK_FILE]
    process.communicate("\n")
    assert not workdir.exists()  # it had made it, and nothing came into it
    run(tiny, workdir)
    assert not (workdir / LOCK_FILE).exists()


def test_the_lock_of_a_killed_run_is_recognised(tmp_path, capsys):
    process, _ = hold(tmp_path / "run")
    process.kill()
    process.communicate()
    assert (tmp_path / "run" / LOCK_FILE).exists()
    with locked(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK_FILE).read_text())["pid"] == os.getpid()
    assert f"was left by process {process.pid} on" in capsys.readouterr().err


def test_a_number_that_another_process_has_by_now_is_not_the_owner(tmp_path):
    left_by(tmp_path / "run", started="1")
    with locked(tmp_path / "run"):
        pass


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_zombie_holds_nothing(tmp_path):
    process, _ = hold(tmp_path / "run")
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and its parent has not asked how it ended
    with locked(tmp_path / "run"):
        pass
    process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_a_zombie_is_alive_until_its_threads_have_ended(monkeypatch):
    started, stat = lock._started(os.getpid()), process_table.stat_fields
    for state, alive in (("R", True), ("D", True), ("Z", False), ("X", False)):
        with monkeypatch.context() as patch:
            patch.setattr(
                process_table, "stat_fields", lambda path, state=state: [state] if "/task/" in path else stat(path)
            )
            assert lock._is_alive(os.getpid(), started) is alive


@pytest.mark.parametrize("error", [FileNotFoundError, PermissionError])
def test_an_owner_that_the_kernel_hides_is_alive_while_its_heart_beats(error, tmp_path, monkeypatch):
    process, _ = hold(tmp_path / "run")
    read_text = Path.read_text

    def hide(path: Path, *args: object) -> str:
        if str(path).startswith(f"/proc/{process.pid}/"):
            raise error  # as /proc mounted with hidepid does for processes of other users
        return read_text(path, *args)

    monkeypatch.setattr(Path, "read_text", hide)
    with monkeypatch.context() as patch:
        patch.setattr(lock, "DEAD", LIMIT)
        with pytest.raises(UserError, match=f"in use by another run, process {process.pid}"), locked(tmp_path / "run"):
            pass
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its number is still taken
    with locked(tmp_path / "run"):
        pass
    process.communicate()


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"pid": "x"}'])
def test_the_lock_of_another_machine_or_damaged_is_stale_when_it_is_not_touched(content, tmp_path):
    left_by(tmp_path / "run", host="other", machine="another kernel")
    if content is not None:
        (tmp_path / "run" / LOCK_FILE).write_text(content)
    os.utime(tmp_path / "run" / LOCK_FILE, (time.time() + 10**6,) * 2)  # a clock that is wrong does not matter
    with locked(tmp_path / "run"):
        pass


def test_the_lock_of_another_machine_that_is_touched_holds(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "DEAD", LIMIT)
    left_by(tmp_path / "run", host="other", machine="another kernel")
    path, ended = tmp_path / "run" / LOCK_FILE, threading.Event()
    beating = threading.Thread(target=lock._keep, args=(lock._FileLock(path), json.loads(path.read_text()), ended))
    beating.start()
    try:
        with pytest.raises(UserError, match=r"in use by another run, process \d+ on other"), locked(tmp_path / "run"):
            pass
    finally:
        ended.set()
        beating.join()


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    left_by(tmp_path / "run", started="1")
    started = [hold(tmp_path / "run") for _ in range(3)]
    assert sorted(said.partition(":")[0].strip() for _, said in started) == ["held", "refused", "refused"]
    for process, _ in started:
        process.communicate("\n")


def test_one_that_is_late_does_not_touch_the_lock_of_one_that_was_faster(tmp_path, monkeypatch):
    """Otherwise a third would find none for a moment, and two would run."""
    left_by(tmp_path / "run", started="1")
    path, check_dead, faster, touched = tmp_path / "run" / LOCK_FILE, lock._check_dead, [], []

    def check_and_be_slow(checked: object, *found: object) -> None:
        check_dead(checked, *found)
        if not faster:
            faster.append(hold(tmp_path / "run"))
            assert faster[0][1] == "held\n"

    def watch(name: str):
        original = getattr(Path, name)

        def watched(self: Path, *args: object, **options: object):
            if path in (self, *args):
                touched.append(name)
            return original(self, *args, **options)

        monkeypatch.setattr(Path, name, watched)

    monkeypatch.setattr(lock, "_check_dead", check_and_be_slow)
    for name in ("rename", "replace", "unlink"):
        watch(name)
    with pytest.raises(UserError, match="in use by another run"), locked(tmp_path / "run"):
        pass
    assert touched == []
    faster[0][0].communicate("\n")


@pytest.mark.parametrize("content", [None, ""])
def test_a_claim_whose_owner_was_killed_stops_nobody(content, tmp_path, monkeypatch):
    """A run was killed between claiming the stale lock and removing it."""
    left_by(tmp_path / "run", started="1")
    path = tmp_path / "run" / LOCK_FILE
    if content is not None:
        path.write_text(content)

    class KilledError(BaseException):
        pass

    def die(*_: object, **__: object) -> None:
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", die)
        with pytest.raises(KilledError), locked(tmp_path / "run"):
            pass
    (claim,) = [found for found in path.parent.iterdir() if found != path]
    claim.write_text(content if content is not None else json.dumps(json.loads(claim.read_text()) | {"started": "1"}))
    with locked(tmp_path / "run"):
        assert json.loads(path.read_text())["pid"] == os.getpid()
    assert list(path.parent.iterdir()) == []


def test_a_run_whose_workdir_was_taken_ends(tmp_path):
    process, _ = hold(tmp_path / "run")
    left_by(tmp_path / "run", pid=123, host="other")
    assert process.wait(LIMIT) == 2
    _, err = process.communicate()
    assert "run was taken by process 123 on other" in err
