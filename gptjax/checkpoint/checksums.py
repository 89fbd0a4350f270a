"""Checksums of arrays, which detect damage to the stored arrays of a checkpoint.

A checksum is a sum modulo 2**32 over the elements of an array, so each device sums its own shard: the cost is one pass
over device memory, and the result does not depend on the mesh or the number of processes. Checksums of files would
depend on the sharding, and would miss a missing file, which is read as zeros.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_UNSIGNED = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}  # by item size in bytes


def checksums(tree: Any) -> dict[str, int]:
    """Computes the checksum of every leaf, by its path, such as "params/head/bias".

    A change of one element always changes the checksum; changes of several do so with probability 1 - 2**-32.

    Args:
      tree: pytree of jax or numpy arrays with an item size of up to 4 bytes; jax arrays may be in device or pinned host
        memory.
    """
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    # One array at a time: a device whose optimizer state is offloaded has no room for all of it.
    return {name: int(_sum(_bits(_on_device(leaf)))) for name, (_, leaf) in zip(names, leaves, strict=True)}


def _on_device(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == "pinned_host":
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))
    return leaf


def _bits(leaf: Any) -> Any:
    """The bits as unsigned integers, an array that shares the memory of `leaf` if it is on one CPU; else `leaf`.

    The program for another dtype would hold them as a second copy of the array.
    """
    if jax.default_backend() != "cpu" or (isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1):
        return leaf
    return np.asarray(leaf).view(f"u{leaf.dtype.itemsize}")


# Compiled once per shape, dtype and sharding: leaves of the same shape, such as moments, share a program.
@jax.jit
def _sum(array: jax.Array) -> jax.Array:
    """Sums a hash of each element's bits and index, uint32 ()."""
    # Bits are taken before slicing: XLA's CPU slices bfloat16 through float32 and flushes subnormals to 0.
    array = array.astype(jnp.uint8) if array.dtype == jnp.bool_ else array
    array = jax.lax.bitcast_convert_type(array, _UNSIGNED[array.dtype.itemsize])
    size = math.prod(array.shape[1:])

    def of_row(row: jax.Array, first: jax.Array | int) -> jax.Array:
        bits = row.astype(jnp.uint32)
        place = jnp.uint32(first)
        for axis in range(row.ndim):
            stride = np.uint32(math.prod(row.shape[axis + 1 :]) % 2**32)
            place = place + jax.lax.broadcasted_iota(jnp.uint32, row.shape, axis) * stride
        return jnp.sum(_mix(bits + place * np.uint32(0x9E3779B1)), dtype=jnp.uint32)

    if array.ndim < 3:
        return of_row(array, 0)
    # Layer by layer: XLA's CPU materialises the summands, which must not be a second copy of all layers.
    rows = jnp.arange(array.shape[0], dtype=jnp.uint32)
    return jnp.sum(jax.lax.map(lambda i: of_row(array[i], i * np.uint32(size % 2**32)), rows), dtype=jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
    """MurmurHash3's finalizer, a bijection of 32 bits (Appleby 2011)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
