"""TPU topologies for ahead-of-time compilation: their devices, from libtpu's compiler and without a TPU."""

import dataclasses
import functools
import importlib.util
import itertools
import math
import re
from collections.abc import Iterator
from typing import cast

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh, SingleDeviceSharding

from gptjax.config import MeshConfig, UserError
from gptjax.parallel.mesh import make_mesh
from gptjax.scaling.devices import TPU_CHIPS, DevicePeak, TPUChip, device_peak

FLAT_SHAPES = ((1, 1), (2, 2), (2, 4), (4, 4), (4, 8), (8, 8), (8, 16), (16, 16))  # of v5e and v6e
SMALL_SHAPES = ((2, 2, 1), (2, 2, 2), (2, 2, 4), (2, 4, 4))  # of v4 and v5p; larger slices consist of 4 x 4 x 4 cubes


@dataclasses.dataclass(frozen=True)
class Topology:
    """Devices to plan for: slices of a TPU, or simulated CPU devices.

    Attributes:
      chip: kind of TPU; None for simulated CPU devices.
      shape: chips of a slice along each dimension of the torus.
      num_slices: slices, connected by the data-centre network.
    """

    chip: TPUChip | None
    shape: tuple[int, ...]
    num_slices: int = 1

    @property
    def name(self) -> str:
        slices = "" if self.num_slices == 1 else f" x {self.num_slices} slices"
        return f"{'cpu' if self.chip is None else self.chip.name}:{'x'.join(map(str, self.shape))}{slices}"

    @property
    def num_devices(self) -> int:
        return math.prod(self.shape) * self.num_slices

    @property
    def peak(self) -> DevicePeak | None:
        """Peak rates of a device; None for a CPU."""
        return None if self.chip is None else device_peak(self.chip.device)


def parse_topology(name: str, num_slices: int = 1) -> Topology:
    """Parses a topology name such as v5p:8x8x16, v5e:2x2 or cpu:8.

    Raises:
      UserError: unknown chip or slice shape.
    """
    kind, _, dims = name.partition(":")
    if kind != "cpu" and kind not in TPU_CHIPS:
        raise UserError(f"--topology={name}: unknown chip {kind!r}, choose from {', '.join(TPU_CHIPS)} (or cpu:N)")
    shape = tuple(map(int, dims.split("x"))) if re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", dims) else ()
    if kind == "cpu":
        if len(shape) != 1 or num_slices != 1:
            raise UserError(f"--topology={name}: cpu:N takes one number of simulated devices, in one slice")
        return Topology(None, shape)
    chip = TPU_CHIPS[kind]
    if num_slices < 1:
        raise UserError(f"--num_slices={num_slices} must be at least 1")
    if not _exists(chip, shape):
        if chip.dimensions == 2:
            choices = ", ".join("x".join(map(str, known)) for known in FLAT_SHAPES)
        else:
            small = ", ".join("x".join(map(str, known)) for known in SMALL_SHAPES)
            choices = f"{small}, or AxBxC of multiples of 4 with A <= B <= C and at most {chip.max_chips} chips"
        raise UserError(f"--topology={name}: unknown slice shape of {kind}, choose from {choices}")
    return Topology(chip, shape, num_slices)


def _exists(chip: TPUChip, shape: tuple[int, ...]) -> bool:
    if chip.dimensions == 2:
        return shape in FLAT_SHAPES
    cubes = len(shape) == 3 and sorted(shape) == list(shape) and all(size % 4 == 0 for size in shape)
    return shape in SMALL_SHAPES or (cubes and math.prod(shape) <= chip.max_chips)


def check_libtpu(topology: Topology) -> None:
    """Raises UserError if the topology is a TPU's and libtpu is not installed."""
    if topology.chip is not None and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "planning for TPUs needs libtpu, which has their compiler (but no TPU): pip install 'gptjax[tpu]'"
        )


@functools.cache
def devices(topology: Topology) -> list[jax.Device]:
    """Returns the devices to compile for. TPU devices are descriptions: nothing can run on them.

    Raises:
      UserError: libtpu is not installed or does not support the topology.
    """
    if topology.chip is None:
        found = jax.devices("cpu")
        if len(found) < topology.num_devices:
            raise UserError(
                f"{topology.name} needs {topology.num_devices} simulated devices, but there are {len(found)}: set "
                f"XLA_FLAGS=--xla_force_host_platform_device_count={topology.num_devices}"
            )
        return found[: topology.num_devices]
    check_libtpu(topology)
    options: dict[str, object] = {"num_slices": topology.num_slices}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device, as on a v4 machine
    if math.prod(topology.shape) == 1:
        options["chips_per_host_bounds"] = (1, 1, 1)
    shape = "x".join(map(str, topology.shape))
    try:
        description = topologies.get_topology_desc(
            platform="tpu", topology_name=f"{topology.chip.name}:{shape}", **options
        )
    except Exception as error:  # libtpu raises several kinds
        raise UserError(f"libtpu does not support {topology.name}: {_one_line(error)}") from None
    return list(description.devices)


