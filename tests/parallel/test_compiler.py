"""XLA flags reach the compiler, an invalid one is a user error, and long compilations are announced."""

import io
import re
import threading

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import UserError
from gptjax.parallel import compiler

LIMIT = 1000.0  # seconds, in which what hangs is found out


def lowered() -> jax.stages.Lowered:
    return jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((8, 8)))


def test_flags_reach_the_compiler(tmp_path) -> None:
    flags = (("xla_dump_to", str(tmp_path)), ("xla_cpu_enable_fast_math", "false"))
    program = compiler.compile(lowered(), flags)
    assert program(jnp.ones((8, 8))).shape == (8, 8)
    assert list(tmp_path.glob("*.txt"))


@pytest.mark.parametrize(
    ("flag", "value", "message"),
    [
        ("xla_nonsense", "1", "compiler_options: No such compile option: 'xla_nonsense'"),
        ("xla_cpu_enable_fast_math", "maybe", "'maybe' is not a valid bool value"),
        ("xla_cpu_prefer_vector_width", "wide", "'wide' is not a valid int32 value"),
    ],
)
def test_an_invalid_flag_is_a_user_error(flag: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compiler.compile(lowered(), ((flag, value),))


class Stderr(io.StringIO):
    """A stream that sets `written` at its first write."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self._terminal, self.written = terminal, threading.Event()

    def isatty(self) -> bool:
        return self._terminal

    def write(self, text: str) -> int:
        super().write(text)
        self.written.set()
        return len(text)


def test_a_long_compilation_is_announced_and_erased(monkeypatch) -> None:
    monkeypatch.setattr(compiler, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr("sys.stderr", file := Stderr(terminal=False))
    with compiler.announced("the step"):
        assert file.written.wait(LIMIT)
    assert file.getvalue() == "compiling the step ...\n"
    monkeypatch.setattr("sys.stderr", terminal := Stderr(terminal=True))
    with compiler.announced("the step"):
        assert terminal.written.wait(LIMIT)
    first, *_, blank, end = terminal.getvalue().split("\r")[1:]
    assert re.match(r"compiling the step \.\.\. \d+ s", first)
    assert blank.strip() == end == ""
    assert len(blank) == len(first)


def test_a_short_compilation_is_not_announced(monkeypatch) -> None:
    monkeypatch.setattr(compiler, "QUIET_SECONDS", LIMIT)
    monkeypatch.setattr("sys.stderr", stderr := Stderr(terminal=True))
    with compiler.announced("the step"):
        pass
    assert stderr.getvalue() == ""
