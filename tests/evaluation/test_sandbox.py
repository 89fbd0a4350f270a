"""Programs that try to harm: each is contained, and the next one runs."""

import errno
import os
import shutil
import socket
import sys
import tempfile
import time
from pathlib import Path

import pytest

from gptjax.config import UserError
from gptjax.evaluation import sandbox
from gptjax.evaluation.sandbox import Limits, isolation, run_program, run_programs

LIMITS = Limits(wall_seconds=2, cpu_seconds=1)

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


def processes_of(marker: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            found += [path.parent.name] if marker.encode() in path.read_bytes() else []
        except OSError:
            continue
    return found


def test_a_fork_bomb_is_killed_with_all_its_processes(kind):
    bomb = "import os, time\nwhile True:\n  try: os.fork()\n  except OSError: time.sleep(0.01)"
    started = time.monotonic()
    assert run_program(bomb, kind, LIMITS) == (False, "wall-clock time limit")
    assert time.monotonic() - started < 10
    # A killed process ends at its next turn on a processor; other tests may be running programs, too.
    while processes_of("sandboxed_program"):
        assert time.monotonic() - started < 30
        time.sleep(0.1)
    counted = "import os\nn = 0\ntry:\n  while os.fork(): n += 1\nexcept OSError: raise ValueError(n)\nos._exit(1)"
    reason = run_program(counted, kind, LIMITS).reason
    assert reason.startswith("ValueError")
    assert int(reason.split()[1]) < LIMITS.processes + sandbox._other_threads()


def test_an_endless_loop_ends(kind):
    assert "time limit" in run_program("while True: pass", kind, LIMITS).reason
    quick = Limits(wall_seconds=0.5)
    assert run_program("import time; time.sleep(60)", kind, quick) == (False, "wall-clock time limit")


def test_memory_and_files_are_limited(kind):
    assert run_program("x = bytearray(10 * 2**30)", kind, LIMITS) == (False, "MemoryError: ")
    assert run_program("open('f', 'wb').write(bytes(2**28))", kind, LIMITS).reason == (
        f"OSError: [Errno {errno.EFBIG}] File too large"
    )


def test_files_outside_are_neither_written_nor_read(kind, tmp_path):
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
    assert not list(Path(tempfile.gettempdir()).glob("gptjax-program-*"))


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
    try:
        isolation()
    except UserError as error:
        pytest.skip(str(error))
    programs = ["x = 1", "import os\nos.kill(os.getpid(), 9)", "while True: pass", "y = 2"]
    assert [outcome.passed for outcome in run_programs(programs, LIMITS)] == [True, False, False, True]


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
