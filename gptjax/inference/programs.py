"""The two compiled programs of generation: one reads prompts, the other draws token after token on the device.

They are compiled once for each bucket of shapes; how many tokens a call draws, and which tokens end a text, are no part
of that.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from gptjax.inference.sampling import Form, Knobs, sample
from gptjax.models.decoding import Cache, decode, logits, prefill, unstack
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import constrain

MOST_TOKENS = 32  # that one call draws: enough to hide what a call costs, few enough for Ctrl-C to be heard


class DecodingProgram(NamedTuple):
    """What they are compiled for, besides shapes."""

    model: GPT
    form: Form
    slots: int


class Draw(NamedTuple):
    """What a draw depends on, besides logits."""

    seeds_B: npt.NDArray[np.uint32]
    number: np.int32 | jax.Array  # of the token among the new ones
    knobs: Knobs
    ends_N: npt.NDArray[np.int32]  # tokens that end a text; -1 is none


class DecodingCache(NamedTuple):
    """What goes from one token to the next; donated."""

    cache: Cache
    token_B: jax.Array  # int32, drawn last and not yet read
    ended_B: jax.Array  # bool: one of `ends_N` was drawn
    seen_BV: jax.Array | None  # bool, for the repetition penalty


class Drawn(NamedTuple):
    """Tokens of each row, int32, and their float32 log-probabilities; whole on every device: any process reads it."""

    token_NB: jax.Array
    logprob_NB: jax.Array


@partial(jax.jit, static_argnums=0)
def read_prompts(
    program: DecodingProgram,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    ended_B: jax.Array,
    seen_BV: jax.Array | None,
    draw: Draw,
) -> tuple[DecodingCache, Drawn]:
    """Reads the prompts and draws the first new token of each, N = 1."""
    params = unstack(program.model.config, params)
    x_BD, cache = prefill(program.model, params, constrain(tokens_BT, "batch", None), lengths_B, program.slots)
    memory, logprob_B = _draw(program, params, x_BD, cache, ended_B, seen_BV, draw)
    return memory, Drawn(memory.token_B[None], logprob_B[None])


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def draw_tokens(
    program: DecodingProgram, params: Any, memory: DecodingCache, position_B: jax.Array, count: jax.Array, draw: Draw
) -> tuple[DecodingCache, Drawn]:
    """Reads the token drawn last, at `position_B`, and draws the next, `count` times or until every row has ended.

    One call for many tokens: the host's part of a call takes longer than a GPU needs for a token of a small model.

    Args:
      count: at most MOST_TOKENS, which is N; the rest of what is returned is zeros.
    """
    params = unstack(program.model.config, params)

    def more(state: tuple[jax.Array, DecodingCache, Drawn]) -> jax.Array:
        i, memory, _ = state
        return (i < count) & ~jnp.all(memory.ended_B)

    def one(state: tuple[jax.Array, DecodingCache, Drawn]) -> tuple[jax.Array, DecodingCache, Drawn]:
        i, memory, drawn = state
        x_BD, cache = decode(program.model, params, memory.cache, memory.token_B, position_B + i)
        this = draw._replace(number=draw.number + i)
        memory, logprob_B = _draw(program, params, x_BD, cache, memory.ended_B, memory.seen_BV, this)
        put = jax.lax.dynamic_update_index_in_dim
        return i + 1, memory, Drawn(put(drawn.token_NB, memory.token_B, i, 0), put(drawn.logprob_NB, logprob_B, i, 0))

    shape = (MOST_TOKENS, len(position_B))
    nothing = Drawn(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, memory, drawn = jax.lax.while_loop(more, one, (jnp.int32(0), memory, nothing))
    return memory, Drawn(constrain(drawn.token_NB, None, None), constrain(drawn.logprob_NB, None, None))


def _draw(
    program: DecodingProgram,
    params: Any,
    x_BD: jax.Array,
    cache: Cache,
    ended_B: jax.Array,
    seen_BV: jax.Array | None,
    draw: Draw,
) -> tuple[DecodingCache, jax.Array]:
    """Draws the next token of each row: the memory with it, and its log-probability."""
    logits_BV = logits(program.model, params, x_BD)
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), draw.number))(draw.seeds_B)
    token_B = sample(logits_BV, seen_BV, keys_B, program.form, draw.knobs)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    token_B = constrain(token_B, None)
    ended_B = ended_B | jnp.any(token_B[:, None] == draw.ends_N[None], axis=-1)
    return DecodingCache(cache, token_B, ended_B, seen_BV), constrain(logprob_B, None)
