"""Ring attention: causal self-attention with positions sharded over the mesh axis "context".

Keys and values are passed from device to device while each device keeps its queries (Liu et al. 2023, section 3), with
an online softmax (Milakov and Gimelshein 2018, section 3). Positions are in the order of `parallel.balanced_order`.

Each device splits its arrays into N tiles: q_NBHTK has tiles of T queries, k_NBHSK tiles of S keys. Heads of keys and
values that several query heads share are sent once, and repeated for each tile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from gptjax.parallel.balanced_order import chunks_of
from gptjax.parallel.mesh import axis_size, partition_spec
from gptjax.parallel.platforms import platform_defaults

MAX_TILE = 512  # most queries, and most keys, of a tile of scores
_HIDDEN = float(np.finfo(np.float32).min)  # score of a masked key
_LOWEST = (
    -1e30
)  # initial maximum: above _HIDDEN, so that fully masked rows keep a sum of 0, and below every other score


def ring_attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    segments_BT: jax.Array | None,
    sinks_H: jax.Array | None = None,
    *,
    band_width: int | None,
    scale: float,
    precision: str | None,
) -> jax.Array:
    """Causal self-attention in balanced order; equals `dot_product_attention` up to the order of float32 sums.

        softmax(scale q k^T + causal, band and segment mask) v

    B is sharded over the batch axes of the mesh in use, T over "context", heads over "tensor". No device holds all
    keys, or more than MAX_TILE x MAX_TILE scores per sequence and head. The backward pass needs the output and the
    log-sum-exp of the scores, both named "attention" for the policies of `jax.checkpoint`.

    Args:
      q_BTHK, k_BTHK, v_BTHK: of one dtype; T is divisible by 2n, with n devices along "context". The tile size is the
        largest divisor of T / 2n up to MAX_TILE: fast when T is divisible by a high power of 2. Keys and values may
        have fewer heads, each shared by consecutive query heads.
      segments_BT: int, the document of each position of a packed row; attention stays within documents. None: one.
      sinks_H: float32, logits of attention sinks, sharded as the heads. None: no sinks.
      band_width: number of positions that each position attends to, itself included. None: all earlier positions.
      scale: factor of the scores.
      precision: of the matrix products.

    Returns:
      (B, T, H, K), of q's dtype.
    """
    return _attention(q_BTHK, k_BTHK, v_BTHK, segments_BT, sinks_H, _Rules(band_width, scale, precision))


class _Rules(NamedTuple):
    """Arguments of `ring_attention` that are not arrays."""

    band_width: int | None
    scale: float
    precision: str | None


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attention(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    segments_BT: jax.Array | None,
    sinks_H: jax.Array | None,
    rules: _Rules,
) -> jax.Array:
    return _attention_forward(q_BTHK, k_BTHK, v_BTHK, segments_BT, sinks_H, rules)[0]


def _attention_forward(
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    segments_BT: jax.Array | None,
    sinks_H: jax.Array | None,
    rules: _Rules,
) -> tuple[jax.Array, tuple[Any, ...]]:
    out_BTHK, logsumexp_BTH = _on_each_device(partial(_forward, rules), q_BTHK, k_BTHK, v_BTHK, segments_BT)
    if sinks_H is not None:
        with_sink_BTH = jnp.logaddexp(logsumexp_BTH, sinks_H[None, None])
        share_BTH1 = jnp.exp(logsumexp_BTH - with_sink_BTH)[..., None]  # of the softmax that is not the sink's
        out_BTHK, logsumexp_BTH = (out_BTHK * share_BTH1).astype(out_BTHK.dtype), with_sink_BTH
    out_BTHK, logsumexp_BTH = checkpoint_name((out_BTHK, logsumexp_BTH), "attention")
    return out_BTHK, (q_BTHK, k_BTHK, v_BTHK, segments_BT, sinks_H, out_BTHK, logsumexp_BTH)


def _attention_backward(rules: _Rules, kept: tuple[Any, ...], d_out_BTHK: jax.Array) -> tuple[jax.Array | None, ...]:
    *arrays, sinks_H, out_BTHK, logsumexp_BTH = kept
    # sum_s p_s dp_s of each query, which equals the dot product of the output and its gradient.
    mean_BTH = jnp.sum(d_out_BTHK.astype(jnp.float32) * out_BTHK.astype(jnp.float32), axis=-1)
    gradients = _on_each_device(partial(_backward, rules), *arrays, logsumexp_BTH, mean_BTH, d_out_BTHK)
    if sinks_H is None:
        return *gradients, None, None
    return *gradients, None, -jnp.sum(jnp.exp(sinks_H[None, None] - logsumexp_BTH) * mean_BTH, axis=(0, 1))


_attention.defvjp(_attention_forward, _attention_backward)


def _on_each_device(function: Callable[..., tuple[jax.Array, ...]], *arrays: jax.Array | None) -> tuple[jax.Array, ...]:
    """Applies `function` to each device's shards of `arrays`, (B, T) or (B, T, H, ...), like its results."""
    logical = ("batch", "length", "heads")
    return jax.shard_map(
        function,
        in_specs=jax.tree.map(lambda x: partition_spec(logical[: x.ndim]), arrays),
        out_specs=partition_spec(logical),
        check_vma=False,  # needed only by automatic differentiation of the shard_map
    )(*arrays)


