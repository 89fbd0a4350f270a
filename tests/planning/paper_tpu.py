"""Meshes of a TPU slice in the order of its chips, so that tests of the planner's arithmetic need no libtpu."""

import numpy as np
from jax.sharding import Mesh

from gptjax.parallel.mesh import MESH_AXES
from gptjax.planning.topology import Topology, listed_chips


def mesh(topology: Topology, **sizes: int) -> Mesh:
    """Lays the chips out over the mesh axes in their order."""
    shape = [sizes.get(axis, 1) for axis in MESH_AXES]
    devices = np.empty(topology.num_devices, object)
    devices[:] = listed_chips(topology)
    return Mesh(devices.reshape(shape), MESH_AXES)
