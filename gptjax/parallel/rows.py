"""The rows of a batch that each process reads, and the global array assembled from them."""

from collections.abc import Sequence

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.parallel.mesh import batch_sharding


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Returns the ascending indices of the rows that this process's devices hold, of a batch of `batch_size` rows.

    They need not be consecutive, nor disjoint between processes: where processes shard positions or heads instead, each
    holds all rows.
    """
    indices = batch_sharding(mesh, rank=1).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in indices if index is not None for row in range(*index[0].indices(batch_size))})


def global_array(
    mesh: Mesh, rows: Sequence[int], local: npt.NDArray[np.generic], batch_size: int, *leading: None
) -> jax.Array:
    """Assembles the global array of a batch from each process's rows.

    Args:
      rows: this process's rows, of `process_rows`.
      local: their contents, (*leading axes, len(rows), ...).
      batch_size: number of rows of the whole batch.
      leading: unsharded axes, as in `batch_sharding`.
    """
    axis = len(leading)
    shape = (*local.shape[:axis], batch_size, *local.shape[axis + 1 :])

    def shard(index: tuple[slice, ...] | None) -> npt.NDArray[np.generic]:
        assert index is not None
        start, stop, _ = index[axis].indices(batch_size)
        first = int(np.searchsorted(rows, start))
        return local[(*index[:axis], slice(first, first + stop - start), *index[axis + 1 :])]

    sharding = batch_sharding(mesh, *leading, rank=local.ndim - axis)
    return jax.make_array_from_callback(shape, sharding, shard)
