"""The compiled programs of continuous batching: reading chunks of prompts, and decoding tokens of all rows.

Reading fills pages of the cache; the last token of a prompt is read by the decoding program, which samples. Every
setting of a row is an argument, so nothing but the number of rows and the length of the chunks compiles again.

Speculative decoding needs no program of its own. A proposed token is one more row of the decoding program, with the
pages and the settings of its request, one position later. A layer writes the keys and values of all rows before any row
reads them, so a row sees the proposals before its own.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.inference.row_sampling import (
    MOST_TOP_LOGPROBS,
    History,
    RowSettings,
    replicated,
    sample_rows,
    top_logprobs,
)
from gptjax.models import row_adapters
from gptjax.models.decoding import PagedCache, constrain_pages, empty_pages, image_tokens, logits, read, unstack
from gptjax.models.embedding import image_slots
from gptjax.models.gpt import GPT
from gptjax.models.paged_attention import Pages
from gptjax.parallel.mesh import constrain

MOST_STEPS = 8  # maximum tokens of a row in one call of `decode_rows`
MOST_PROPOSALS = MOST_STEPS - 1  # maximum proposed tokens of a request in one call


def batch_sizes(least: int, rows: int, most: int) -> list[int]:
    """The sizes of a batch for which programs are compiled: powers of two, `rows` and `most`; the smallest first."""
    powers = {2**i for i in range(most.bit_length())}
    return sorted(size for size in powers | {rows, most} if size >= min(least, rows))


class BatchState(NamedTuple):
    """Arrays on the device that the programs update; donated."""

    cache: PagedCache
    history: History


class Rows(NamedTuple):
    """The rows of a call, B of them, as numpy arrays of the host; int32 unless stated.

    Attributes:
      slot_B: the row of the history.
      table_BN: the pages of the row.
      token_B: the token that is read first, at `position_B`.
      number_B: tokens sampled so far.
      left_B: tokens that the row may still sample; 0: it is unused.
      ends_BN: tokens that end a completion; -1 pads.
      top_B: bool, whether the most probable tokens are returned.
      adapter_B: the adapter, 0 for the base model.
      earlier_BN: where `token_B` is the i-th token that is proposed for a request, the first i proposals; -1 pads.
        The rows of a request follow each other.
      settings: sampling settings.
    """

    slot_B: Any
    table_BN: Any
    token_B: Any
    position_B: Any
    number_B: Any
    left_B: Any
    ends_BN: Any
    top_B: Any
    adapter_B: Any
    earlier_BN: Any
    settings: RowSettings


class Sampled(NamedTuple):
    """What N steps sampled; replicated on all devices, or arrays of the host.

    Attributes:
      token_NB: int32.
      logprob_NB: float32, log-probabilities under the model, before all sampling settings.
      top_logprob_NBC: float32, those of the most probable tokens.
      top_token_NBC: int32, the most probable tokens.
    """

    token_NB: Any
    logprob_NB: Any
    top_logprob_NBC: Any
    top_token_NBC: Any


class ChunkRows(NamedTuple):
    """Chunks of prompts that one call reads, one in each row: int32 numpy arrays of the host.

    Attributes:
      tokens_BT: the tokens, then padding.
      start_B: the position of the first token.
      count_B: tokens without padding; 0: the row is unused.
      table_BN: the pages of the row.
      prefix_B: positions of the prompt that attend to each other in both directions.
      adapter_B: the adapter, 0 for the base model.
    """

    tokens_BT: Any
    start_B: Any
    count_B: Any
    table_BN: Any
    prefix_B: Any
    adapter_B: Any


class ChunkImages(NamedTuple):
    """The images of a prompt, for the program that reads a chunk of it.

    Attributes:
      tokens_1ND: the tokens of all images, as `encode_images` returns them.
      before: int32, the image tokens before the chunk.
    """

    tokens_1ND: Any
    before: Any


class _Loop(NamedTuple):
    """The state of the decoding loop."""

    i: jax.Array
    state: BatchState
    token_B: jax.Array
    steps_B: jax.Array  # tokens sampled in this call
    is_active_B: jax.Array
    sampled: Sampled


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def empty_state(model: GPT, rows: int, num_pages: int, page_size: int) -> BatchState:
    """The state of an engine without requests, sharded as the other programs return it."""
    shape = (rows, model.config.vocab_size)
    history = History(*(jnp.zeros(shape, dtype) for dtype in (jnp.bool_, jnp.int32, jnp.float32)))
    return BatchState(empty_pages(model.config, num_pages, page_size), replicated(history))


@partial(jax.jit, static_argnums=0)
def encode_images(model: GPT, params: Any, images_1NX: jax.Array) -> jax.Array:
    """The tokens of the images of a prompt, (1, N * tokens_per_image, D)."""
    return constrain(image_tokens(model, params, images_1NX), None, None, None)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def read_chunks(
    model: GPT, params: Any, cache: PagedCache, chunks: ChunkRows, images: ChunkImages | None = None
) -> tuple[PagedCache, jax.Array]:
    """Reads chunks of the prompts of B rows.

    Args:
      images: of the prompt of the only row; None: there are none.

    Returns:
      The cache, and the output of the last layer (B, T, D).
    """
    index_1T = jnp.arange(chunks.tokens_BT.shape[1], dtype=jnp.int32)[None]
    is_token_BT = index_1T < chunks.count_B[:, None]
    pages = Pages(chunks.table_BN, chunks.start_B[:, None] + index_1T, is_token_BT, chunks.prefix_B)
    placed = None
    if images is not None:
        slot_BT = image_slots(model.config, chunks.tokens_BT)
        placed = images.tokens_1ND, jnp.where((slot_BT >= 0) & is_token_BT, images.before + slot_BT, -1)
    with row_adapters.applied(chunks.adapter_B):
        x_BTD, cache = read(model, unstack(model.config, params), cache, chunks.tokens_BT, pages, placed)
    return cache, constrain(x_BTD, None, None, None)


@partial(jax.jit, static_argnums=0)
def score_chunk(
    model: GPT, params: Any, x_BTD: jax.Array, row: jax.Array, next_T: jax.Array, wants_top: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Log-probabilities (T,) of the tokens after those of a chunk, and the most probable tokens with theirs, (T, C).

    Args:
      x_BTD: as `read_chunks` returns it.
      row: that of the chunk.
    """
    logits_TV = logits(model, params, x_BTD[row])
    chosen_T = jnp.take_along_axis(logits_TV, next_T[:, None], axis=-1)[:, 0]
    top = top_logprobs(logits_TV, wants_top[None])
    return chosen_T - jax.nn.logsumexp(logits_TV, axis=-1), *top


