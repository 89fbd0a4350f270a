"""Token and position embeddings: the input of the first layer."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.models.elementwise import Norm
from gptjax.parallel.mesh import axis_size, constrain, fitting_spec


def embed(
    config: GPTConfig,
    token_VD: Any,
    position_TD: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    perturbation_BTD: jax.Array | None = None,
    images: tuple[jax.Array, jax.Array] | None = None,
) -> jax.Array:
    """Input of the first layer, (B, T, D) of the config's dtype: token embeddings with their positions.

    The sum has the wider of the parameters' and the activations' dtypes, as the other layers have. Rows are gathered
    before they are unboxed or cast, so that the rest of a table is never read.

    Args:
      position_TD: learned position embeddings; None: positions are rotary.
      images: the tokens of each row's images (B, N, D), and `image_slots`. None: no images.
    """
    x_BTD = nn.unbox(jax.tree.map(lambda leaf: take_rows(leaf, tokens_BT), token_VD))
    if images is not None:
        tokens_BND, slot_BT = images
        image_BTD = jnp.take_along_axis(tokens_BND, jnp.maximum(slot_BT, 0)[:, :, None], axis=1)
        x_BTD = jnp.where(slot_BT[:, :, None] >= 0, image_BTD.astype(x_BTD.dtype), x_BTD)
    if position_TD is not None:
        x_BTD = add_positions(config, x_BTD, position_TD, positions_BT)
    if perturbation_BTD is not None:  # before the cast, which could round it away
        x_BTD = x_BTD + perturbation_BTD
    if config.norm_embedding:
        x_BTD = Norm(config, has_gain=False, parent=None).apply({}, x_BTD)
    return constrain(x_BTD.astype(config.dtype), "batch", "sequence", None)


def image_slots(config: GPTConfig, tokens_BT: jax.Array) -> jax.Array:
    """Which of its row's image tokens each position holds, counted from 0, int32 (B, T); -1: a token of text.

    Positions with `vision.image_token` hold the tokens of the row's images in their order.
    """
    is_image_BT = tokens_BT == config.vision.image_token
    return jnp.where(is_image_BT, jnp.cumsum(is_image_BT, axis=1, dtype=jnp.int32) - 1, -1)


def add_positions(config: GPTConfig, token_BTD: jax.Array, position_TD: Any, positions_BT: jax.Array) -> jax.Array:
    """Adds learned absolute position embeddings (Radford et al. 2018, section 4.1) to token embeddings."""
    position_BTD = nn.unbox(
        jax.tree.map(lambda leaf: jnp.take(constrain(leaf, None, None), positions_BT, axis=0), position_TD)
    )
    sum_dtype = jnp.promote_types(jnp.result_type(token_BTD, position_BTD), config.dtype)
    return token_BTD.astype(sum_dtype) + position_BTD.astype(sum_dtype)


def value_embeddings(config: GPTConfig, table_VX: Any, tokens_BT: jax.Array) -> dict[int, jax.Array]:
    """The value embeddings of the tokens by layer, (B, T, H, K) of the config's dtype; H counts key-value heads.

    Args:
      table_VX: a row for each token with the embeddings of all layers that have them; None: there are none.
    """
    if table_VX is None:
        return {}
    rows_BTX = nn.unbox(jax.tree.map(lambda leaf: take_rows(leaf, tokens_BT), table_VX)).astype(config.dtype)
    layers = config.value_embedding_layers
    rows = rows_BTX.reshape(*tokens_BT.shape, len(layers), config.kv_heads, config.head_dim)
    return {layer: rows[:, :, i] for i, layer in enumerate(layers)}


def stacked_values(config: GPTConfig, values: dict[int, jax.Array]) -> dict[str, jax.Array]:
    """Stacks `value_embeddings` as the parameters of layers are stacked: by names such as "block_0"."""
    period = len(config.attention_pattern)
    blocks = sorted({layer % period for layer in values})
    return {
        f"block_{block}": jnp.stack([values[layer] for layer in sorted(values) if layer % period == block])
        for block in blocks
    }


def take_rows(table_VX: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """`table_VX[ids_BT]`, (B, T, X), of a table whose rows are sharded over the mesh in use.

    Each device looks up the rows that it holds, and the results are summed over devices. The SPMD partitioner would
    all-gather the table.
    """
    table, ids = fitting_spec(table_VX.shape, "vocab", "embed"), fitting_spec(ids_BT.shape, "batch", "length")
    if axis_size("tensor") == 1 or ids[0] is None:
        return jnp.take(constrain(table_VX, None, None), ids_BT, axis=0)
    out = fitting_spec(ids_BT.shape, "batch", "sequence")
    split = out[1] is not None

    def on_device(table_VX: jax.Array, ids_BT: jax.Array) -> jax.Array:
        if table[1] is not None:
            table_VX = jax.lax.all_gather(table_VX, table[1], axis=1, tiled=True)
        row_BT = ids_BT - jax.lax.axis_index("tensor") * len(table_VX)
        here_BT = (row_BT >= 0) & (row_BT < len(table_VX))
        rows_BTX = jnp.where(here_BT[..., None], jnp.take(table_VX, row_BT, axis=0, mode="clip"), 0)
        if split:
            return jax.lax.psum_scatter(rows_BTX, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(rows_BTX, "tensor")

    return jax.shard_map(on_device, in_specs=(table, ids), out_specs=out if split else ids)(table_VX, ids_BT)
