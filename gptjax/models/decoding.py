"""The model one token at a time: prefill reads the prompts and fills a key-value cache, decode goes on from it.

The same `Block` as in training, applied layer by layer to parameters that lie apart: a loop over stacked layers would
copy each layer's weights out of the stack for every token.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.models.attention import KeyValues
from gptjax.models.gpt import GPT, Block, embed, head_embedding, unembed
from gptjax.parallel.mesh import constrain

Cache = list[KeyValues]  # of each layer


def unstack(config: GPTConfig, params: Any) -> Any:
    """`params` with the stacked `layers` as a list of one tree a layer: what `prefill` and `decode` take.

    Parameters that are unstacked already are returned as they are.
    """
    if isinstance(params["layers"], list):
        return params
    period = len(config.attention_pattern)
    layers = [
        jax.tree.map(lambda p: p[layer // period], params["layers"][f"block_{layer % period}"])  # noqa: B023
        for layer in range(config.num_layers)
    ]
    return {**params, "layers": layers}


def forward(model: GPT, params: Any, tokens_BT: jax.Array) -> tuple[jax.Array, list[KeyValues]]:
    """What the last layer writes (B, T, D), and the keys and values of every layer.

    Args:
      params: unstacked.
      tokens_BT: int, T at most `context_length`.
    """
    x_BTD = _embed(model, params, tokens_BT, jnp.arange(tokens_BT.shape[1])[None])
    layers = []
    for block, layer in zip(_blocks(model.config), params["layers"], strict=True):
        x_BTD, key_values = _apply(block, layer, x_BTD)
        layers.append(key_values)
    return x_BTD, layers


def prefill(model: GPT, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, slots: int) -> tuple[jax.Array, Cache]:
    """Reads prompts.

    Args:
      params: unstacked.
      tokens_BT: int, T at most `context_length`; rows shorter than T are padded behind, with any token.
      lengths_B: int, each row's tokens, at least 1.
      slots: positions that the cache of a dense layer will hold, at least all that will be decoded; a banded layer's
        holds no more than its band.

    Returns:
      What the last layer writes at each row's last token (B, D), and the cache.
    """
    x_BTD, layers = forward(model, params, tokens_BT)
    cache = []
    for block, key_values in zip(_blocks(model.config), layers, strict=True):
        kept = min(slots, model.config.band_width) if block.attention == "banded" else slots
        cache.append(_spread(key_values.as_cache(lengths_B, kept)))
    last_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return last_BD, cache


def decode(
    model: GPT, params: Any, cache: Cache, token_B: jax.Array, positions_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """Reads one more token of each row.

    Args:
      params: unstacked.
      token_B: int, each row's token at `positions_B`, the position after those read so far.

    Returns:
      What the last layer writes (B, D), and the cache with the token in it.
    """
    x_B1D = _embed(model, params, token_B[:, None], positions_B[:, None])
    written = []
    for block, layer, key_values in zip(_blocks(model.config), params["layers"], cache, strict=True):
        x_B1D, key_values = _apply(block, layer, x_B1D, key_values, positions_B)
        written.append(_spread(key_values))
    return x_B1D[:, 0], written


def logits(model: GPT, params: Any, x_BD: jax.Array) -> jax.Array:
    """What the head says, float32 (..., V), to what `forward`, `prefill` or `decode` returned, (..., D)."""
    x_BD = cast(jax.Array, model.apply({"params": params}, x_BD, method="normalise"))
    return unembed(x_BD, nn.unbox(head_embedding(params)), model.config.precision)


def _blocks(config: GPTConfig) -> list[Block]:
    pattern = config.attention_pattern
    return [Block(config, pattern[layer % len(pattern)]) for layer in range(config.num_layers)]


def _apply(block: Block, layer: Any, x_BTD: jax.Array, *cached: Any) -> tuple[jax.Array, KeyValues]:
    segments, deterministic = None, True
    return cast(Any, block.apply({"params": layer}, x_BTD, segments, deterministic, *cached))


def _embed(model: GPT, params: Any, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
    token_VD, position_PD = (params[name]["embedding"] for name in ("token_embedding", "position_embedding"))
    return embed(model.config, token_VD, position_PD, tokens_BT, positions_BT)


def _spread(key_values: KeyValues) -> KeyValues:
    """A cache laid out over the mesh like the activations it keeps; the slots of a ring stay together."""
    return jax.tree.map(lambda x_BHSK: constrain(x_BHSK, "batch", "heads", None, None), key_values)
