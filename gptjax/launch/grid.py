"""Building blocks of a config file's `sweep()`: lists of overrides, their products, and random draws.

A sweep is a list of dicts, each of which maps config keys to the values of one run:

    from gptjax.launch import grid

    def sweep():
        rates = grid.values("optimizer.peak_lr", [1e-3, 3e-3])
        return grid.product(rates, grid.values("seed", range(3)))

Lists of several sweeps are joined by `+`. The same distributions are the space of `search()`, from which Optuna draws.
"""

import dataclasses
import itertools
import math
import random
from collections.abc import Iterable, Mapping
from typing import Any

from gptjax.config import UserError

Overrides = dict[str, Any]  # values by config key
DIGITS = 5  # significant digits of random floats


def values(key: str, of: Iterable[Any]) -> list[Overrides]:
    """Returns one dict for each value of a config key."""
    return [{key: value} for value in of]


def product(*lists: Iterable[Overrides]) -> list[Overrides]:
    """Returns the Cartesian product: every dict of the first list merged with every dict of the second, and so on.

    Raises:
      UserError: two lists set the same key.
    """
    return [_merged(parts) for parts in itertools.product(*map(list, lists))]


def zipped(*lists: Iterable[Overrides]) -> list[Overrides]:
    """Returns the dicts at the same place of each list, merged.

    Raises:
      UserError: the lists have different lengths, or set the same key.
    """
    given = [list(part) for part in lists]
    if len({len(part) for part in given}) > 1:
        raise UserError(f"grid.zipped: the lists have {', '.join(str(len(part)) for part in given)} entries")
    return [_merged(parts) for parts in zip(*given, strict=True)]


def _merged(parts: Iterable[Overrides]) -> Overrides:
    merged: Overrides = {}
    for part in parts:
        if repeated := merged.keys() & part.keys():
            raise UserError(f"a sweep sets {min(repeated)!r} twice in one run")
        merged |= part
    return merged


# --- distributions ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Uniform:
    """Uniform distribution over the floats in [low, high]."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self, -math.inf)

    def draw(self, rng: random.Random) -> float:
        return rounded(self, rng.uniform(self.low, self.high))


@dataclasses.dataclass(frozen=True)
class LogUniform:
    """Distribution over the floats in [low, high] whose logarithm is uniform."""

    low: float
    high: float

    def __post_init__(self) -> None:
        _check_range(self, 0.0)

    def draw(self, rng: random.Random) -> float:
        return rounded(self, math.exp(rng.uniform(math.log(self.low), math.log(self.high))))


@dataclasses.dataclass(frozen=True)
class Integers:
    """Uniform distribution over the integers in [low, high]."""

    low: int
    high: int

    def __post_init__(self) -> None:
        _check_range(self, -math.inf)

    def draw(self, rng: random.Random) -> int:
        return rng.randint(self.low, self.high)


@dataclasses.dataclass(frozen=True)
class Choice:
    """Uniform distribution over some values."""

    options: tuple[Any, ...]

    def __init__(self, options: Iterable[Any]) -> None:
        object.__setattr__(self, "options", tuple(options))
        if not self.options:
            raise UserError("grid.Choice needs at least one option")

    def draw(self, rng: random.Random) -> Any:
        return rng.choice(self.options)


Distribution = Uniform | LogUniform | Integers | Choice


def rounded(drawn: Uniform | LogUniform, value: float) -> float:
    """Rounds a draw to DIGITS significant digits, for short names of runs; within the interval."""
    return min(max(float(f"{value:.{DIGITS}g}"), drawn.low), drawn.high)


def _check_range(drawn: Any, above: float) -> None:
    if not above < drawn.low <= drawn.high < math.inf:
        bound = "0 < low <= high" if above == 0 else "low <= high"
        raise UserError(f"grid.{drawn}: needs {bound}, both finite")


def draws(count: int, space: Mapping[str, Distribution], seed: int = 0) -> list[Overrides]:
    """Returns `count` random draws of all keys of `space`.

    The draws depend on `seed`, the key and their number only: more draws, or another key, leave the others as they are.
    """
    rngs = {key: random.Random(f"{seed} {key}") for key in space}
    return [{key: drawn.draw(rngs[key]) for key, drawn in space.items()} for _ in range(count)]
