"""Fake devices of a TPU slice, so that tests of the planner's arithmetic need no libtpu."""

import dataclasses
import itertools

import numpy as np
from jax.sharding import Mesh

from gptjax.parallel.mesh import MESH_AXES
from gptjax.planning.topology import Topology


@dataclasses.dataclass(frozen=True)
class Chip:
    id: int
    coords: tuple[int, ...]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU"
    process_index: int = 0
    core_on_chip: int = 0


def chips(topology: Topology) -> list[Chip]:
    """Returns devices in libtpu's order: slices outermost, the first dimension innermost."""
    places = itertools.product(range(topology.num_slices), *(range(size) for size in topology.shape[::-1]))
    return [Chip(i, (*place[:0:-1], 0)[:3], place[0]) for i, place in enumerate(places)]


def mesh(topology: Topology, **sizes: int) -> Mesh:
    """Lays the chips out over the mesh axes in their order."""
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = np.empty(topology.num_devices, object)
    devices[:] = chips(topology)
    return Mesh(devices.reshape(shape), MESH_AXES)
