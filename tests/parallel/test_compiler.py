"""XLA's flags reach the compiler, and a wrong one is told in one line."""

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import UserError
from gptjax.parallel import compiler


def lowered() -> jax.stages.Lowered:
    return jax.jit(lambda x: jnp.sin(x) @ x).lower(jnp.ones((8, 8)))


def test_a_config_s_flags_are_put_over_those_of_the_platform(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(compiler.OPTIONS, "cpu", {"xla_one": "1", "xla_two": "false"})
    extra = (("xla_two", "true"), ("xla_three", "abc"))
    assert compiler.compiler_options("cpu", extra) == {"xla_one": "1", "xla_two": True, "xla_three": "abc"}
    assert compiler.compiler_options("nothing of ours") == {}


def test_a_flag_reaches_the_compiler(tmp_path) -> None:
    program = compiler.compile(lowered(), "cpu", (("xla_dump_to", str(tmp_path)),))
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
def test_a_wrong_flag_is_told_in_one_line(flag: str, value: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        compiler.compile(lowered(), "cpu", ((flag, value),))
