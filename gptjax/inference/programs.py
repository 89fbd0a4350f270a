"""The two compiled programs of generation: prefill of the prompts, and a loop on the device that decodes tokens.

They are compiled once for each bucket of shapes. The number of tokens of a call, the sampling settings and the tokens
that end a completion are arguments, so changing them does not recompile.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from gptjax.inference.sampling import SamplingValues, StaticSampling, sample
from gptjax.models.decoding import Cache, decode, logits, prefill, unstack
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import constrain

# Maximum tokens of one call: enough to hide the overhead of a call, few enough that Ctrl-C takes effect soon.
MOST_TOKENS = 32


class DecodingSettings(NamedTuple):
    """Static arguments of the compiled programs.

    Attributes:
      model: the model to decode with.
      static: static part of the sampling settings.
      slots: positions of the key-value cache.
    """

    model: GPT
    static: StaticSampling
    slots: int


class SamplingInputs(NamedTuple):
    """Arguments of sampling other than the logits.

    Attributes:
      seeds_B: sampling seed of each row.
      number: index of the token within the completion, int32.
      values: numeric sampling settings.
      ends_N: int32, tokens that end a completion; -1 pads.
    """

    seeds_B: npt.NDArray[np.uint32]
    number: np.int32 | jax.Array
    values: SamplingValues
    ends_N: npt.NDArray[np.int32]


class DecodingCache(NamedTuple):
    """State carried from one token to the next: the key-value cache and the last sampled tokens; donated.

    Attributes:
      cache: keys and values of the tokens read so far.
      token_B: int32, the token sampled last, which the model has not read yet.
      ended_B: bool, whether the row has sampled one of `ends_N`.
      seen_BV: bool, tokens that the repetition penalty applies to; None without a penalty.
    """

    cache: Cache
    token_B: jax.Array
    ended_B: jax.Array
    seen_BV: jax.Array | None


class SampledTokens(NamedTuple):
    """N sampled tokens of each row, int32, and their float32 log-probabilities; replicated on all devices."""

    token_NB: jax.Array
    logprob_NB: jax.Array


@partial(jax.jit, static_argnums=0)
def prefill_prompts(
    program: DecodingSettings,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    ended_B: jax.Array,
    seen_BV: jax.Array | None,
    inputs: SamplingInputs,
    images_BNX: jax.Array | None = None,
) -> tuple[DecodingCache, SampledTokens]:
    """Prefills the prompts and samples the first token of each completion, N = 1.

    Args:
      images_BNX: as in `GPT.hidden`; None: the prompts have no images.
    """
    params = unstack(program.model.config, params)
    tokens_BT = constrain(tokens_BT, "batch", None)
    x_BD, cache = prefill(program.model, params, tokens_BT, lengths_B, program.slots, images_BNX)
    memory, logprob_B = _sample(program, params, x_BD, cache, ended_B, seen_BV, inputs)
    return memory, SampledTokens(memory.token_B[None], logprob_B[None])


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def decode_tokens(
    program: DecodingSettings,
    params: Any,
    memory: DecodingCache,
    position_B: jax.Array,
    count: jax.Array,
    inputs: SamplingInputs,
) -> tuple[DecodingCache, SampledTokens]:
    """Decodes `count` tokens of each row, or until every row has ended.

    One call decodes many tokens because the host's overhead of a call exceeds a GPU's time per token of a small model.

    Args:
      position_B: position of the token sampled last, which is read first.
      count: at most MOST_TOKENS, which is N; unused entries of the result are zeros.
    """
    params = unstack(program.model.config, params)

    def more(state: tuple[jax.Array, DecodingCache, SampledTokens]) -> jax.Array:
        i, memory, _ = state
        return (i < count) & ~jnp.all(memory.ended_B)

    def one(state: tuple[jax.Array, DecodingCache, SampledTokens]) -> tuple[jax.Array, DecodingCache, SampledTokens]:
        i, memory, sampled = state
        x_BD, cache = decode(program.model, params, memory.cache, memory.token_B, position_B + i)
        this = inputs._replace(number=inputs.number + i)
        memory, logprob_B = _sample(program, params, x_BD, cache, memory.ended_B, memory.seen_BV, this)
        put = jax.lax.dynamic_update_index_in_dim
        return (
            i + 1,
            memory,
            SampledTokens(put(sampled.token_NB, memory.token_B, i, 0), put(sampled.logprob_NB, logprob_B, i, 0)),
        )

    shape = (MOST_TOKENS, len(position_B))
    nothing = SampledTokens(jnp.zeros(shape, jnp.int32), jnp.zeros(shape, jnp.float32))
    _, memory, sampled = jax.lax.while_loop(more, one, (jnp.int32(0), memory, nothing))
    return memory, SampledTokens(constrain(sampled.token_NB, None, None), constrain(sampled.logprob_NB, None, None))


def _sample(
    program: DecodingSettings,
    params: Any,
    x_BD: jax.Array,
    cache: Cache,
    ended_B: jax.Array,
    seen_BV: jax.Array | None,
    inputs: SamplingInputs,
) -> tuple[DecodingCache, jax.Array]:
    """Samples the next token of each row; returns the updated state and the token's log-probability."""
    logits_BV = logits(program.model, params, x_BD)
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), inputs.number))(inputs.seeds_B)
    token_B = sample(logits_BV, seen_BV, keys_B, program.static, inputs.values)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    token_B = constrain(token_B, None)
    ended_B = ended_B | jnp.any(token_B[:, None] == inputs.ends_N[None], axis=-1)
    return DecodingCache(cache, token_B, ended_B, seen_BV), constrain(logprob_B, None)
