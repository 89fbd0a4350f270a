"""Sampling of the next token from logits: temperature, top-k, top-p, min-p and repetition penalty."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import UserError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling settings, applied in the order of the fields, as in transformers; None disables a step.

    Raises:
      UserError: a value out of range.
    """

    # Divides the logits; 0: greedy decoding, on which top_k, top_p and min_p have no effect.
    temperature: float = 1.0
    top_k: int | None = None  # keeps the k most probable tokens (Fan et al. 2018)
    top_p: float | None = None  # nucleus sampling: the smallest set of total probability >= p (Holtzman et al. 2020)
    min_p: float | None = None  # keeps tokens at least p times as probable as the most probable (Nguyen et al. 2024)
    # Divides the positive and multiplies the negative logits of tokens in the prompt or in the completion so far
    # (Keskar et al. 2019, section 4.1). Applied before the temperature, and at temperature 0 too.
    repetition_penalty: float | None = None
    # Subtracted from the logit of a token: frequency_penalty times its count in the completion so far, and
    # presence_penalty if it occurs there. Like logit_bias, applied before the temperature, and at temperature 0 too
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()  # (token, number added to its logit)

    def __post_init__(self) -> None:
        for name, good, range_ in (
            ("temperature", self.temperature >= 0, "at least 0"),
            ("top_k", self.top_k is None or self.top_k >= 1, "at least 1"),
            ("top_p", self.top_p is None or 0 < self.top_p <= 1, "in (0, 1]"),
            ("min_p", self.min_p is None or 0 <= self.min_p <= 1, "in [0, 1]"),
            ("repetition_penalty", self.repetition_penalty is None or self.repetition_penalty > 0, "positive"),
            ("frequency_penalty", math.isfinite(self.frequency_penalty or 0), "finite"),
            ("presence_penalty", math.isfinite(self.presence_penalty or 0), "finite"),
            ("logit_bias", all(math.isfinite(bias) for _, bias in self.logit_bias), "finite"),
        ):
            if not good:
                raise UserError(f"{name}={getattr(self, name)} must be {range_}")

    @property
    def has_history(self) -> bool:
        """Whether logits depend on the tokens so far, or have a bias."""
        penalties = (self.repetition_penalty, self.frequency_penalty, self.presence_penalty)
        return any(penalty is not None for penalty in penalties) or bool(self.logit_bias)

    @property
    def static(self) -> "StaticSampling":
        return StaticSampling(
            self.temperature == 0,
            self.top_k,
            self.top_p is not None,
            self.min_p is not None,
        )

    @property
    def values(self) -> "SamplingValues":
        # A divisor must not underflow to 0 in float32, nor be subnormal, which XLA may flush to 0.
        limits = np.finfo(np.float32)
        temperature, penalty = (
            float(np.clip(1.0 if value is None else value, limits.tiny, limits.max))
            for value in (self.temperature, self.repetition_penalty)
        )
        numbers = (temperature, self.top_p, self.min_p, penalty)
        return SamplingValues(*(np.float32(1.0 if value is None else value) for value in numbers))


class StaticSampling(NamedTuple):
    """Sampling settings that a compiled program depends on: static arguments."""

    greedy: bool
    top_k: int | None
    has_top_p: bool
    has_min_p: bool


class SamplingValues(NamedTuple):
    """Sampling settings that may change without recompilation: float32 scalars."""

    temperature: jax.Array | np.float32
    top_p: jax.Array | np.float32
    min_p: jax.Array | np.float32
    repetition_penalty: jax.Array | np.float32


def sample(
    logits_BV: jax.Array, seen_BV: jax.Array | None, keys_B: jax.Array, static: StaticSampling, values: SamplingValues
) -> jax.Array:
    """Samples the next token of each row, int32 (B,).

    Args:
      logits_BV: float32.
      seen_BV: bool, tokens that the repetition penalty applies to; None without a penalty.
      keys_B: random key of each row, so that a row's sample does not depend on the other rows.
    """
    if seen_BV is not None:
        logits_BV = penalise(logits_BV, seen_BV, values.repetition_penalty)
    if static.greedy:
        return likeliest(logits_BV)
    return draw(*candidates(logits_BV, static, values), keys_B)


