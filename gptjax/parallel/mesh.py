"""The device mesh, and the table that maps the logical axes of arrays to mesh axes.

Model code names the logical axes of arrays ("heads", "batch"); this table says which mesh axes they are sharded over.
A run changes its parallelism with `--config.mesh.fsdp=8`, without a change to any layer.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import numpy as np
import numpy.typing as npt
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from gptjax.config import Config, GPTConfig, MeshConfig, UserError

MESH_AXES = ("data", "fsdp", "tensor", "context", "expert")
BATCH_AXES = ("data", "fsdp", "expert")

# Logical axis -> mesh axes. Parameters are sharded over fsdp along the model width, and over tensor along heads,
# feed-forward units and vocabulary; activations over the batch, the positions and tensor. Between matrix products the
# positions are sharded over tensor as well ("sequence": sequence parallelism, Korthikanti et al. 2022, section 4.2.2):
# all-reduces over tensor become reduce-scatters and all-gathers of the same volume, and saved activations are sharded.
LOGICAL_AXES: dict[str | None, tuple[str, ...] | str | None] = {
    None: None,
    # activations
    "batch": BATCH_AXES,
    "length": "context",
    "sequence": ("context", "tensor"),
    "heads": "tensor",
    "ffw": "tensor",
    "vocab": "tensor",
    # parameters only
    "embed": "fsdp",
    "layers": None,
    "experts": "expert",
    "kv_heads": "tensor",  # replicated where tensor has more devices than there are key-value heads
    "qkv": None,
    "head_dim": None,
    "norm": None,
    "adapter": None,
    "rank": None,
    "vocab_part": None,  # rows of a table stored in two parts, whose sizes need not be divisible
    "outputs": None,
    "position": None,
    "patch": None,
    "router": None,
    "balance": None,
    "gate_inputs": None,
}
REPLICATED_IF_INDIVISIBLE = ("kv_heads",)


def make_mesh(config: MeshConfig, devices: list[jax.Device] | None = None) -> Mesh:
    """Creates the mesh over `devices` (default: all), with `data` outermost, on the slowest links.

    Several TPU slices are arranged along `data` only: all other axes stay on the fast links within a slice.

    Raises:
      UserError: the axes do not multiply to the number of devices, or data is not a multiple of the slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = {axis: getattr(config, axis) for axis in MESH_AXES}
    given = " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if size != 1) or "a mesh of size 1"
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise UserError(f"{given}: sizes must be positive, and at most one can be -1 (all remaining devices)")
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(devices) % fixed or (not free and fixed != len(devices)):
        raise UserError(
            f"{given} does not match {len(devices)} device(s): "
            f"the sizes must multiply to {len(devices)} (mesh.data=-1 takes all remaining devices)"
        )
    for axis in free:
        sizes[axis] = len(devices) // fixed
    return Mesh(_arrange(sizes, devices), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _arrange(sizes: dict[str, int], devices: list[jax.Device]) -> npt.NDArray[np.object_]:
    """Arranges devices so that neighbours along the inner axes are neighbours on the links between chips."""
    shape = tuple(sizes.values())
    slices = len({getattr(device, "slice_index", 0) for device in devices}) if devices[0].platform == "tpu" else 1
    if slices == 1:
        return mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    if sizes["data"] % slices:
        raise UserError(
            f"mesh.data={sizes['data']} is not a multiple of the {slices} slices: only data can extend over slices"
        )
    within = (sizes["data"] // slices, *shape[1:])
    return mesh_utils.create_hybrid_device_mesh(
        within, (slices, *(1,) * len(within[1:])), devices, allow_split_physical_axes=True
    )


def check_fit(config: Config, mesh: Mesh) -> None:
    """Raises UserError unless all known sharded sizes of `config` are divisible by the mesh axes."""
    key = "batch.tokens_per_batch / model.context_length" if config.batch.microbatch_size is None else None
    context, tensor = mesh.shape["context"], mesh.shape["tensor"]
    _check_division(
        (key or "batch.microbatch_size", config.sequences_per_microbatch, "data x fsdp x expert", batch_shards(mesh)),
        ("model.context_length", config.model.context_length, "context x tensor", context * tensor),
    )
    if context > 1:  # ring attention: two chunks per device
        _check_division(("model.context_length", config.model.context_length, "2 x context", 2 * context))
        if config.model.attention_dropout > 0:
            raise UserError(
                f"model.attention_dropout={config.model.attention_dropout} is not supported with mesh.context="
                f"{context}: set it to 0, or use mesh.context=1"
            )
    check_model_fit(config.model, mesh)


def check_model_fit(model: GPTConfig, mesh: Mesh) -> None:
    """Raises UserError unless all known sharded sizes of the parameters are divisible by the mesh axes."""
    fsdp, tensor = mesh.shape["fsdp"], mesh.shape["tensor"]
    _check_division(
        ("model.embed_dim", model.embed_dim, "fsdp", fsdp),
        ("model.num_heads", model.num_heads, "tensor", tensor),
        ("model.ffw_dim", model.feed_forward_dim, "tensor", tensor),
        ("model.num_experts", model.num_experts or 0, "expert", mesh.shape["expert"]),
        ("model.vocab_size", model.vocab_size or 0, "tensor", tensor),
    )
    if (vision := model.vision).encoder == "vit":
        _check_division(
            ("model.vision.embed_dim", vision.embed_dim, "fsdp", fsdp),
            ("model.vision.num_heads", vision.num_heads, "tensor", tensor),
            ("model.vision.ffw_dim", vision.ffw_dim or 4 * vision.embed_dim, "tensor", tensor),
        )


def _check_division(*needs: tuple[str, int, str, int]) -> None:
    for name, size, axes, shards in needs:
        if size % shards:
            raise UserError(
                f"{name}={size} is not divisible by the mesh's {axes}={shards}: "
                f"try {math.ceil(size / shards) * shards}, or another mesh"
            )


def batch_shards(mesh: Mesh | None) -> int:
    """Returns the number of shards of the batch axis; 1 without a mesh."""
    return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)


def use_mesh(mesh: Mesh | None) -> AbstractContextManager[Any]:
    """Returns a context in which programs are sharded over `mesh`; None: a single device."""
    return nullcontext() if mesh is None else jax.set_mesh(mesh)


def platform() -> str:
    """Returns "cpu", "gpu" or "tpu": the platform of the mesh in use, or of JAX's default backend without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return jax.default_backend() if mesh.empty else mesh.abstract_device.platform


def is_one_device() -> bool:
    """Whether programs run on one device: without a mesh, or with one of a single device."""
    return jax.sharding.get_abstract_mesh().size <= 1


def axis_size(axis: str) -> int:
    """Returns the size of an axis of the mesh in use; 1 without a mesh."""
    return jax.sharding.get_abstract_mesh().shape.get(axis, 1)


def partition_spec(logical: PartitionSpec | tuple[str | None, ...]) -> PartitionSpec:
    """Returns the mesh axes of an array with these logical axes."""
    return PartitionSpec(*(LOGICAL_AXES[name] for name in logical))


def gathered(x_BTD: jax.Array) -> jax.Array:
    """All-gathers the positions of `x_BTD` over tensor, before a matrix product that is sharded over tensor.

    Both layouts are constrained, so that the gradient is a reduce-scatter.
    """
    return constrain(constrain(x_BTD, "batch", "sequence", None), "batch", "length", None)


def scattered(x_BTD: jax.Array) -> jax.Array:
    """Reduce-scatters the partial sums of a matrix product over tensor along the positions of `x_BTD`.

    With positions sharded over context as well, the sum gets a constraint of its own: otherwise the partitioner would
    first all-gather the positions of the product's operands.
    """
    if axis_size("context") > 1:
        x_BTD = constrain(x_BTD, "batch", "length", None)
    return constrain(x_BTD, "batch", "sequence", None)


def fitting_spec(shape: tuple[int, ...], *logical: str | None) -> PartitionSpec:
    """Returns `partition_spec` for an array of this shape on the mesh in use.

    Axes whose size is not divisible, such as the single position of a decoding step, are replicated.
    """
    spec = partition_spec(logical)
    sizes = [math.prod(axis_size(axis) for axis in _axes(entry)) for entry in spec]
    return PartitionSpec(
        *(entry if length % size == 0 else None for entry, size, length in zip(spec, sizes, shape, strict=True))
    )


def _axes(entry: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return (entry,) if isinstance(entry, str) else entry or ()


class LogicalAxes(nn.Partitioned):
    """A parameter with the logical names of its axes. Unlike its base class, `unbox` adds no sharding constraint.

    Attributes:
      inputs: how many axes a product with the parameter sums over: the first ones that `models.axis_roles` gives no
        other role. 0: not a kernel.
    """

    inputs: int = flax.struct.field(default=0, pytree_node=False)

    def unbox(self, apply_constraint: bool = True) -> Any:
        return self.value


def partitioned(init: nn.initializers.Initializer, *logical: str, inputs: int = 0) -> nn.initializers.Initializer:
    """Wraps an initialiser so that the parameter records its logical axes, and how many of them are inputs."""
    return lambda *args: LogicalAxes(init(*args), logical, inputs=inputs)


def constrain(x: jax.Array, *logical: str | None) -> jax.Array:
    """Constrains the sharding of an array with these logical axes on the mesh in use; without a mesh, returns `x`."""
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, fitting_spec(x.shape, *logical))


def shardings(mesh: Mesh, boxed: Any) -> Any:
    """Returns the NamedShardings of a tree; leaves without logical axes (`partitioned`) are replicated."""

    def sharding(leaf: Any) -> NamedSharding:
        logical = leaf.names if isinstance(leaf, LogicalAxes) else ()
        spec = partition_spec(logical)
        for axis, name in enumerate(logical):
            if name in REPLICATED_IF_INDIVISIBLE and leaf.value.shape[axis] % mesh.shape[spec[axis]]:
                spec = PartitionSpec(*spec[:axis], None, *spec[axis + 1 :])
        return NamedSharding(mesh, spec)

    return jax.tree.map(sharding, boxed, is_leaf=lambda leaf: isinstance(leaf, LogicalAxes))


def abstract_arrays(shapes: Any, placement: Any) -> Any:
    """Returns the ShapeDtypeStructs of a tree with the shardings of another, for example to restore a checkpoint."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), shapes, placement
    )


def batch_sharding(mesh: Mesh, *leading: None, rank: int = 2) -> NamedSharding:
    """Returns the sharding of a batch array with unsharded `leading` axes.

    Args:
      rank: of the array without the leading axes: 1 for (B,), 2 for (B, T), 3 for (B, R, T), ...
    """
    logical = ("batch", *(None,) * (rank - 2), "length")[:rank]
    return NamedSharding(mesh, PartitionSpec(*leading, *partition_spec(logical)))
