"""Attention over a key-value cache in pages, which rows of different lengths share (Kwon et al. 2023, section 4.1).

The positions of a row are split into pages of C positions; a table maps them to the pages of a pool. A loop over pages
computes the softmax incrementally (Milakov and Gimelshein 2018). It always adds the pages of a row in the same order,
and pages without a visible position leave the sums unchanged bit for bit, so the result for a row depends neither on
the lengths of the other rows nor on where its pages are.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import struct

POSITIONS_AT_ONCE = 64  # positions that an iteration of the loop over pages reads, at least one page


class Pages(NamedTuple):
    """Where the tokens of a call belong.

    Attributes:
      table_BN: int32, for each row the indices of its pages in the pool, in the order of its positions.
      positions_BT: int32, the position of each token: consecutive within a row.
      is_token_BT: bool, False at padding, which is written to page 0 of the pool.
      prefix_B: int32, length of the prefix that all positions of a "prefix" layer attend to.
    """

    table_BN: jax.Array
    positions_BT: jax.Array
    is_token_BT: jax.Array
    prefix_B: jax.Array


class PagedKeyValues(struct.PyTreeNode):
    """The pool of pages of a layer: keys and values, (N, H, C, K) each. Page 0 belongs to no row."""

    keys_NHCK: jax.Array
    values_NHCK: jax.Array

    @property
    def page_size(self) -> int:
        return self.keys_NHCK.shape[2]

    def write(self, keys_BTHK: jax.Array, values_BTHK: jax.Array, pages: Pages) -> "PagedKeyValues":
        """Writes the keys and values of the tokens to their pages."""
        number_BT = jnp.minimum(pages.positions_BT // self.page_size, pages.table_BN.shape[1] - 1)
        page_BT = jnp.where(pages.is_token_BT, jnp.take_along_axis(pages.table_BN, number_BT, axis=1), 0)
        slot_BT = pages.positions_BT % self.page_size
        return PagedKeyValues(
            self.keys_NHCK.at[page_BT, :, slot_BT].set(keys_BTHK),
            self.values_NHCK.at[page_BT, :, slot_BT].set(values_BTHK),
        )

    def read(self, page_BN: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of N pages of each row, (B, H, N C, K)."""
        return _rows(self.keys_NHCK, page_BN), _rows(self.values_NHCK, page_BN)


def _rows(pool_NHCK: jax.Array, page_BN: jax.Array) -> jax.Array:
    x_BHNCK = jnp.take(pool_NHCK, page_BN, axis=0).swapaxes(1, 2)
    return x_BHNCK.reshape(*x_BHNCK.shape[:2], -1, x_BHNCK.shape[-1])


def paged_attention(
    q_BTHK: jax.Array,
    cache: PagedKeyValues,
    pages: Pages,
    kind: str,
    band_width: int,
    precision: str | None,
    scale: float,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """Attention of the queries of T tokens over a cache that already holds their own keys and values.

    Args:
      kind: "dense", "banded" or "prefix", as in `attention_mask`.

    Returns:
      (B, T, H, K), of q's dtype.
    """
    rows, length, heads, width = q_BTHK.shape
    kv_heads, page_size = cache.keys_NHCK.shape[1], cache.page_size
    q_BHQTK = jnp.moveaxis(q_BTHK.reshape(rows, length, kv_heads, -1, width), 1, 3)
    at_once = max(1, POSITIONS_AT_ONCE // page_size)
    last_B = jnp.max(jnp.where(pages.is_token_BT, pages.positions_BT, 0), axis=1)
    first_B = jnp.maximum(pages.positions_BT[:, 0] - band_width + 1, 0) if kind == "banded" else jnp.zeros_like(last_B)
    first_B = first_B // page_size
    trips = jnp.max(last_B // page_size - first_B) // at_once + 1
    t_BT1 = pages.positions_BT[:, :, None]

    def add_pages(i: jax.Array, sums: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        largest, total, out_BHQTK = sums
        number_BN = (first_B + i * at_once)[:, None] + jnp.arange(at_once)[None]
        page_BN = jnp.take_along_axis(pages.table_BN, jnp.minimum(number_BN, pages.table_BN.shape[1] - 1), axis=1)
        s_BS = (number_BN[:, :, None] * page_size + jnp.arange(page_size)[None, None]).reshape(rows, -1)
        k_BHSK, v_BHSK = cache.read(page_BN)
        # What other requests left in a page is not read: 0 times infinity is not 0.
        v_BHSK = jnp.where((s_BS <= last_B[:, None])[:, None, :, None], v_BHSK, 0)
        seen_BTS = s_BS[:, None] <= t_BT1
        if kind == "banded":
            seen_BTS &= s_BS[:, None] > t_BT1 - band_width
        if kind == "prefix":
            seen_BTS |= (s_BS < pages.prefix_B[:, None])[:, None]
        seen = seen_BTS[:, None, None]
        scores = scale * jnp.einsum(
            "BHQTK,BHSK->BHQTS", q_BHQTK, k_BHSK, precision=precision, preferred_element_type=jnp.float32
        )
        scores = jnp.where(seen, scores, jnp.finfo(jnp.float32).min)
        new_largest = jnp.maximum(largest, jnp.max(scores, axis=-1))
        powers = jnp.where(seen, jnp.exp(scores - new_largest[..., None]), 0.0)
        factor = jnp.exp(largest - new_largest)
        added = jnp.einsum(
            "BHQTS,BHSK->BHQTK",
            powers.astype(v_BHSK.dtype),
            v_BHSK,
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return new_largest, total * factor + jnp.sum(powers, axis=-1), out_BHQTK * factor[..., None] + added

    shape = q_BHQTK.shape[:-1]
    if sinks_H is None:
        largest, total = jnp.full(shape, jnp.finfo(jnp.float32).min), jnp.zeros(shape)
    else:
        largest, total = jnp.broadcast_to(sinks_H.reshape(1, kv_heads, -1, 1), shape), jnp.ones(shape)
    sums = (largest, total, jnp.zeros(q_BHQTK.shape, jnp.float32))
    _, total, out_BHQTK = jax.lax.fori_loop(0, trips, add_pages, sums)
    out_BHQTK = out_BHQTK / jnp.maximum(total, jnp.finfo(jnp.float32).tiny)[..., None]
    return jnp.moveaxis(out_BHQTK, 3, 1).reshape(rows, length, heads, width).astype(q_BTHK.dtype)
