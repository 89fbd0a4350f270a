"""Ring attention on one device, and the schedule of its tiles; several devices: tests/multi_device."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.parallel import balanced_order, ring
from gptjax.parallel.mesh import make_mesh


def attend(q_BTHK: jax.Array) -> jax.Array:
    return ring.ring_attention(q_BTHK, q_BTHK, q_BTHK, None, band_width=None, scale=1.0, precision=None)


def tiles_met(shards: int, tiles: int, reach: int) -> np.ndarray:
    """The number of tiles that device i computes with the keys of device j, [i, j]."""
    places, chunks = np.arange(2 * shards * tiles)[:, None], np.arange(2 * shards)[None, :]
    _, counts = ring.seen_tiles(places, chunks, tiles, reach)
    by_chunk = np.asarray(counts).reshape(2 * shards, tiles, 2 * shards).sum(axis=1)
    held = [list(balanced_order.chunks_of(device, shards)) for device in range(shards)]
    return np.array([[by_chunk[np.ix_(queries, keys)].sum() for keys in held] for queries in held])


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_balanced_positions_pair_an_early_chunk_with_a_late_one(shards):
    positions = balanced_order.balanced_positions(4 * shards, shards).reshape(shards, 2, 2)
    assert sorted(positions.ravel()) == list(range(4 * shards))
    for device in range(shards):
        assert positions[device, 0].tolist() == [2 * device, 2 * device + 1]
        assert (positions[device, 0] + positions[device, 1][::-1]).tolist() == [4 * shards - 1] * 2


@pytest.mark.parametrize("shards", [2, 3, 8])
def test_every_device_has_the_same_causal_work_with_every_visitor(shards):
    met = tiles_met(shards, tiles=1, reach=2 * shards)
    off_diagonal = ~np.eye(shards, dtype=bool)
    assert set(np.diag(met)) == {3}  # of 4 pairs of chunks
    assert set(met[off_diagonal]) == {2}
    finer = tiles_met(shards, tiles=4, reach=8 * shards)
    assert set(np.diag(finer)) == {2 * 10 + 16}  # two triangles and a square
    assert set(finer[off_diagonal]) == {2 * 16}


@pytest.mark.parametrize("band_width", [None, 1, 3, 4, 5, 9, 30])
def test_exactly_the_tiles_that_are_not_fully_masked_are_computed(band_width):
    size, tiles, chunks = 4, 3, 4
    length = size * tiles * chunks
    t_T1, s_1T = np.arange(length)[:, None], np.arange(length)[None, :]
    mask_TS = s_1T <= t_T1
    if band_width is not None:
        mask_TS &= s_1T > t_T1 - band_width
    shown = mask_TS.reshape(length // size, size, length // size, size).any(axis=(1, 3))
    reach = ring._reach(band_width, size, tiles * chunks)
    places, key_chunks = np.arange(tiles * chunks)[:, None], np.arange(chunks)[None, :]
    first, count = (np.asarray(x)[:, :, None] for x in ring.seen_tiles(places, key_chunks, tiles, reach))
    computed = (np.arange(tiles) >= first) & (np.arange(tiles) < first + count)
    np.testing.assert_array_equal(computed.reshape(shown.shape), shown)


@pytest.mark.parametrize("shards", [2, 3, 4, 8])
def test_routes_visit_every_needed_device_once_and_stop(shards):
    for reach in range(2 * shards + 1):
        met = tiles_met(shards, 1, reach)
        needed = {(i - j) % shards for i, j in zip(*np.nonzero(met), strict=True)} - {0}
        visited = [by * n % shards for by, hops in ring.routes(shards, reach) for n in range(1, hops + 1)]
        assert len(visited) == len(set(visited))
        assert needed <= set(visited)
        assert len(visited) == min(2 * reach, shards - 1)


def test_without_a_context_axis_the_order_is_natural():
    x_BT = jnp.arange(12).reshape(2, 6)
    assert balanced_order.to_balanced_order(x_BT) is x_BT
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        assert balanced_order.from_balanced_order(x_BT) is x_BT


@pytest.mark.parametrize(("names", "rings"), [(["attention"], 2), ([], 3)])
def test_a_remat_policy_that_saves_attention_avoids_a_second_forward_ring(names, rings):
    layer = jax.checkpoint(attend, policy=jax.checkpoint_policies.save_only_these_names(*names))
    with jax.set_mesh(make_mesh(MeshConfig(), jax.devices()[:1])):
        program = jax.make_jaxpr(jax.grad(lambda q_BTHK: jnp.sum(layer(q_BTHK))))(jnp.ones((1, 8, 2, 4)))
    assert str(program).count("shard_map[") == rings