def draw(logits_BC: jax.Array, token_BC: jax.Array | None, keys_B: jax.Array) -> jax.Array:
    """Samples a candidate of each row, int32 (B,). Their tokens are `token_BC`; None: they are the whole vocabulary."""
    # The Gumbel-max trick of `jax.random.categorical`, with a faster argmax.
    gumbel_BC = jax.vmap(lambda key: jax.random.gumbel(key, logits_BC.shape[1:], logits_BC.dtype))(keys_B)
    chosen_B = likeliest(logits_BC + gumbel_BC)
    return chosen_B if token_BC is None else jnp.take_along_axis(token_BC, chosen_B[:, None], axis=1)[:, 0]


def likeliest(logits_BV: jax.Array) -> jax.Array:
    """Computes the argmax over V, int32 (B,); seven times as fast as `jnp.argmax` on XLA's CPU."""
    last = logits_BV.shape[-1] - 1
    index_BV = jax.lax.broadcasted_iota(jnp.int32, logits_BV.shape, 1)
    largest_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    return jnp.min(jnp.where(logits_BV == largest_B1, index_BV, last), axis=-1)


def penalise(logits_BV: jax.Array, seen_BV: jax.Array, penalty: jax.Array | np.float32) -> jax.Array:
    """Applies the repetition penalty to the logits of the tokens in `seen_BV`; the result is finite."""
    limit = jnp.finfo(logits_BV.dtype).max
    penalised_BV = jnp.clip(jnp.where(logits_BV > 0, logits_BV / penalty, logits_BV * penalty), -limit, limit)
    return jnp.where(seen_BV, penalised_BV, logits_BV)


def candidates(
    logits_BV: jax.Array, static: StaticSampling, values: SamplingValues
) -> tuple[jax.Array, jax.Array | None]:
    """Applies temperature, top-k, top-p and min-p.

    Returns:
      The candidates' logits divided by the temperature (B, C), shifted to a maximum of 0, and -inf where top-p or min-p
      removes a token; and their tokens (B, C): the `top_k` most probable in descending order, or None for the whole
      vocabulary in its own order.
    """
    # The maximum is subtracted before the division, so that a tiny temperature gives 0 and -inf, the greedy choice.
    logits_BC, token_BC = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / values.temperature, None
    if static.top_k is not None:
        logits_BC, token_BC = jax.lax.top_k(logits_BC, min(static.top_k, logits_BV.shape[-1]))
    if static.has_top_p:
        logits_BC = jnp.where(top_p_mask(logits_BC, values.top_p), logits_BC, -jnp.inf)
    if static.has_min_p:
        least_B1 = jnp.max(logits_BC, axis=-1, keepdims=True) + jnp.log(values.min_p)
        logits_BC = jnp.where(logits_BC < least_B1, -jnp.inf, logits_BC)
    return logits_BC, token_BC


def top_p_mask(logits_BC: jax.Array, top_p: jax.Array | np.float32) -> jax.Array:
    """Computes the top-p mask, bool (B, C): candidates whose more probable ones have less than probability `top_p`.

    Finds the smallest such logit by bisection over the 32 bits of a float32, with one sum for each bit. Sorting the
    vocabulary would take 20 times as long on XLA's CPU, longer than a model of 124M parameters.
    """
    probs_BC = jax.nn.softmax(logits_BC, axis=-1)
    bits_BC = jax.lax.bitcast_convert_type(logits_BC + 0.0, jnp.int32)  # -0.0 is 0.0
    rank_BC = jnp.where(bits_BC < 0, bits_BC ^ 0x7FFFFFFF, bits_BC)  # integers in the order of the logits

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B1, high_B1 = bounds  # low < smallest kept logit <= high
        middle_B1 = (low_B1 >> 1) + (high_B1 >> 1) + (low_B1 & high_B1 & 1)
        likelier_B1 = jnp.sum(jnp.where(rank_BC > middle_B1, probs_BC, 0.0), axis=-1, keepdims=True)
        enough_B1 = likelier_B1 >= top_p
        return jnp.where(enough_B1, middle_B1, low_B1), jnp.where(enough_B1, high_B1, middle_B1)

    high_B1 = jnp.max(rank_BC, axis=-1, keepdims=True)
    low_B1 = jnp.full_like(high_B1, jnp.iinfo(jnp.int32).min)
    return rank_BC >= jax.lax.fori_loop(0, 32, halve, (low_B1, high_B1))[1]
