"""Incremental decoding: prefill reads the prompts and fills a key-value cache, decode reads one more token a row.

`read` does both with a cache in pages: it reads any number of tokens of each row, at any positions.

It applies the `Block` of training layer by layer to unstacked parameters: a loop over stacked layers would copy each
layer's weights out of the stack for every token.
"""

from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.models.attention import KeyValues, LayerCache
from gptjax.models.embedding import embed, image_slots, value_embeddings
from gptjax.models.few_rows import dense_products, few_rows_product, is_output_major
from gptjax.models.gpt import GPT, Block, head_embedding, head_logits, layer_inputs, soft_capped
from gptjax.models.layer_inputs import LayerInputs
from gptjax.models.paged_attention import PagedKeyValues, Pages
from gptjax.parallel.mesh import constrain

Cache = list[KeyValues]  # one for each layer
PagedCache = list[PagedKeyValues]  # one for each layer


def unstack(config: GPTConfig, params: Any) -> Any:
    """Converts the stacked `layers` of `params` to a list of one tree a layer, as `prefill` and `decode` need them.

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


def forward(
    model: GPT,
    params: Any,
    tokens_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    images_BNX: jax.Array | None = None,
) -> tuple[jax.Array, list[KeyValues]]:
    """The output of the last layer (B, T, D), and the keys and values of every layer.

    Args:
      params: unstacked.
      tokens_BT: int, T at most `context_length`.
      segments_BT: as in `attention_mask`.
      images_BNX: as in `GPT.hidden`.
    """
    positions_BT = jnp.arange(tokens_BT.shape[1])[None]
    images = None
    if images_BNX is not None:
        images = image_tokens(model, params, images_BNX), image_slots(model.config, tokens_BT)
    x_BTD, inputs = embedded(model, params, tokens_BT, positions_BT, segments_BT, images)
    layers = []
    for block, layer, given in zip(blocks(model.config), params["layers"], inputs, strict=True):
        x_BTD, key_values = _apply(block, layer, x_BTD, given)
        layers.append(key_values)
    return x_BTD, layers


def prefill(
    model: GPT,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    slots: int,
    images_BNX: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """Runs the model on prompts, and fills the cache. A prompt is the prefix of a prefix language model.

    Args:
      params: unstacked.
      tokens_BT: int, T at most `context_length`; shorter rows are padded at the end, with any token.
      lengths_B: int, tokens in each row, at least 1.
      slots: size of the cache of a dense layer, at least the length of all text to decode; the cache of a banded
        layer is no larger than its band.
      images_BNX: as in `GPT.hidden`.

    Returns:
      The output of the last layer at each row's last token (B, D), and the cache.
    """
    segments_BT = None
    if "prefix" in model.config.attention_pattern:
        segments_BT = jnp.where(jnp.arange(tokens_BT.shape[1])[None] < lengths_B[:, None], -1, 0)
    x_BTD, layers = forward(model, params, tokens_BT, segments_BT, images_BNX)
    cache = []
    for block, key_values in zip(blocks(model.config), layers, strict=True):
        kept = min(slots, model.config.band_width) if block.attention == "banded" else slots
        cache.append(_constrain_cache(key_values.as_cache(lengths_B, kept)))
    last_BD = jnp.take_along_axis(x_BTD, (lengths_B - 1)[:, None, None], axis=1)[:, 0]
    return last_BD, cache


def decode(
    model: GPT, params: Any, cache: Cache, token_B: jax.Array, positions_B: jax.Array
) -> tuple[jax.Array, Cache]:
    """Runs the model on one more token of each row.

    Args:
      params: unstacked.
      token_B: int, each row's token at `positions_B`, the position after those read so far.

    Returns:
      The output of the last layer (B, D), and the cache with the token in it.
    """
    x_B1D, inputs = embedded(model, params, token_B[:, None], positions_B[:, None])
    written = []
    for block, layer, given, key_values in zip(blocks(model.config), params["layers"], inputs, cache, strict=True):
        x_B1D, key_values = _apply(block, layer, x_B1D, given.replace(positions_B=positions_B), key_values)
        written.append(_constrain_cache(key_values))
    return x_B1D[:, 0], written


def empty_pages(config: GPTConfig, num_pages: int, page_size: int) -> PagedCache:
    """A cache of zeros with pages of `page_size` positions; page 0 is scratch space."""
    shape = (num_pages, config.kv_heads, page_size, config.head_dim)
    return [
        PagedKeyValues(*(constrain_pages(jnp.zeros(shape, config.dtype)) for _ in range(2)))
        for _ in range(config.num_layers)
    ]


def read(
    model: GPT,
    params: Any,
    cache: PagedCache,
    tokens_BT: jax.Array,
    pages: Pages,
    images: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, PagedCache]:
    """Runs the model on T more tokens of each row.

    Args:
      params: unstacked.
      tokens_BT: int, with any token at padding.
      images: as in `gptjax.models.embedding.embed`.

    Returns:
      The output of the last layer (B, T, D), and the cache with the tokens in it.
    """
    x_BTD, inputs = embedded(model, params, tokens_BT, pages.positions_BT, images=images)
    written = []
    for block, layer, given, pool in zip(blocks(model.config), params["layers"], inputs, cache, strict=True):
        x_BTD, pool = _apply(block, layer, x_BTD, given.replace(pages=pages), pool)
        written.append(jax.tree.map(constrain_pages, pool))
    return x_BTD, written


def logits(model: GPT, params: Any, x_BD: jax.Array) -> jax.Array:
    """Logits, float32 (..., V), from the output (..., D) of `forward`, `prefill` or `decode`."""
    x_BD = cast(jax.Array, model.apply({"params": params}, x_BD, method="normalise"))
    if not is_output_major():
        return head_logits(model.config, params, x_BD)
    head_VD = nn.unbox(head_embedding(params)).astype(x_BD.dtype)
    x_ND = x_BD.reshape(-1, x_BD.shape[-1])
    logits_NV = few_rows_product(x_ND, head_VD, model.config.precision, jnp.dtype(jnp.float32))
    return soft_capped(logits_NV, model.config.logit_soft_cap).reshape(*x_BD.shape[:-1], -1)


def blocks(config: GPTConfig) -> list[Block]:
    """The layers, in their order."""
    pattern = config.attention_pattern
    return [Block(config, pattern[layer % len(pattern)]) for layer in range(config.num_layers)]


def _apply(
    block: Block, layer: Any, x_BTD: jax.Array, inputs: LayerInputs, cache: LayerCache | None = None
) -> tuple[jax.Array, Any]:
    deterministic = True
    with dense_products():
        return cast(Any, block.apply({"params": layer}, x_BTD, inputs, deterministic, cache))


def image_tokens(model: GPT, params: Any, images_BNX: jax.Array) -> jax.Array:
    """The tokens of images, (B, N * tokens_per_image, D), as `GPT.image_tokens` computes them."""
    return cast(jax.Array, model.apply({"params": params}, images_BNX, method="image_tokens"))


def embedded(
    model: GPT,
    params: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    images: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, list[LayerInputs]]:
    """The input of the first layer, and the further inputs of each layer; `images` as in `embed`."""
    config = model.config
    names = [name for name in ("token", "position", "value") if f"{name}_embedding" in params]
    tables = {name: params[f"{name}_embedding"]["embedding"] for name in names}
    x_BTD = embed(config, tables["token"], tables.get("position"), tokens_BT, positions_BT, images=images)
    values = value_embeddings(config, tables.get("value"), tokens_BT)
    inputs = layer_inputs(config, x_BTD, positions_BT, segments_BT)
    return x_BTD, [inputs.replace(value_BTHK=values.get(layer)) for layer in range(config.num_layers)]


def _constrain_cache(key_values: KeyValues) -> KeyValues:
    """Shards a cache over the mesh as the activations in it; slots are not sharded."""
    return jax.tree.map(lambda x_BHSK: constrain(x_BHSK, "batch", "kv_heads", None, None), key_values)


def constrain_pages(x_NHCK: jax.Array) -> jax.Array:
    """Shards a pool of pages over its heads; any row may use any page."""
    return constrain(x_NHCK, None, "kv_heads", None, None)
