"""Sampling with settings of its own for each row of a batch, all of them arguments of one compiled program.

A row's token is that of `gptjax.inference.sampling.sample` for its settings and seed. What no row of a batch uses is
skipped at run time; a row's result does not depend on what the others use.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from gptjax.inference.sampling import Sampling, draw, likeliest, penalise, top_p_mask
from gptjax.parallel.mesh import constrain

FEW_CANDIDATES = 128  # the largest top_k that needs no sorting of the vocabulary
MOST_TOP_LOGPROBS = 20


class RowSettings(NamedTuple):
    """Sampling settings of each row, numpy arrays: float32, except `top_k` (int32), `seed` (uint32) and the bools.

    Disabled settings have the values for which they have no effect; `top_k` is 0.
    """

    seed_B: Any
    is_greedy_B: Any
    temperature_B: Any
    top_k_B: Any
    top_p_B: Any
    min_p_B: Any
    has_history_B: Any
    repetition_penalty_B: Any
    frequency_penalty_B: Any
    presence_penalty_B: Any


class History(NamedTuple):
    """What penalties and biases depend on, for every row of the engine.

    Attributes:
      seen_BV: bool, tokens of the prompt.
      counts_BV: int32, how often a token occurs in the completion so far.
      bias_BV: float32, added to the logits.
    """

    seen_BV: jax.Array
    counts_BV: jax.Array
    bias_BV: jax.Array


def replicated(history: History) -> History:
    """Replicates a history on all devices, so that programs return it as they take it."""
    return History(*(constrain(x_BV, None, None) for x_BV in history))


def row_settings(rows: Sequence[tuple[Sampling, int]]) -> RowSettings:
    """The settings of rows given as (sampling, seed)."""

    def column(dtype: type, value: Callable[[Sampling], object]) -> npt.NDArray:
        return np.array([value(sampling) for sampling, _ in rows], dtype)

    return RowSettings(
        np.array([seed % 2**32 for _, seed in rows], np.uint32),
        column(np.bool_, lambda s: s.temperature == 0),
        column(np.float32, lambda s: s.values.temperature),
        column(np.int32, lambda s: s.top_k or 0),
        column(np.float32, lambda s: 1.0 if s.top_p is None else s.top_p),
        column(np.float32, lambda s: 0.0 if s.min_p is None else s.min_p),
        column(np.bool_, lambda s: s.has_history),
        column(np.float32, lambda s: s.values.repetition_penalty),
        column(np.float32, lambda s: s.frequency_penalty or 0.0),
        column(np.float32, lambda s: s.presence_penalty or 0.0),
    )


def sample_rows(
    logits_BV: jax.Array,
    history: History,
    slot_B: jax.Array,
    allowed_BV: jax.Array,
    rows: RowSettings,
    number_B: jax.Array,
    earlier_BN: jax.Array,
) -> jax.Array:
    """Samples the next token of each row, int32 (B,).

    Args:
      logits_BV: float32.
      slot_B: int32, the row of `history` for each row.
      allowed_BV: bool, tokens that may be sampled.
      number_B: int32, index of the token within the completion.
      earlier_BN: int32, tokens of the completion that `history` does not have yet; -1 pads.
    """
    logits_BV = jax.lax.cond(
        jnp.any(rows.has_history_B),
        lambda: _with_history(logits_BV, history, slot_B, rows, earlier_BN),
        lambda: logits_BV,
    )
    logits_BV = jax.lax.cond(jnp.all(allowed_BV), lambda: logits_BV, lambda: jnp.where(allowed_BV, logits_BV, -jnp.inf))
    none_B = jnp.zeros_like(number_B)
    greedy_B = jax.lax.cond(jnp.any(rows.is_greedy_B), lambda: likeliest(logits_BV), lambda: none_B)
    keys_B = jax.vmap(lambda seed, number: jax.random.fold_in(jax.random.key(seed), number))(rows.seed_B, number_B)
    vocabulary = logits_BV.shape[-1]
    top_k_B = jnp.minimum(rows.top_k_B, vocabulary)
    few = min(FEW_CANDIDATES, vocabulary)
    has_few_B, has_many_B = (top_k_B > 0) & (top_k_B <= few), top_k_B > few
    has_all_B = top_k_B == 0

    def sampled(uses_B: jax.Array, candidates: int | None) -> jax.Array:
        uses_B &= ~rows.is_greedy_B
        drawn = lambda: _draw(logits_BV, keys_B, top_k_B, candidates, uses_B, rows)  # noqa: E731
        return jax.lax.cond(jnp.any(uses_B), drawn, lambda: none_B)

    token_B = jnp.where(has_all_B, sampled(has_all_B, None), sampled(has_few_B, few))
    if few < vocabulary:
        token_B = jnp.where(has_many_B, sampled(has_many_B, vocabulary), token_B)
    return jnp.where(rows.is_greedy_B, greedy_B, token_B)


def _with_history(
    logits_BV: jax.Array, history: History, slot_B: jax.Array, rows: RowSettings, earlier_BN: jax.Array
) -> jax.Array:
    """Applies penalties and biases to the rows that have some."""
    seen_BV, counts_BV, bias_BV = (x_BV[slot_B] for x_BV in history)
    number, vocabulary = logits_BV.shape
    token_BN = jnp.where(earlier_BN < 0, vocabulary, earlier_BN)  # padding is out of range, and dropped
    counts_BV = counts_BV.at[jnp.arange(number)[:, None], token_BN].add(1, mode="drop")
    penalised_BV = penalise(logits_BV, seen_BV | (counts_BV > 0), rows.repetition_penalty_B[:, None])
    penalised_BV -= rows.frequency_penalty_B[:, None] * counts_BV
    penalised_BV -= rows.presence_penalty_B[:, None] * (counts_BV > 0)
    return jnp.where(rows.has_history_B[:, None], penalised_BV + bias_BV, logits_BV)


def _draw(
    logits_BV: jax.Array,
    keys_B: jax.Array,
    top_k_B: jax.Array,
    candidates: int | None,
    uses_B: jax.Array,
    rows: RowSettings,
) -> jax.Array:
    """Samples from the `candidates` most probable tokens, of which `top_k_B` remain; None: from all."""
    # The maximum is subtracted before the division, so that a tiny temperature gives 0 and -inf, the greedy choice.
    scaled_BV = (logits_BV - jnp.max(logits_BV, axis=-1, keepdims=True)) / rows.temperature_B[:, None]
    scaled_BC, token_BC = scaled_BV, None
    if candidates is not None:
        scaled_BC, token_BC = jax.lax.top_k(scaled_BV, candidates)
        scaled_BC = jnp.where(jnp.arange(candidates)[None] < top_k_B[:, None], scaled_BC, -jnp.inf)
    uses_top_p_B = uses_B & (rows.top_p_B < 1)

    def within_top_p() -> jax.Array:
        kept_BC = top_p_mask(scaled_BC, rows.top_p_B[:, None]) | ~uses_top_p_B[:, None]
        return jnp.where(kept_BC, scaled_BC, -jnp.inf)

    scaled_BC = jax.lax.cond(jnp.any(uses_top_p_B), within_top_p, lambda: scaled_BC)
    least_B1 = jnp.max(scaled_BC, axis=-1, keepdims=True) + jnp.log(rows.min_p_B)[:, None]
    scaled_BC = jnp.where(scaled_BC < least_B1, -jnp.inf, scaled_BC)
    return draw(scaled_BC, token_BC, keys_B)


def top_logprobs(logits_BV: jax.Array, wanted_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The most probable tokens of rows that want some: float32 log-probabilities and int32 tokens, (B, C) each.

    Zeros for all rows where none wants any.
    """
    number = min(MOST_TOP_LOGPROBS, logits_BV.shape[-1])

    def largest() -> tuple[jax.Array, jax.Array]:
        logits_BC, token_BC = jax.lax.top_k(logits_BV, number)
        return logits_BC - jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True), token_BC

    shape = (len(logits_BV), number)
    nothing = lambda: (jnp.zeros(shape, jnp.float32), jnp.zeros(shape, jnp.int32))  # noqa: E731
    return jax.lax.cond(jnp.any(wanted_B), largest, nothing)