def _forward(
    rules: _Rules, q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, segments_BT: jax.Array | None
) -> tuple[jax.Array, ...]:
    """Computes the output, and the log-sum-exp of the scores, float32 (B, T, H)."""

    def block(query: Any, key: Any, mask_BHTS: jax.Array, state: Any) -> tuple[Any, tuple[()]]:
        (q_BHTK,), (k_BHSK, v_BHSK) = query, _repeated(key, query[0].shape[1])
        max_BHT, sum_BHT, out_BHTK = state
        scores_BHTS = _scores(q_BHTK, k_BHSK, mask_BHTS, rules)
        new_max_BHT = jnp.maximum(max_BHT, jnp.max(scores_BHTS, axis=-1))
        shrink_BHT = jnp.exp(max_BHT - new_max_BHT)
        probs_BHTS = jnp.exp(scores_BHTS - new_max_BHT[..., None])
        sum_BHT = shrink_BHT * sum_BHT + jnp.sum(probs_BHTS, axis=-1)
        seen_BHTK = _product("BHTS,BHSK->BHTK", probs_BHTS.astype(v_BHSK.dtype), v_BHSK, rules)
        return (new_max_BHT, sum_BHT, shrink_BHT[..., None] * out_BHTK + seen_BHTK), ()

    queries, keys = _tiles(((q_BTHK,), (k_BTHK, v_BTHK)))
    zeros_NBHTK = jnp.zeros(queries[0].shape, jnp.float32)
    state = jnp.full(zeros_NBHTK.shape[:-1], _LOWEST, jnp.float32), zeros_NBHTK[..., 0], zeros_NBHTK
    state, _ = _go_round(block, queries, keys, _tiles(segments_BT), state, (), rules.band_width)
    max_NBHT, sum_NBHT, out_NBHTK = state
    out_NBHTK = (out_NBHTK / sum_NBHT[..., None]).astype(q_BTHK.dtype)
    return _whole((out_NBHTK, max_NBHT + jnp.log(sum_NBHT)))


def _backward(
    rules: _Rules,
    q_BTHK: jax.Array,
    k_BTHK: jax.Array,
    v_BTHK: jax.Array,
    segments_BT: jax.Array | None,
    logsumexp_BTH: jax.Array,
    mean_BTH: jax.Array,
    d_out_BTHK: jax.Array,
) -> tuple[jax.Array, ...]:
    """Computes the gradients of queries, keys and values, of their dtype (Dao et al. 2022, algorithm 4)."""

    def block(query: Any, key: Any, mask_BHTS: jax.Array, dq_BHTK: jax.Array) -> tuple[jax.Array, Any]:
        q_BHTK, d_out_BHTK, logsumexp_BHT, mean_BHT = query
        k_BHSK, v_BHSK = _repeated(key, q_BHTK.shape[1])
        probs_BHTS = jnp.exp(_scores(q_BHTK, k_BHSK, mask_BHTS, rules) - logsumexp_BHT[..., None])
        d_probs_BHTS = _product("BHTK,BHSK->BHTS", d_out_BHTK, v_BHSK, rules)
        d_scores_BHTS = rules.scale * probs_BHTS * (d_probs_BHTS - mean_BHT[..., None])
        d_scores_BHTS = d_scores_BHTS.astype(q_BHTK.dtype)
        dk_BHSK = _product("BHTS,BHTK->BHSK", d_scores_BHTS, q_BHTK, rules)
        dv_BHSK = _product("BHTS,BHTK->BHSK", probs_BHTS.astype(v_BHSK.dtype), d_out_BHTK, rules)
        dq_BHTK += _product("BHTS,BHSK->BHTK", d_scores_BHTS, k_BHSK, rules)
        return dq_BHTK, _summed((dk_BHSK, dv_BHSK), key[0].shape[1])

    queries, keys = _tiles(((q_BTHK, d_out_BTHK, logsumexp_BTH, mean_BTH), (k_BTHK, v_BTHK)))
    dq_NBHTK, *no_shares = (jnp.zeros(x.shape, jnp.float32) for x in (queries[0], *keys))
    dq_NBHTK, shares = _go_round(
        block, queries, keys, _tiles(segments_BT), dq_NBHTK, tuple(no_shares), rules.band_width
    )
    return jax.tree.map(lambda x: x.astype(q_BTHK.dtype), _whole((dq_NBHTK, *shares)))


