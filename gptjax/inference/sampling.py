"""Which token comes next: the published ways of drawing one from a model's logits."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Applied in this order, as transformers does; None leaves a step out.

    Raises:
      UserError: a value out of range.
    """

    temperature: float = 1.0  # divides the logits; 0: always the likeliest token, what is below has no effect then
    top_k: int | None = None  # only the k likeliest tokens (Fan et al. 2018)
    top_p: float | None = None  # only the fewest tokens that together have probability p (Holtzman et al. 2020)
    min_p: float | None = None  # only tokens at least p times as probable as the likeliest (Nguyen et al. 2024)
    # Logits of tokens that stand in the prompt or were drawn already: the positive ones are divided by it, the negative
    # ones multiplied (Keskar et al. 2019, section 4.1). Comes first, and counts at temperature 0 too.
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        for name, good, range_ in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "positive"),
        ):
            if not good:
                raise UserError(f"{name}={getattr(self, name)} must be {range_}")

    @property
    def form(self) -> "Form":
        return Form(
            self.temperature == 0,
            self.top_k,
            self.top_p is not None,
            self.min_p is not None,
        )

    @property
    def knobs(self) -> "Knobs":
        values = (self.temperature, self.top_p, self.min_p, self.repetition_penalty)
        return Knobs(*(np.float32(1.0 if value is None else value) for value in values))


class Form(NamedTuple):
    """What of `Sampling` decides the program that is compiled."""

    greedy: bool
    top_k: int | None
    has_top_p: bool
    has_min_p: bool


class Knobs(NamedTuple):
    """What of `Sampling` may change without compiling again: float32 scalars."""

    temperature: jax.Array | np.float32
    top_p: jax.Array | np.float32
    min_p: jax.Array | np.float32
    repetition_penalty: jax.Array | np.float32


def sample(logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B: jax.Array, form: Form, knobs: Knobs) -> jax.Array:
    """The next token of each row, int32 (B,).

    Args:
      logits_BV: float32.
      seen_BV: bool, the tokens that the repetition penalty is for; None without one.
      keys_B: a random key for each row: what a row draws does not depend on the others.
    """
    if seen_BV is not None:
        logits_BV = penalise(logits_BV, seen_BV, knobs.repetition_penalty)
    if form.greedy:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    logits_BC, token_BC = candidates(logits_BV, form, knobs)
    drawn_B = jax.vmap(jax.random.categorical)(keys_B, logits_BC).astype(jnp.int32)
    return drawn_B if token_BC is None else jnp.take_along_axis(token_BC, drawn_B[:, None], axis=1)[:, 0]


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array | np.float32) -> jax.Array:
    """Logits with the repetition penalty."""
    return jnp.where(seen_BV, jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), logits_BV)


def candidates(logits_BV: jax.Array, form: Form, knobs: Knobs) -> tuple[jax.Array, jax.Array | None]:
    """What is drawn from, if not greedily.

    Returns:
      The candidates' logits over temperature (B, C), -inf of those that top-p or min-p leaves out, and their tokens:
      the likeliest `top_k` in falling order, or None: the vocabulary as it is.
    """
    logits_BC, token_BC = logits_BV / knobs.temperature, None
    if form.top_k is not None:
        logits_BC, token_BC = jax.lax.top_k(logits_BC, min(form.top_k, logits_BV.shape[-1]))
    if form.has_top_p:
        falling_BC = logits_BC if form.top_k is not None else -jnp.sort(-logits_BC, axis=-1)
        probs_BC = jax.nn.softmax(falling_BC, axis=-1)
        needed_BC = jnp.cumsum(probs_BC, axis=-1) - probs_BC < knobs.top_p  # the likelier ones are not enough yet
        least_B1 = jnp.min(jnp.where(needed_BC, falling_BC, jnp.inf), axis=-1, keepdims=True)
        logits_BC = jnp.where(logits_BC < least_B1, -jnp.inf, logits_BC)
    if form.has_min_p:
        least_B1 = jnp.max(logits_BC, axis=-1, keepdims=True) + jnp.log(knobs.min_p)
        logits_BC = jnp.where(logits_BC < least_B1, -jnp.inf, logits_BC)
    return logits_BC, token_BC