@partial(jax.jit, donate_argnums=0)
def set_history(history: History, slot: jax.Array, seen_V: jax.Array, bias_V: jax.Array) -> History:
    """Sets a row of the history to that of a new request."""
    seen_BV, counts_BV, bias_BV = history
    return replicated(History(seen_BV.at[slot].set(seen_V), counts_BV.at[slot].set(0), bias_BV.at[slot].set(bias_V)))


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_rows(
    model: GPT, params: Any, state: BatchState, rows: Rows, allowed_BV: jax.Array, count: jax.Array
) -> tuple[BatchState, Sampled]:
    """Decodes `count` tokens of each row, or until every row has ended or sampled `left_B` tokens.

    Args:
      allowed_BV: bool, tokens that may be sampled.
      count: at most MOST_STEPS, which is N; unused entries of the result are zeros. 1 if there are proposals.
    """
    params = unstack(model.config, params)

    def more(loop: _Loop) -> jax.Array:
        return (loop.i < count) & jnp.any(loop.is_active_B)

    def one(loop: _Loop) -> _Loop:
        position_B1 = (rows.position_B + loop.steps_B)[:, None]
        prefix_B = jnp.zeros_like(loop.steps_B)  # what is read here attends to all before it
        pages = Pages(rows.table_BN, position_B1, loop.is_active_B[:, None], prefix_B)
        with row_adapters.applied(rows.adapter_B):
            x_B1D, cache = read(model, params, loop.state.cache, loop.token_B[:, None], pages)
        logits_BV = logits(model, params, x_B1D[:, 0])
        history, number_B = loop.state.history, rows.number_B + loop.steps_B
        token_B = sample_rows(logits_BV, history, rows.slot_B, allowed_BV, rows.settings, number_B, rows.earlier_BN)
        token_B = constrain(token_B, None)
        chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
        logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
        step = (token_B, logprob_B, *top_logprobs(logits_BV, rows.top_B))
        counted_B = loop.is_active_B & _follows_accepted(loop.token_B, token_B, rows.earlier_BN)
        counts_BV = history.counts_BV.at[rows.slot_B, token_B].add(counted_B.astype(jnp.int32))
        steps_B = loop.steps_B + loop.is_active_B
        has_ended_B = jnp.any(token_B[:, None] == rows.ends_BN, axis=-1) | (steps_B >= rows.left_B)
        put = jax.lax.dynamic_update_index_in_dim
        return _Loop(
            loop.i + 1,
            BatchState(cache, history._replace(counts_BV=counts_BV)),
            token_B,
            steps_B,
            loop.is_active_B & ~has_ended_B,
            Sampled(*(put(all_, this, loop.i, 0) for all_, this in zip(loop.sampled, step, strict=True))),
        )

    shape = (MOST_STEPS, len(rows.slot_B))
    top = (*shape, min(MOST_TOP_LOGPROBS, allowed_BV.shape[-1]))
    nothing = Sampled(jnp.zeros(shape, jnp.int32), jnp.zeros(shape), jnp.zeros(top), jnp.zeros(top, jnp.int32))
    start = jnp.int32(0)
    loop = _Loop(start, state, rows.token_B, jnp.zeros_like(rows.left_B), rows.left_B > 0, nothing)
    loop = jax.lax.while_loop(more, one, loop)
    # The state keeps its shardings, so that the next call compiles nothing.
    state = BatchState(jax.tree.map(constrain_pages, loop.state.cache), replicated(loop.state.history))
    return state, Sampled(*(constrain(x, *(None,) * x.ndim) for x in loop.sampled))


def _follows_accepted(read_B: jax.Array, sampled_B: jax.Array, earlier_BN: jax.Array) -> jax.Array:
    """Whether the proposals that a row depends on are the tokens that were sampled in their places, bool (B,).

    Args:
      read_B: tokens that the rows read.
      sampled_B: tokens that the rows sampled.
    """
    index_B = jnp.sum(earlier_BN >= 0, axis=1)
    is_wrong_B = (index_B > 0) & (read_B != jnp.roll(sampled_B, 1))
    wrong_B = jnp.cumsum(is_wrong_B)
    first_B = jnp.arange(len(index_B)) - index_B  # the row of the request's last token, which is not wrong
    return wrong_B == wrong_B[first_B]
