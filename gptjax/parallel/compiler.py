"""XLA's flags for the training step, by platform: the one place where they stand.

They are given to the compiler with the program, so that they need no environment variable, hold for this program alone,
and are part of its name in the compilation cache. What stands here was measured: `benchmarks/LOG.md`.
"""

from collections.abc import Iterable

import jax

from gptjax.config import UserError

# Platform: flag: value.
OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "gpu": {}, "tpu": {}}


def compiler_options(platform: str, extra: Iterable[tuple[str, str]] = ()) -> dict[str, str | bool]:
    """What `Lowered.compile` takes as `compiler_options`: those of the platform, with `extra` over them."""
    truth = {"true": True, "false": False}  # which XLA reads in its environment variable, and not here
    return {flag: truth.get(value, value) for flag, value in (OPTIONS.get(platform, {}) | dict(extra)).items()}


def compile(lowered: jax.stages.Lowered, platform: str, extra: Iterable[tuple[str, str]] = ()) -> jax.stages.Compiled:
    """`lowered` as a program, by `compiler_options`.

    Raises:
      UserError: XLA has no such flag, or it cannot have that value.
    """
    options = compiler_options(platform, extra)
    try:
        return lowered.compile(options)
    except jax.errors.JaxRuntimeError as error:
        message = str(error).removeprefix("INVALID_ARGUMENT: ")
        if message.startswith(("No such compile option", "While setting option")):
            raise UserError(f"compiler_options: {message}") from None
        raise
