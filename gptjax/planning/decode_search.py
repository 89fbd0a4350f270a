"""Searches layouts for generation by formula: mesh and batch, without compiling."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping

import jax.numpy as jnp

from gptjax.config import Config, GPTConfig, MeshConfig, UserError
from gptjax.inference.weights import WeightFormat
from gptjax.parallel.mesh import batch_shards, check_model_fit
from gptjax.planning import widths
from gptjax.planning.decode_plan import cache_bytes, cache_shards, step_seconds
from gptjax.planning.estimate import collective_seconds
from gptjax.planning.formulas import device_group
from gptjax.planning.program_text import Collective
from gptjax.planning.search import divisors, mesh_shape, with_padded_vocabulary
from gptjax.planning.topology import Topology, sketch

MAX_TENSOR = 64


@dataclasses.dataclass(frozen=True)
class DecodingLayout:
    """A mesh for generation at full context length, and the largest batch that fits, by formula.

    Attributes:
      config: with the mesh and the vocabulary padded for it.
      weight_bytes: on a device.
      cache_bytes: of a sequence, on a device.
      working_bytes: temporaries of a step, on a device.
      batch: sequences, over all devices.
      step_seconds: lower bound of the time of a step: reading weights and cache or computing, then communication.
      link_seconds: the part of it that is communication, without latencies.
    """

    config: Config
    weight_bytes: int
    cache_bytes: int
    working_bytes: int
    batch: int
    step_seconds: float
    link_seconds: float

    @property
    def memory(self) -> int:
        """Bytes needed on a device."""
        rows = self.batch // _shards(dataclasses.asdict(self.config.mesh))
        return self.weight_bytes + rows * self.cache_bytes + self.working_bytes

    @property
    def tokens_per_second(self) -> float:
        return self.batch / self.step_seconds


def decoding_layouts(
    config: Config, topology: Topology, capacity: float, weights: WeightFormat
) -> list[DecodingLayout]:
    """Returns all layouts that fit by formula, by decreasing tokens per second.

    Weights are sharded over tensor and experts over expert, never over fsdp, over which they would be gathered for each
    token.

    Args:
      config: with model.vocab_size set.
      capacity: bytes of a device.
      weights: as in `gptjax.inference.engine.Engine`.
    """
    tried = (_layout(config, mesh, topology, capacity, weights) for mesh in _meshes(config, topology))
    found = [layout for layout in tried if layout is not None]
    return sorted(found, key=lambda layout: (-layout.tokens_per_second, layout.memory))


def _meshes(config: Config, topology: Topology) -> Iterator[MeshConfig]:
    model, devices = config.model, topology.num_devices
    tensors = [size for size in divisors(devices) if size <= MAX_TENSOR and model.num_heads % size == 0]
    experts = [1] if model.num_experts is None else divisors(model.num_experts)
    for tensor, expert in itertools.product(tensors, experts):
        if devices % (tensor * expert) == 0 and devices // (tensor * expert) % topology.num_slices == 0:
            yield MeshConfig(data=devices // (tensor * expert), tensor=tensor, expert=expert)


def _layout(
    config: Config, mesh_config: MeshConfig, topology: Topology, capacity: float, weights: WeightFormat
) -> DecodingLayout | None:
    config = with_padded_vocabulary(dataclasses.replace(config, mesh=mesh_config))
    model = config.model
    if weights == "bfloat16":
        model = dataclasses.replace(model, dtype="bfloat16")
    mesh = mesh_shape(mesh_config)
    try:
        check_model_fit(model, mesh)
        chips = sketch(mesh_config, topology)
    except UserError:
        return None
    width = 1 if weights == "int8" else jnp.dtype(model.dtype).itemsize
    held = round(width * widths.gathered_parameters(model, mesh.shape))
    each = -(-cache_bytes(model) // cache_shards(model, mesh.shape))
    per_row = each + _working_bytes(model, mesh.shape)
    rows = int((capacity - held) // per_row)
    if rows < 1:
        return None
    seconds = step_seconds(model, topology, mesh.shape, held, rows, rows * each)
    if seconds is None:
        return None
    links = sum(collective_seconds(item, chips, topology)[0] for item in _collectives(model, mesh.shape, rows))
    batch = rows * batch_shards(mesh)
    return DecodingLayout(config, held, each, rows * _working_bytes(model, mesh.shape), batch, seconds + links, links)


def _working_bytes(model: GPTConfig, mesh: Mapping[str, int]) -> int:
    """Temporaries of one sequence in a step: the activations of a layer, its scores, and float32 logits."""
    scores = 8 * model.context_length * model.num_heads / mesh["tensor"]
    logits = 8 * (model.vocab_size or 0)
    return round(widths.layer_bytes(model, mesh, 1) + scores + logits)


def _collectives(model: GPTConfig, mesh: Mapping[str, int], rows: int) -> list[Collective]:
    """The collectives of a step: two sums over tensor and two exchanges over expert in each layer."""
    size, found = jnp.dtype(model.dtype).itemsize, []
    if mesh["tensor"] > 1:
        payload = rows * model.embed_dim * size
        found.append(Collective("all-reduce", payload, device_group(mesh, "tensor"), 2 * model.num_layers))
    if mesh["expert"] > 1 and model.num_experts is not None:
        payload = round(widths.expert_rows(model, mesh, rows)) * model.embed_dim * size
        found.append(Collective("all-to-all", payload, device_group(mesh, "expert"), 2 * model.num_layers))
    return found


def _shards(mesh: Mapping[str, int]) -> int:
    return mesh["data"] * mesh["fsdp"] * mesh["expert"]
