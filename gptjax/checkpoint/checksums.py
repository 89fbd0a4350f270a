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
_SPREAD = np.uint32(0x9E3779B1)  # odd, so that each index has a product of its own
FEW = 2**16  # elements that NumPy sums sooner than XLA compiles a program for their shape


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
    return {name: _checksum(_on_device(leaf)) for name, (_, leaf) in zip(names, leaves, strict=True)}


def _checksum(leaf: Any) -> int:
    if jax.default_backend() != "cpu" or (isinstance(leaf, jax.Array) and len(leaf.sharding.device_set) > 1):
        return int(_sum(leaf))
    # Shares the memory of `leaf`; the program for another dtype would hold the bits as a second copy of the array.
    bits = np.asarray(leaf).view(f"u{leaf.dtype.itemsize}")
    return int(_sum_of_few(bits) if bits.size <= FEW else _sum(bits))


def _on_device(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array) and leaf.sharding.memory_kind == "pinned_host":
        return jax.device_put(leaf, leaf.sharding.with_memory_kind("device"))
    return leaf


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
        return jnp.sum(_mix(bits + place * _SPREAD), dtype=jnp.uint32)

    if array.ndim < 3:
        return of_row(array, 0)
    # Layer by layer: XLA's CPU materialises the summands, which must not be a second copy of all layers.
    rows = jnp.arange(array.shape[0], dtype=jnp.uint32)
    return jnp.sum(jax.lax.map(lambda i: of_row(array[i], i * np.uint32(size % 2**32)), rows), dtype=jnp.uint32)


def _sum_of_few(bits: np.ndarray) -> np.uint32:
    """Computes what `_sum` does, of an array of unsigned integers, without a compiled program."""
    places = np.arange(bits.size, dtype=np.uint32) * _SPREAD
    return np.sum(_mix(bits.reshape(-1).astype(np.uint32) + places), dtype=np.uint32)


def _mix(x: Any) -> Any:
    """MurmurHash3's finalizer, a bijection of 32 bits (Appleby 2011)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)
