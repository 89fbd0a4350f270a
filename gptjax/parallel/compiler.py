"""XLA's flags for the training step, by platform: the one place where they stand.

They are given to the compiler with the program, so that they need no environment variable, hold for this program alone,
and are part of its name in the compilation cache. What stands here was measured: `benchmarks/LOG.md`.
"""

from collections.abc import Iterable

# Platform: flag: value.
OPTIONS: dict[str, dict[str, str]] = {"cpu": {}, "gpu": {}, "tpu": {}}


def compiler_options(platform: str, extra: Iterable[tuple[str, str]] = ()) -> dict[str, str | bool]:
    """What `Lowered.compile` takes as `compiler_options`: those of the platform, with `extra` over them."""
    truth = {"true": True, "false": False}  # which XLA reads in its environment variable, and not here
    return {flag: truth.get(value, value) for flag, value in (OPTIONS.get(platform, {}) | dict(extra)).items()}
