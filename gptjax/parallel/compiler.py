"""Compilation with XLA flags that are passed with the program.

Flags given this way need no environment variable, apply to one program only, and are part of its key in the compilation
cache.
"""

from collections.abc import Iterable

import jax

from gptjax.config import UserError


def compile(lowered: jax.stages.Lowered, flags: Iterable[tuple[str, str]] = ()) -> jax.stages.Compiled:
    """Compiles a lowered program with XLA flags.

    Args:
      flags: (name, value) pairs, such as ("xla_cpu_enable_fast_math", "true").

    Raises:
      UserError: XLA has no such flag, or rejects its value.
    """
    # XLA parses "true" and "false" in its environment variable, but takes bools here.
    booleans = {"true": True, "false": False}
    try:
        return lowered.compile({name: booleans.get(value, value) for name, value in flags})
    except jax.errors.JaxRuntimeError as error:
        message = str(error).removeprefix("INVALID_ARGUMENT: ")
        if message.startswith(("No such compile option", "While setting option")):
            raise UserError(f"compiler_options: {message}") from None
        raise
