"""XLA flags reach the compiler, and an invalid one is a user error."""

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import UserError
from gptjax.parallel import compiler


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
