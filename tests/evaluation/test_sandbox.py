"""Programs that try to harm: each is contained, and the next one runs."""

import errno
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from gptjax.config import UserError
from gptjax.evaluation import sandbox
from gptjax.evaluation.sandbox import Limits, isolation, run_program, run_programs
from tests.commands import processes_of

LIMITS = Limits(wall_seconds=300, cpu_seconds=30)  # which no program of these tests needs, on the slowest machine

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="programs are run on Linux alone")


@pytest.fixture(params=["namespaces", "landlock"])
def kind(request, monkeypatch):
    """Each isolation that this machine offers."""
    readable = os.path.realpath(sys.base_prefix).startswith("/usr") or os.geteuid() != 0
    if request.param == "landlock" and not readable:
        # The user nobody may not read a Python in the home of root.
        if not os.path.exists("/usr/bin/python3"):
            pytest.skip("no Python that the user nobody may read")
        monkeypatch.setattr(sys, "executable", "/usr/bin/python3")
    try:
        run_program("", request.param, LIMITS)
    except sandbox._SetupError as error:
        pytest.skip(str(error))
    return request.param


def test_a_program_passes_only_if_its_last_line_is_reached(kind):
    def outcome(program):
        return run_program(program, kind, LIMITS)

    passes = (
        "import tempfile, random, decimal\nwith tempfile.TemporaryFile() as file:\n  file.write(b'x')\nprint('out')"
    )
    assert outcome(passes) == (True, "")
    assert outcome("assert 1 + 1 == 3, 'no'") == (False, "AssertionError: no")
    assert outcome("raise SystemExit(0)").reason == "SystemExit: 0"
    assert outcome("import os; os._exit(0)") == (False, "ended with exit code 0")
    assert outcome("def f(:").reason.startswith("SyntaxError")
    forged = 'import os\nfor fd in range(20):\n  try: os.write(fd, b\'{"token": "0", "reason": ""}\\n\')\n'
    assert not outcome(f"{forged}  except OSError: pass\nos._exit(0)").passed


def isolation_or_skip():
    try:
        isolation()
    except UserError as error:
        pytest.skip(str(error))


def test_a_fork_bomb_has_ended_before_its_directory_is_removed(kind, monkeypatch, tmp_path):
    own = tmp_path / "sandboxed_program.py"  # other tests may be running programs, too
    shutil.copy(sandbox.sandboxed_program.__file__, own)
    monkeypatch.setattr(sandbox.sandboxed_program, "__file__", str(own))
    rmtree, alive = shutil.rmtree, []
    monkeypatch.setattr(shutil, "rmtree", lambda path: (alive.extend(processes_of(str(own))), rmtree(path)))
    bomb = "import os\nwhile True:\n  try: os.fork()\n  except OSError: pass"
    assert run_program(bomb, kind, Limits(wall_seconds=1)) == (False, "wall-clock time limit")
    assert alive == []


def test_the_number_of_processes_is_limited(kind, monkeypatch):
    count, others = sandbox._other_threads, []
    monkeypatch.setattr(sandbox, "_other_threads", lambda kind: others.append(count(kind)) or others[0])
    forks = "import os\nn = 0\ntry:\n  while os.fork(): n += 1\nexcept OSError: raise ValueError(n)\nos._exit(1)"
    reason = run_program(forks, kind, LIMITS).reason
    assert reason.startswith("ValueError")
    assert int(reason.split()[1]) < LIMITS.processes + others[0]


def test_each_of_many_programs_at_once_has_its_processes(monkeypatch):
    isolation_or_skip()
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(LIMITS.processes))
    thread = "import threading\nthread = threading.Thread(target=threading.Event().wait, args=(1,))\n"
    outcomes = run_programs([f"{thread}thread.start()\nthread.join()"] * LIMITS.processes, LIMITS)
    assert set(outcomes) == {(True, "")}


def test_programs_that_start_meanwhile_keep_none_from_starting(kind, monkeypatch):
    monkeypatch.setattr(sandbox, "_other_threads", lambda _: -LIMITS.processes)
    assert run_program("x = 1", kind, LIMITS) == (True, "")


def test_an_endless_loop_ends(kind):
    assert run_program("while True: pass", kind, Limits(300, cpu_seconds=1)).reason == "processor time limit"
    quick = Limits(wall_seconds=0.5)
    assert run_program("import time; time.sleep(600)", kind, quick) == (False, "wall-clock time limit")


def test_memory_and_files_are_limited(kind):
    assert run_program("x = bytearray(10 * 2**30)", kind, LIMITS) == (False, "MemoryError: ")
    assert run_program("open('f', 'wb').write(bytes(2**28))", kind, LIMITS).reason == (
        f"OSError: [Errno {errno.EFBIG}] File too large"
    )


def test_files_outside_are_neither_written_nor_read(kind, tmp_path, monkeypatch):
    mkdtemp, made = tempfile.mkdtemp, []
    monkeypatch.setattr(tempfile, "mkdtemp", lambda **given: made.append(mkdtemp(**given)) or made[-1])
    secret = tmp_path / "secret"
    secret.write_text("x")
    secret.chmod(0o666)
    tmp_path.chmod(0o777)
    for program in (f"open('{secret}').read()", f"open('{secret}', 'w')", f"open('{tmp_path}/new', 'w')"):
        assert "Error" in run_program(program, kind, LIMITS).reason
    for folder in ("/usr", "/etc", "/dev", str(Path.home())):
        assert not run_program(f"open('{folder}/gptjax-new', 'w')", kind, LIMITS).passed
    assert secret.read_text() == "x"
    assert not (tmp_path / "new").exists()
    assert made
    assert not any(os.path.exists(directory) for directory in made)


def test_sockets_and_signals_fail(kind):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = server.getsockname()
        program = f"import socket\nsocket.create_connection({address}, 1)"
        assert run_program(program, kind, LIMITS).reason.startswith("PermissionError")
        server.settimeout(0.1)
        with pytest.raises(TimeoutError):
            server.accept()
    assert not run_program(f"import os, signal\nos.kill({os.getpid()}, signal.SIGTERM)", kind, LIMITS).passed
    assert run_program("import os\nos.setsid()", kind, LIMITS).reason.startswith("PermissionError")
    assert run_program("import os\nassert os.getuid() == 65534", kind, LIMITS).passed or os.geteuid() != 0


def test_programs_after_a_bad_one_run():
    isolation_or_skip()
    programs = ["x = 1", "import os\nos.kill(os.getpid(), 9)", "while True: pass", "y = 2"]
    assert [outcome.passed for outcome in run_programs(programs, Limits(300, cpu_seconds=1))] == [
        True,
        False,
        False,
        True,
    ]


def test_nothing_runs_where_nothing_isolates(monkeypatch, tmp_path):
    broken = tmp_path / "sandboxed_program.py"
    shutil.copy(sandbox.sandboxed_program.__file__, broken)
    broken.write_text(
        broken.read_text().replace("def _restrict(", "def _restrict(_):\n    raise SetupError('no')\n\n\ndef _unused(")
    )
    monkeypatch.setattr(sandbox.sandboxed_program, "__file__", str(broken))
    sandbox.isolation.cache_clear()
    try:
        with pytest.raises(UserError, match=r"cannot be isolated on this machine \(namespaces: .*no; landlock: .*no\)"):
            isolation()
    finally:
        sandbox.isolation.cache_clear()
