"""Runs commands of the library as processes that need not import JAX: each is a fork of one server that has.

`python -m gptjax.X` spends seconds of processor time on imports, in a process of its own hundreds of times over. The
server imports the libraries once, without starting a JAX backend or a thread, and forks for each command.
"""

import atexit
import json
import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_server: subprocess.Popen[bytes] | None = None


def run_command(
    module: str,
    *arguments: object,
    stdin: bytes | str = b"",
    environment: dict[str, str] | None = None,
    text: bool = True,
) -> subprocess.CompletedProcess[Any]:
    """Runs `python -m module arguments...` in the repository root; the result is that of `subprocess.run`.

    Args:
      environment: variables in addition to those of this process, read after the imports.
      text: whether standard output and error are str, or bytes.
    """
    server = _started()
    assert server.stdin is not None
    assert server.stdout is not None
    with tempfile.TemporaryDirectory() as directory:
        files = {name: Path(directory) / name for name in ("stdin", "stdout", "stderr")}
        files["stdin"].write_bytes(stdin.encode() if isinstance(stdin, str) else stdin)
        request = {
            "module": module,
            "arguments": [str(argument) for argument in arguments],
            "environment": {**os.environ, **(environment or {})},
            **{name: str(path) for name, path in files.items()},
        }
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        out, err = (files[name].read_bytes() for name in ("stdout", "stderr"))
    command = [sys.executable, "-m", module, *request["arguments"]]
    if text:
        return subprocess.CompletedProcess(command, code, out.decode(), err.decode())
    return subprocess.CompletedProcess(command, code, out, err)


def _started() -> subprocess.Popen[bytes]:
    """The server of this test process."""
    global _server
    if _server is None:
        _server = subprocess.Popen(
            [sys.executable, __file__], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={**os.environ}
        )
        atexit.register(_server.kill)
    return _server


def serve() -> None:
    """Forks for every request on standard input; writes the exit code of each to standard output."""
    sys.path.insert(0, str(ROOT))
    import gptjax.evaluation.catalogue
    import gptjax.interop.adapters
    import gptjax.run  # noqa: F401

    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in iter(sys.stdin.readline, ""):
        child = os.fork()
        if child == 0:
            _become(json.loads(line))
        _, status = os.waitpid(child, 0)
        replies.write(f"{os.waitstatus_to_exitcode(status)}\n")
        replies.flush()


def _become(request: dict[str, Any]) -> None:
    """Runs the command of a request in this process, and ends it."""
    import runpy

    for number, name in enumerate(("stdin", "stdout", "stderr")):
        file = os.open(request[name], os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdin, sys.stdout, sys.stderr = open(0), open(1, "w"), open(2, "w")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv = ["", *request["arguments"]]
    logging.root.handlers.clear()  # one of this module's imports sets one, and a command has absl's own
    code: Any = 0
    try:
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
