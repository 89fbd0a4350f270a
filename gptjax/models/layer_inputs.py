"""Inputs of a layer in addition to the hidden states: segments, rotary angles, value embeddings."""

import flax.struct
import jax

from gptjax.models.paged_attention import Pages
from gptjax.models.positions import Rotation


class LayerInputs(flax.struct.PyTreeNode):
    """Arrays that layers read, the same for all but `value_BTHK`; those that the config does not need are None.

    Attributes:
      segments_BT: int, documents packed into a row; attention stays within one. None: the row is one document.
      is_token_BT: bool, False at padding. None: there is no padding.
      rotation: of queries and keys, with rotary positions.
      value_BTHK: the layer's value embeddings of the tokens.
      first_BTD: the input of the first layer, with residual scalars.
      positions_B: int, in decoding: the position of each row's one token.
      pages: with a cache of pages, the places of the tokens in it.
    """

    segments_BT: jax.Array | None = None
    is_token_BT: jax.Array | None = None
    rotation: Rotation | None = None
    value_BTHK: jax.Array | None = None
    first_BTD: jax.Array | None = None
    positions_B: jax.Array | None = None
    pages: Pages | None = None
