"""The rows of a batch that a process reads, and the global array that the processes' rows are."""

from collections.abc import Sequence

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import NamedSharding


def process_rows(sharding: NamedSharding, batch_size: int) -> list[int]:
    """The rows of a (B, T) batch that this process's devices hold, in rising order.

    They need be neither consecutive nor an equal share: where the processes divide the positions or the heads between
    them, each holds all rows.

    Args:
      sharding: of the (B, T) arrays; it must divide both sizes.
      batch_size: B.
    """
    length = sharding.mesh.size  # any multiple of what the positions are spread over
    indices = sharding.addressable_devices_indices_map((batch_size, length)).values()
    return sorted({row for index in indices if index is not None for row in range(*index[0].indices(batch_size))})


def global_array(
    sharding: NamedSharding, rows: Sequence[int], local: npt.NDArray[np.generic], batch_size: int
) -> jax.Array:
    """The (..., B, T) array of which this process has the rows `rows` of `process_rows`, (..., len(rows), T)."""
    shape = (*local.shape[:-2], batch_size, local.shape[-1])

    def shard(index: tuple[slice, ...] | None) -> npt.NDArray[np.generic]:
        assert index is not None
        *leading, of_rows, of_length = index
        start, stop, _ = of_rows.indices(batch_size)
        first = int(np.searchsorted(rows, start))
        return local[(*leading, slice(first, first + stop - start), of_length)]

    return jax.make_array_from_callback(shape, sharding, shard)
