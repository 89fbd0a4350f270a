"""The rows of a batch that a process reads, and the global array that the processes' rows are."""

from collections.abc import Sequence

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.parallel.mesh import batch_sharding


def process_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """The rows of a batch of `batch_size` that this process's devices hold, in rising order.

    They need be neither consecutive nor an equal share: where the processes divide the positions or the heads between
    them, each holds all rows.
    """
    indices = batch_sharding(mesh, rank=1).addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in indices if index is not None for row in range(*index[0].indices(batch_size))})


def global_array(
    mesh: Mesh, rows: Sequence[int], local: npt.NDArray[np.generic], batch_size: int, *leading: None
) -> jax.Array:
    """The array of a batch of which this process has the rows `rows` of `process_rows`.

    Args:
      local: the rows, (len(rows), ...), behind as many unsharded axes as there are in `leading`.
      batch_size: all rows.
      leading: as of `batch_sharding`.
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
