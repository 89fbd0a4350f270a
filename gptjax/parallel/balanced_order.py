"""The order of positions that are sharded over the mesh axis "context".

In natural order, causal masking would give the last device far more work than the first. Attention therefore uses a
*balanced order* (The Llama 3 Herd of Models, 2024, section 3.3.2): with n devices the positions are split into 2n
chunks, and device i holds chunks i and 2n-1-i.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from gptjax.parallel.mesh import axis_size, partition_spec


def chunks_of(device: Any, shards: int) -> tuple[Any, Any]:
    """Returns the two chunks that a device of `shards` devices holds in balanced order, the lower one first."""
    return device, 2 * shards - 1 - device


def balanced_positions(length: int, shards: int) -> npt.NDArray[np.int32]:
    """Returns the permutation of positions in balanced order, int32 (T,); `length` T is divisible by 2 * `shards`."""
    order = [chunk for device in range(shards) for chunk in chunks_of(device, shards)]
    return np.arange(length, dtype=np.int32).reshape(2 * shards, -1)[order].reshape(-1)


def to_balanced_order(x_BT: jax.Array) -> jax.Array:
    """Permutes axis 1 from natural to balanced order, with two collective permutes.

    Args:
      x_BT: (B, T, ...), with B sharded over the batch axes of the mesh in use and T over its context axis of size n; T
        is divisible by 2n.

    Returns:
      An array of the same shape, dtype and sharding; `x_BT` itself without a mesh, or with n = 1.
    """
    return _reorder(x_BT, _balance_shard)


def from_balanced_order(x_BT: jax.Array) -> jax.Array:
    """Permutes axis 1 from balanced to natural order, the inverse of `to_balanced_order`."""
    return _reorder(x_BT, _restore_shard)


def _reorder(x_BT: jax.Array, reorder_shard: Callable[[jax.Array, int], jax.Array]) -> jax.Array:
    shards = axis_size("context")
    if shards == 1:
        return x_BT
    spec = partition_spec(("batch", "length"))
    return jax.shard_map(lambda x: reorder_shard(x, shards), in_specs=spec, out_specs=spec)(x_BT)


def _moves(shards: int) -> list[list[tuple[int, int]]]:
    """Returns the (source, target) pairs of all even and of all odd chunks; each device sends one of either kind."""
    owner = {chunk: device for device in range(shards) for chunk in chunks_of(device, shards)}
    return [[(chunk // 2, owner[chunk]) for chunk in range(parity, 2 * shards, 2)] for parity in (0, 1)]


def _balance_shard(x_BT: jax.Array, shards: int) -> jax.Array:
    halves = jnp.split(x_BT, 2, axis=1)
    even, odd = (jax.lax.ppermute(half, "context", moves) for half, moves in zip(halves, _moves(shards), strict=True))
    lower_is_even = jax.lax.axis_index("context") % 2 == 0
    return jnp.concatenate([jnp.where(lower_is_even, even, odd), jnp.where(lower_is_even, odd, even)], axis=1)


def _restore_shard(x_BT: jax.Array, shards: int) -> jax.Array:
    lower, upper = jnp.split(x_BT, 2, axis=1)
    lower_is_even = jax.lax.axis_index("context") % 2 == 0
    halves = jnp.where(lower_is_even, lower, upper), jnp.where(lower_is_even, upper, lower)
    back = [[(there, here) for here, there in moves] for moves in _moves(shards)]
    return jnp.concatenate(
        [jax.lax.ppermute(half, "context", moves) for half, moves in zip(halves, back, strict=True)], axis=1
    )
