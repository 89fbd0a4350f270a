"""Runs commands of the library as processes that need not import JAX: each is a fork of one server that has.

`python -m gptjax.X` spends seconds of processor time on imports, in a process of its own hundreds of times over. The
server imports the libraries once, without starting a JAX backend or a thread, and forks for each command.
"""

import atexit
import contextlib
import gc
import json
import logging
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


class Command:
    """A command that was started.

    Its standard streams are files, so that it never waits for a reader.

    Attributes:
      args: the equivalent command line.
      returncode: as of `subprocess.Popen`; None: it still ran when last asked.
    """

    def __init__(
        self, program: str | Path, arguments: tuple[object, ...], stdin: bytes, environment: dict[str, str], cwd: Path
    ):
        self.args = [sys.executable, *([program] if isinstance(program, Path) else ["-m", program]), *arguments]
        self.returncode: int | None = None
        self._directory = tempfile.TemporaryDirectory()
        self._files = {name: Path(self._directory.name) / name for name in ("stdin", "stdout", "stderr")}
        for name, file in self._files.items():
            file.write_bytes(stdin if name == "stdin" else b"")
        self.pid = 0
        self._server = _started()
        self._server.start(
            self,
            {
                "script" if isinstance(program, Path) else "module": str(program),
                "arguments": [str(argument) for argument in arguments],
                "environment": {**os.environ, **environment},
                "cwd": str(cwd),
                **{name: str(path) for name, path in self._files.items()},
            },
        )

    def poll(self) -> int | None:
        """Returns the exit code of a command that has ended."""
        self._server.read(0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Returns the exit code.

        Raises:
          subprocess.TimeoutExpired: it still runs after `timeout` seconds.
        """
        end = None if timeout is None else time.monotonic() + timeout
        while self.returncode is None:
            left = None if end is None else end - time.monotonic()
            if left is not None and left < 0:
                raise subprocess.TimeoutExpired(self.args, timeout or 0.0)
            self._server.read(left)
        return self.returncode

    def wait_for(self, text: str) -> None:
        """Waits until the command has written `text` to standard output."""
        while text.encode() not in self._files["stdout"].read_bytes():
            assert self.poll() is None, self._files["stderr"].read_text()
            time.sleep(0.01)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def close(self) -> None:
        """Kills a command that still runs, and removes its files."""
        self.kill()
        self.wait()
        self._directory.cleanup()

    def result(self, timeout: float | None = None, text: bool = True) -> subprocess.CompletedProcess[Any]:
        """Waits for the end; kills a command that runs for longer than `timeout` seconds.

        Raises:
          subprocess.TimeoutExpired: it was killed.
        """
        try:
            code = self.wait(timeout)
            out, err = (self._files[name].read_bytes() for name in ("stdout", "stderr"))
        finally:
            self.close()
        if text:
            return subprocess.CompletedProcess(self.args, code, out.decode(), err.decode())
        return subprocess.CompletedProcess(self.args, code, out, err)


def start_command(
    program: str | Path,
    *arguments: object,
    stdin: bytes | str = b"",
    environment: dict[str, str] | None = None,
    cwd: Path = ROOT,
) -> Command:
    """Starts `python -m program arguments...`, or a script.

    Args:
      program: the name of a module, or the path of a script.
      environment: variables that are set besides those of this process, read after the imports.
    """
    stdin = stdin.encode() if isinstance(stdin, str) else stdin
    return Command(program, arguments, stdin, environment or {}, cwd)


def run_command(
    program: str | Path,
    *arguments: object,
    stdin: bytes | str = b"",
    environment: dict[str, str] | None = None,
    text: bool = True,
) -> subprocess.CompletedProcess[Any]:
    """Runs `python -m program arguments...`, or a script, in the repository root.

    Args:
      program: the name of a module, or the path of a script.
      environment: variables in addition to those of this process, read after the imports.
      text: whether standard output and error are str, or bytes.
    """
    return start_command(program, *arguments, stdin=stdin, environment=environment).result(text=text)


class _Server:
    """The server of this test process.

    It is sent one line for every command, and answers with the process identifiers and, in any order, with the exit
    codes and the processor seconds that were spent: `started PID` and `ended PID CODE SECONDS`.
    """

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}
        )
        self.seconds = 0.0  # of processor time, of the commands that have ended
        self._starting: Command | None = None
        self._running: dict[int, Command] = {}
        self._unread = b""

    def stop(self) -> None:
        """Ends the server."""
        with self._process:  # waits, and closes its pipes
            self._process.kill()

    def start(self, command: Command, request: dict[str, Any]) -> None:
        """Starts a command and sets its process identifier."""
        assert self._process.stdin is not None
        self._starting = command
        self._process.stdin.write(json.dumps(request).encode() + b"\n")
        self._process.stdin.flush()
        while self._starting is not None:
            self.read(None)

    def read(self, timeout: float | None) -> None:
        """Reads messages of the server; waits for them at most `timeout` seconds."""
        assert self._process.stdout is not None
        file = self._process.stdout.fileno()
        if not select.select([file], [], [], timeout)[0]:
            return
        found = os.read(file, 4096)
        if not found:
            raise RuntimeError("the server of commands has ended")
        *lines, self._unread = (self._unread + found).split(b"\n")
        for line in lines:
            event, pid, *results = line.split()
            if event == b"started":
                assert self._starting is not None
                self._starting.pid = int(pid)
                self._running[int(pid)], self._starting = self._starting, None
            else:
                self._running.pop(int(pid)).returncode = int(results[0])
                self.seconds += float(results[1])


_server: _Server | None = None


def _started() -> _Server:
    """Returns the server of this test process."""
    global _server
    if _server is None:
        _server = _Server()
        atexit.register(_server.stop)
    return _server


def processes_of(*words: str) -> list[int]:
    """The processes whose command lines have the words."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            arguments = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:  # it has ended
            continue
        if all(any(word in argument for argument in arguments) for word in words):
            found.append(int(path.parent.name))
    return found


def processor_seconds() -> float:
    """Returns the processor seconds of the commands that have ended."""
    return 0.0 if _server is None else _server.seconds


def spare_collections() -> None:
    """Makes the garbage collector skip the objects of the imports, and run less often: it took a tenth of tracing."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


def serve() -> None:
    """Forks for every request on standard input; writes process identifiers and exit codes to standard output."""
    sys.path.insert(0, str(ROOT))
    import grain.experimental  # noqa: F401
    import matplotlib.backends.backend_agg
    import matplotlib.figure  # noqa: F401
    import sklearn.metrics  # noqa: F401

    import gptjax.evaluation.catalogue
    import gptjax.interop.adapters
    import gptjax.run  # noqa: F401

    spare_collections()
    replies = os.dup(1)
    os.dup2(2, 1)
    # A child that ends makes `select` return.
    wakes, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    unread = b""
    while True:
        ready, _, _ = select.select([0, wakes], [], [])
        if wakes in ready:
            os.read(wakes, 4096)
            with contextlib.suppress(ChildProcessError):
                while (ended := os.wait4(-1, os.WNOHANG))[0] != 0:
                    pid, status, usage = ended
                    seconds = usage.ru_utime + usage.ru_stime
                    os.write(replies, f"ended {pid} {os.waitstatus_to_exitcode(status)} {seconds}\n".encode())
        if 0 in ready:
            found = os.read(0, 65536)
            if not found:
                return
            *lines, unread = (unread + found).split(b"\n")
            for line in lines:
                child = os.fork()
                if child == 0:
                    signal.set_wakeup_fd(-1)
                    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                    for file in (replies, wakes, woken):
                        os.close(file)
                    _become(json.loads(line))
                os.write(replies, f"started {child}\n".encode())


def _become(request: dict[str, Any]) -> None:
    """Runs the command of a request in this process, and ends it."""
    import runpy

    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(request[name], os.O_RDONLY if number == 0 else os.O_WRONLY)
        os.dup2(file, number)
        os.close(file)
        # What replaces it must not close its file descriptor, which the libraries in C++ write to.
        setattr(sys, name, open(number, "r" if number == 0 else "w", closefd=False))  # noqa: SIM115
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["", *request["arguments"]]
    logging.root.handlers.clear()  # one of this module's imports sets one, and a command has absl's own
    code: Any = 0
    try:
        if "script" in request:
            runpy.run_path(request["script"], run_name="__main__")
        else:
            runpy.run_module(request["module"], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 1
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()