def _repeated(keys: Any, heads: int) -> Any:
    """Repeats the heads of tiles of keys and values, to `heads` in all."""
    return jax.tree.map(lambda x_BHSK: jnp.repeat(x_BHSK, heads // x_BHSK.shape[1], axis=1), keys)


def _summed(shares: Any, heads: int) -> Any:
    """Sums contributions over the query heads that share a head; the transpose of `_repeated`."""

    def summed(x_BHSK: jax.Array) -> jax.Array:
        batch, _, *others = x_BHSK.shape
        return jnp.sum(x_BHSK.reshape(batch, heads, -1, *others), axis=2)

    return jax.tree.map(summed, shares)


def _scores(q_BHTK: jax.Array, k_BHSK: jax.Array, mask_BHTS: jax.Array, rules: _Rules) -> jax.Array:
    return jnp.where(mask_BHTS, rules.scale * _product("BHTK,BHSK->BHTS", q_BHTK, k_BHSK, rules), _HIDDEN)


def _product(axes: str, x: jax.Array, y: jax.Array, rules: _Rules) -> jax.Array:
    return jnp.einsum(axes, x, y, precision=rules.precision, preferred_element_type=jnp.float32)


def _tiles(arrays: Any) -> Any:
    """Splits a device's (B, T, ...) arrays into tiles: (N, B, T), (N, B, H, T) or (N, B, H, T, K)."""

    def cut(x_BT: jax.Array) -> jax.Array:
        batch, length, *others = x_BT.shape
        chunk = length // 2
        size = max(size for size in range(1, min(chunk, MAX_TILE) + 1) if chunk % size == 0)
        x_NBT = jnp.moveaxis(x_BT.reshape(batch, -1, size, *others), 1, 0)
        return x_NBT.swapaxes(2, 3) if others else x_NBT

    return jax.tree.map(cut, arrays)


def _whole(arrays: Any) -> Any:
    """Joins (N, B, H, T, ...) tiles into (B, T, H, ...)."""

    def join(x_NBHT: jax.Array) -> jax.Array:
        x_BNTH = jnp.moveaxis(x_NBHT.swapaxes(2, 3), 0, 1)
        return x_BNTH.reshape(x_BNTH.shape[0], -1, *x_BNTH.shape[3:])

    return jax.tree.map(join, arrays)


def routes(shards: int, reach: int) -> list[tuple[int, int]]:
    """Returns the routes of keys round `shards` devices, as (devices per hop, hops).

    Neighbouring chunks are on neighbouring devices: lower chunks in one direction, upper chunks in the other. A layer
    that attends `reach` chunks back needs `reach` neighbours on both sides, or one whole round if that is shorter.
    """
    if 2 * reach + 1 >= shards:
        return [(1, shards - 1)] if shards > 1 else []
    return [(1, reach), (-1, reach)] if reach > 0 else []


def seen_tiles(query_tile: Any, key_chunk: Any, tiles: int, reach: int) -> tuple[Any, Any]:
    """Returns which tiles of a chunk of keys are not fully masked for a tile of queries: (first, count).

    Args:
      query_tile, key_chunk: int indices, counted from position 0.
      tiles, reach: number of tiles per chunk, and of earlier tiles that a tile of queries attends to.
    """
    ahead = query_tile - key_chunk * tiles
    stop = jnp.clip(ahead + 1, 0, tiles)
    first = jnp.clip(ahead - reach, 0, stop)
    return first, stop - first


def _reach(band_width: int | None, size: int, count: int) -> int:
    """Returns how many earlier blocks of `size` positions a block attends to; `count` blocks without a band."""
    return count if band_width is None else (band_width + size - 2) // size


def _go_round(
    block: Callable[[Any, Any, jax.Array, Any], tuple[Any, Any]],
    queries: tuple[jax.Array, ...],
    keys: tuple[jax.Array, ...],
    segments_NBT: jax.Array | None,
    state: Any,
    no_shares: Any,
    band_width: int | None,
) -> tuple[Any, Any]:
    """Passes the keys to all devices whose queries attend to them; accumulators of the keys travel along and return.

    Args:
      block: (tile of queries, tile of keys, mask (B, 1, T, S), state) -> (state, contribution to the keys' gradients).
      queries, keys: (N, ...) arrays of the device, the first of each (N, B, H, T, K).
      state: tree of (N, ...) arrays that stays with the queries.
      no_shares: zeros that the keys' contributions are added to, a tree of (N, ...) arrays.

    Returns:
      The state, and the sums of the contributions to the device's own keys.
    """
    shards, device = axis_size("context"), jax.lax.axis_index("context")
    tiles, size = queries[0].shape[0] // 2, queries[0].shape[3]  # tiles of a chunk, positions of a tile
    visit = partial(_visit, block, (queries, segments_NBT), device, no_shares, band_width)

    def hop(arrays: Any, by: int) -> Any:
        pairs = [(here, (here + by) % shards) for here in range(shards)]
        return jax.tree.map(lambda x: jax.lax.ppermute(x, "context", pairs), arrays)

    def travel(state: Any, by: int, hops: int) -> tuple[Any, Any]:
        """Returns the state after all stops of a route, and the contributions to this device's keys."""

        def stop(carry: Any, n: jax.Array) -> tuple[Any, None]:
            state, visitors, shares = carry
            # Sent before the computation, so that both overlap.
            visitors_after, shares_before = hop(visitors, by), hop(shares, by)
            state, shares = visit(state, visitors, (device - by * n) % shards)
            return (state, visitors_after, jax.tree.map(jnp.add, shares, shares_before)), None

        visitors, shares_before = hop((keys, segments_NBT), by), no_shares
        if hops > 1:
            unroll = platform_defaults().unroll_ring
            carry, _ = jax.lax.scan(stop, (state, visitors, no_shares), jnp.arange(1, hops), unroll=unroll)
            state, visitors, shares_before = carry
            shares_before = hop(shares_before, by)
        state, shares = visit(state, visitors, (device - by * hops) % shards)
        return state, hop(jax.tree.map(jnp.add, shares, shares_before), -by * hops)

    state, total = visit(state, (keys, segments_NBT), device)
    for by, hops in routes(shards, _reach(band_width, tiles * size, 2 * shards)):
        state, shares = travel(state, by, hops)
        total = jax.tree.map(jnp.add, total, shares)
    return state, total


def _visit(
    block: Callable[[Any, Any, jax.Array, Any], tuple[Any, Any]],
    own: tuple[tuple[jax.Array, ...], jax.Array | None],
    device: jax.Array,
    no_shares: Any,
    band_width: int | None,
    state: Any,
    visitors: tuple[tuple[jax.Array, ...], jax.Array | None],
    home: jax.Array,
) -> tuple[Any, Any]:
    """Applies `block` to every pair of a query tile and a visiting key tile that is not fully masked.

    Args:
      own: queries of `device`, and their segments.
      visitors: keys of the device `home`, and their segments.

    Returns:
      The state, and the contributions to the visiting keys.
    """
    shards, count, size = axis_size("context"), own[0][0].shape[0], own[0][0].shape[3]
    tiles = count // 2
    reach = _reach(band_width, size, shards * count)

    def place(holder: jax.Array, number: jax.Array) -> jax.Array:
        """Returns the index, counted from position 0, of a device's tile `number`."""
        return jnp.where(number < tiles, *chunks_of(holder, shards)) * tiles + number % tiles

    def attend(shares: Any, scanned: tuple[jax.Array, Any, Any]) -> tuple[Any, Any]:
        number, (query, query_segments_BT), state = scanned
        query_place = place(device, number)
        seen = [seen_tiles(query_place, chunk, tiles, reach) for chunk in chunks_of(home, shards)]
        (lower, lower_count), (upper, upper_count) = seen

        def meet(i: jax.Array, carry: tuple[Any, Any]) -> tuple[Any, Any]:
            state, shares = carry
            number = jnp.where(i < lower_count, lower + i, tiles + upper + i - lower_count)
            key, key_segments_BS = jax.tree.map(lambda x_N: x_N[number], visitors)
            distance = (query_place - place(home, number)) * size
            mask_BHTS = _mask(distance, size, query_segments_BT, key_segments_BS, band_width)
            state, share = block(query, key, mask_BHTS, state)
            return state, jax.tree.map(lambda all_N, one: all_N.at[number].add(one), shares, share)

        # The trip count is the number of visible tiles: fully masked tiles are not computed.
        state, shares = jax.lax.fori_loop(0, lower_count + upper_count, meet, (state, shares))
        return shares, state

    shares, state = jax.lax.scan(attend, no_shares, (jnp.arange(count), own, state))
    return state, shares


def _mask(
    distance: jax.Array,
    size: int,
    query_segments_BT: jax.Array | None,
    key_segments_BS: jax.Array | None,
    band_width: int | None,
) -> jax.Array:
    """Returns the mask of queries over keys `distance` positions earlier: (1 or, with segments, B, 1, T, S)."""
    back_TS = distance + jnp.arange(size)[:, None] - jnp.arange(size)[None, :]
    mask_TS = back_TS >= 0
    if band_width is not None:
        mask_TS &= back_TS < band_width
    if query_segments_BT is None or key_segments_BS is None:
        return mask_TS[None, None]
    return (mask_TS[None] & (query_segments_BT[:, :, None] == key_segments_BS[:, None, :]))[:, None]
