"""Two runs never share a workdir, and the lock of a dead one stops nobody."""

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
from gptjax.run import run

ROOT = Path(__file__).parents[2]
HOLD = """
import sys
from pathlib import Path
from gptjax.config import UserError
from gptjax.checkpoint import lock

lock.BEAT, lock.DEAD = 0.1, 1.0
try:
    with lock.locked(Path(sys.argv[1])):
        print("held", flush=True)
        sys.stdin.readline()
except UserError as error:
    print(f"refused: {error}", flush=True)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "DEAD", 1.0)


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


@pytest.mark.parametrize("content", [None, "", "{", "[]", '{"pid": "x"}'])
def test_the_lock_of_another_machine_or_damaged_is_stale_when_it_is_not_touched(content, tmp_path):
    left_by(tmp_path / "run", host="other", machine="another kernel")
    if content is not None:
        (tmp_path / "run" / LOCK_FILE).write_text(content)
    os.utime(tmp_path / "run" / LOCK_FILE, (time.time() + 10**6,) * 2)  # a clock that is wrong does not matter
    with locked(tmp_path / "run"):
        pass


def test_the_lock_of_another_machine_that_is_touched_holds(tmp_path):
    left_by(tmp_path / "run", host="other", machine="another kernel")
    path, ended = tmp_path / "run" / LOCK_FILE, threading.Event()
    beating = threading.Thread(target=lock._keep, args=(path, json.loads(path.read_text()), ended))
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


def test_a_run_whose_workdir_was_taken_ends(tmp_path):
    process, _ = hold(tmp_path / "run")
    left_by(tmp_path / "run", pid=123, host="other")
    assert process.wait(60) == 2
    _, err = process.communicate()
    assert "run was taken by process 123 on other" in err