def lay_out(config: MeshConfig, topology: Topology) -> Mesh:
    """Builds the mesh over the devices of `topology`.

    Raises:
      UserError: the axes do not multiply to the number of devices, or cannot be mapped onto the torus.
    """
    return _mesh(config, topology, devices(topology))


def _mesh(config: MeshConfig, topology: Topology, chips: list[jax.Device]) -> Mesh:
    try:
        return make_mesh(config, chips)
    except (NotImplementedError, ValueError, AssertionError) as error:
        raise UserError(
            f"this mesh cannot be mapped onto {topology.name}: {_one_line(error)}: change --config.mesh"
        ) from None


@dataclasses.dataclass(frozen=True)
class ListedChip:
    """A chip of a slice with what `make_mesh` and `route` read of a device: formulas need neither TPU nor libtpu."""

    id: int
    coords: tuple[int, ...]
    slice_index: int
    platform: str = "tpu"
    device_kind: str = "TPU"
    process_index: int = 0
    core_on_chip: int = 0


@functools.cache
def listed_chips(topology: Topology) -> list[ListedChip]:
    """The chips of a topology in libtpu's order: slices outermost, the first dimension innermost."""
    places = itertools.product(range(topology.num_slices), *(range(size) for size in topology.shape[::-1]))
    return [ListedChip(i, (*place[:0:-1], 0)[:3], place[0]) for i, place in enumerate(places)]


def sketch(config: MeshConfig, topology: Topology) -> Mesh:
    """Builds the mesh of `lay_out` over listed chips, for which nothing can be compiled; raises as `lay_out`."""
    return _mesh(config, topology, cast(list[jax.Device], listed_chips(topology)))


@functools.cache
def hbm_bytes(topology: Topology) -> int | None:
    """Returns the memory of a device that programs may use, in bytes; None for a CPU.

    Read from libtpu's error for a program that is too large.
    """
    if topology.chip is None:
        return None
    placement = SingleDeviceSharding(devices(topology)[0])
    huge = jax.ShapeDtypeStruct((1 << 42,), jnp.int8, sharding=placement)
    try:
        jax.jit(lambda x: x + 1, out_shardings=placement).lower(huge).compile()
    except jax.errors.JaxRuntimeError as error:
        if (found := re.search(r"available HBM \(([\d.]+[KMGT]?)\)|of ([\d.]+[KMGT]?) hbm", str(error))) is not None:
            return parse_bytes(found[1] or found[2])
        raise
    raise AssertionError("a program of 4 TiB fits one device")


def parse_bytes(text: str) -> int:
    """Parses a size as libtpu prints it, such as "15.75G", into bytes."""
    unit = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}.get(text[-1])
    return round(float(text)) if unit is None else round(float(text[:-1]) * unit)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


# --- links ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Route:
    """The links that a group of devices communicates over.

    Attributes:
      slices: number of slices with members of the group.
      send: bytes per second that a chip can send to members in its slice, over all useful links.
      length: members of one slice along the longest dimension.
    """

    slices: int
    send: float
    length: int


def route(members: tuple[int, ...], mesh: Mesh, topology: Topology) -> Route:
    """Maps a group of devices onto the links of the torus.

    The group is assumed to be a box. Each dimension that it extends along contributes one link, or two where it closes
    to a ring. Where members are several chips apart, interleaved groups share the links.

    Args:
      members: indices into the flattened `mesh.devices`; empty: all devices.
    """
    assert topology.chip is not None, "a CPU has no links"
    flat = mesh.devices.ravel()
    group = [flat[member] for member in members] if members else list(flat)
    send, length = 0.0, 1
    for dimension, size in enumerate(topology.shape):
        places = sorted({device.coords[dimension] for device in group})
        if len(places) == 1:
            continue
        closes = size % topology.chip.wraps_at == 0
        around = [*places, places[0] + size] if closes else places
        step = min(b - a for a, b in itertools.pairwise(around))
        ring = closes and len(places) * step == size and len(places) > 2
        send += topology.chip.link * (2 if ring else 1) / step
        length = max(length, len(places))
    return Route(len({getattr(device, "slice_index", 0) for device in group}), send, length)


def all_topologies(chips: tuple[str, ...] = tuple(TPU_CHIPS)) -> Iterator[Topology]:
    """Yields a few sizes of each chip, smallest first: the topologies of `--topology=all`."""
    flat = ((1, 1), (2, 2), (4, 4), (16, 16))
    cubic = ((2, 2, 1), (4, 4, 4), (4, 8, 8), (8, 8, 16))
    for chip in (TPU_CHIPS[name] for name in chips):
        for shape in flat if chip.dimensions == 2 else cubic:
            yield Topology(chip, shape)
