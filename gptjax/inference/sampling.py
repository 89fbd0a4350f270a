"""Sampling text from a model."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.models.gpt import GPT, head_embedding, hidden_states, unembed


def sample_token(logits_BV: jax.Array, rng: jax.Array, temperature: float, top_k: int | None) -> jax.Array:
    """A next token of each row, int32 (B,): the likeliest at temperature 0, else drawn from the `top_k` likeliest."""
    if temperature == 0:
        return jnp.argmax(logits_BV, axis=-1).astype(jnp.int32)
    if top_k is not None and top_k < logits_BV.shape[-1]:
        least_B1 = jax.lax.top_k(logits_BV, top_k)[0][:, -1:]
        logits_BV = jnp.where(logits_BV < least_B1, -jnp.inf, logits_BV)
    return jax.random.categorical(rng, logits_BV / temperature).astype(jnp.int32)


@partial(jax.jit, static_argnums=(0, 4, 5, 6))
def _continue(
    model: GPT,
    params: Any,
    window_BT: jax.Array,
    rng_and_length: tuple[jax.Array, jax.Array],
    num_tokens: int,
    temperature: float,
    top_k: int | None,
) -> jax.Array:
    """`num_tokens` new tokens, int32 (num_tokens, B), after the first `length` of each row of the window."""
    rng, length = rng_and_length

    def step(carry: tuple[jax.Array, jax.Array], i: jax.Array) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        window_BT, length = carry
        x_BTD = hidden_states(model, params, window_BT)
        logits_BV = unembed(x_BTD[:, length - 1], head_embedding(params), model.config.precision)
        token_B = sample_token(logits_BV, jax.random.fold_in(rng, i), temperature, top_k)
        full = length == window_BT.shape[1]
        window_BT = jnp.where(full, jnp.roll(window_BT, -1, axis=1), window_BT)
        length = jnp.where(full, length, length + 1)
        return (window_BT.at[:, length - 1].set(token_B), length), token_B

    _, tokens_NB = jax.lax.scan(step, (window_BT, length), jnp.arange(num_tokens))
    return tokens_NB


def generate(
    model: GPT,
    params: Any,
    prompt: np.ndarray,
    num_tokens: int,
    *,
    seed: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    batch_size: int = 1,
) -> np.ndarray:
    """Continuations of one prompt.

    Every token runs the whole window through the model. Text longer than the context keeps its last `context_length`
    tokens: the window slides.

    Args:
      model, params: params as `model.init` makes them, unboxed.
      prompt: int (P,), at least one token (end-of-text starts a document).
      num_tokens: new tokens.
      seed: of the draws.
      temperature: 0 takes the likeliest token.
      top_k: draw from the k likeliest only; None: from all.
      batch_size: continuations; a multiple of the mesh's batch shards.

    Returns:
      int32 (batch_size, num_tokens).
    """
    context = model.config.context_length
    prompt = prompt[-context:]
    window_BT = np.zeros((batch_size, context), np.int32)
    window_BT[:, : len(prompt)] = prompt
    start = (jax.random.key(seed), jnp.int32(len(prompt)))
    return np.asarray(_continue(model, params, window_BT, start, num_tokens, temperature, top_k)).T
