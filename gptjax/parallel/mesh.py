"""The device mesh, and the one table that maps logical axes of arrays to it.

Model code names what an axis *is* ("heads", "batch"); this table says over which mesh axes it is spread. So a run
changes its parallelism by `--config.mesh.fsdp=8`, never by touching a layer.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import numpy.typing as npt
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.config import Config, GPTConfig, MeshConfig, UserError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")
BATCH_AXES = ("data", "fsdp", "expert")

# Logical axis -> mesh axes. Parameters are spread over fsdp by their model width and over tensor by what a device can
# compute alone (heads, feed-forward units, vocabulary rows); activations over the batch, the positions and tensor.
# Between the products positions are spread over tensor too ("sequence"; Korthikanti et al. 2022, section 4.2.2): sums
# over tensor become reduce-scatters and all-gathers of the same volume, and what a layer keeps is spread.
LOGICAL_AXES: dict[str | None, tuple[str, ...] | str | None] = {
    None: None,
    # of activations
    "batch": BATCH_AXES,
    "length": "context",
    "sequence": ("context", "tensor"),
    "heads": "tensor",
    "ffw": "tensor",
    "vocab": "tensor",
    # of parameters only
    "embed": "fsdp",
    "layers": None,
    "qkv": None,
    "head_dim": None,
    "norm": None,
    "adapter": None,
    "rank": None,
    "vocab_part": None,  # rows of a table that is kept in two parts, which need not divide
    "outputs": None,
    "position": None,
}


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """The mesh over `devices` (default: all), data outermost so that its traffic crosses the slowest links.

    Of several TPU slices, each is a part of axis `data`: all other axes stay on the fast links within a slice.

    Raises:
      UserError: the axes do not multiply to the number of devices, or data is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    given = " x ".join(f"{axis}={size}" for axis, size in sizes.items() if size != 1) or "all axes 1"
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"mesh {given}: sizes are positive, and at most one is -1 (the rest of the devices)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(
            f"mesh {given} does not match {len(devices)} device(s): "
            f"the sizes must multiply to {len(devices)} (mesh.data=-1 takes what is left)"
        )
    for axis in free:
        sizes[axis] = len(devices) // fixed
    return Mesh(_arrange(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(sizes: dict[str, int], devices: list[jax.Device]) -> npt.NDArray[np.object_]:
    """The devices, so that neighbours on the inner axes are neighbours on the links between chips."""
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes["data"] % slices:
        raise UserError(
            f"mesh data={sizes['data']} is not a multiple of the {slices} slices: only data crosses from slice to slice"
        )
    within = (sizes["data"] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(
        within, (slices, *(1,) * len(within[1:])), devices, allow_split_physical_axes=True
    )


def check_fit(config: Config, mesh: Mesh) -> None:
    """Raises UserError unless every sharded size of `config` that is known divides evenly over `mesh`."""
    key = "batch.tokens_per_batch / model.context_length" if config.batch.microbatch_size is None else None
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    _check_division(
        (key or "batch.microbatch_size", config.sequences_per_microbatch, "data x fsdp x expert", batch_shards(mesh)),
        ("model.context_length", config.model.context_length, "context x tensor", context * tensor),
    )
    if context > 1:  # the balanced order of the ring
        _check_division(("model.context_length", config.model.context_length, "2 x context", 2 * context))
        if config.model.attention_dropout > 0:
            raise UserError(
                f"model.attention_dropout={config.model.attention_dropout} is not to be had with mesh.context="
                f"{context}: set it to 0, or take another mesh"
            )
    check_model_fit(config.model, mesh)


def check_model_fit(model: GPTConfig, mesh: Mesh) -> None:
    """Raises UserError unless every sharded size of the parameters that is known divides evenly over `mesh`."""
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    _check_division(
        ("model.embed_dim", model.embed_dim, "fsdp", fsdp),
        ("model.num_heads", model.num_heads, "tensor", tensor),
        ("model.ffw_dim", model.feed_forward_dim, "tensor", tensor),
        ("model.vocab_size", model.vocab_size or 0, "tensor", tensor),
    )


def _check_division(*needs: tuple[str, int, str, int]) -> None:
    for name, size, axes, shards in needs:
        if size % shards:
            raise UserError(
                f"{name}={size} is not divisible by the mesh's {axes}={shards}: "
                f"try {math.ceil(size / shards) * shards}, or another mesh"
            )


def batch_shards(mesh: Mesh | None) -> int:
    """Over how many devices the sequences of a batch are spread; None: there is one device."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """In which programs run on `mesh`; None: on one device."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def platform() -> str:
    """What the programs traced here will run on: "cpu", "gpu" or "tpu", of the mesh in use or else JAX's default."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def axis_size(axis: str) -> int:
    """Devices along an axis of the mesh in use; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def partition_spec(logical: PartitionSpec | tuple[str | None, ...]) -> PartitionSpec:
    """The mesh axes of an array with these logical axes."""
    return PartitionSpec(*(LOGICAL_AXES[name] for name in logical))


def gathered(x_BTD: jax.Array) -> jax.Array:
    """`x_BTD` with the positions that are spread over tensor brought together: what a product over tensor reads.

    Both layouts are named, so that its gradient is summed over tensor right into the parts.
    """
    return constrain(constrain(x_BTD, "batch", "sequence", None), "batch", "length", None)


def scattered(x_BTD: jax.Array) -> jax.Array:
    """`x_BTD`, of which a product over tensor leaves each device a term: summed, and the positions spread over tensor.

    Where the positions are spread over context as well, the sum is named on its own: in one go the partitioner would
    first bring together the positions of what is multiplied.
    """
    if axis_size("context") > 1:
        x_BTD = constrain(x_BTD, "batch", "length", None)
    return constrain(x_BTD, "batch", "sequence", None)


def fitting_spec(shape: tuple[int, ...], *logical: str | None) -> PartitionSpec:
    """`partition_spec` of an array of this shape over the mesh in use.

    An axis that does not divide evenly, such as the one position that decoding reads, is spread over nothing.
    """
    spread = partition_spec(logical)
    sizes = [math.prod(axis_size(axis) for axis in _axes(entry)) for entry in spread]
    return PartitionSpec(
        *(entry if length % size == 0 else None for entry, size, length in zip(spread, sizes, shape, strict=True))
    )


def _axes(entry: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


class LogicalAxes(nn.Partitioned):
    """A parameter with the logical names of its axes. Unlike its base class it leaves layouts to `shardings`."""

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def partitioned(init: nn.initializers.Initializer, *logical: str) -> nn.initializers.Initializer:
    """A parameter's initialiser that also records its logical axes."""
    return lambda *args: LogicalAxes(init(*args), logical)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Pins the layout of an array with these logical axes to the mesh in use; without a mesh, returns `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(x.shape, *logical))


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """NamedShardings for a tree whose leaves carry logical axes (`partitioned`), or none."""

    def sharding(leaf: Any) -> NamedSharding:
        logical = leaf.names if isinstance(leaf, LogicalAxes) else ()
        return NamedSharding(mesh, partition_spec(logical))

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, LogicalAxes))


def abstract_arrays(shapes: Any, placement: Any) -> Any:
    """The ShapeDtypeStructs of a tree, with the shardings of another: what a checkpoint is restored to."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placement
    )


def batch_sharding(mesh: Mesh, *leading: None, rank: int = 2) -> NamedSharding:
    """Of an array of a batch, behind any unsharded `leading` axes.

    Args:
      rank: of the array without those: 1 for (B,), 2 for (B, T), 3 for (B, C, T), ...
    """
    logical = ("batch", *(None,) * (rank - 2), "length")[:rank]
    return NamedSharding(mesh, PartitionSpec(*leading, *partition_spec(logical)))
