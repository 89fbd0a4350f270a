"""Searches mesh, microbatch size and rematerialisation: ranks all by formula and compiles the most promising."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import cast

from jax.sharding import AbstractMesh, Mesh

from gptjax import config as c
from gptjax.config import Config, UserError
from gptjax.parallel.mesh import MESH_AXES, check_fit
from gptjax.planning.compile import CompiledProgram, CompileResult
from gptjax.planning.estimate import AxisTraffic, StepEstimate, axis_traffic, estimate_step
from gptjax.planning.formulas import expected_collectives, expected_memory
from gptjax.planning.topology import Topology, lay_out, sketch
from gptjax.scaling.memory import memory_summary

REMATS = ("none", "dots", "attention", "full", "offload")
VOCABULARY_MULTIPLE = 128  # vocabulary padding: the lanes of a TPU's vector unit
FORMULA_SLACK = 2  # candidates are dropped above this many times the device's memory, by formula
MAX_MICROBATCHES = 4096  # per step


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A variant of a config in mesh, microbatch size, rematerialisation and vocabulary padding.

    Attributes:
      memory: bytes on a device, by formula.
      estimate: by formula.
    """

    config: Config
    memory: int
    estimate: StepEstimate


@dataclasses.dataclass(frozen=True)
class Trial:
    """A compiled candidate.

    Attributes:
      communication, estimate: from the compiled program; None where it does not fit.
    """

    candidate: Candidate
    mesh: Mesh
    compiled: CompileResult
    communication: list[AxisTraffic] | None
    estimate: StepEstimate | None


def candidates(config: Config, topology: Topology, capacity: float, slack: float = FORMULA_SLACK) -> list[Candidate]:
    """Returns all valid layouts that may fit by formula, by increasing step time.

    Step times are without overlap, so that layouts with less communication rank higher.

    Args:
      config: with model.vocab_size set.
      capacity: bytes of a device.
      slack: how many times the capacity a layout may need by formula.
    """
    found = []
    for mesh_config in meshes(config, topology):
        shape = mesh_shape(mesh_config)
        shards, experts = mesh_config.fsdp * mesh_config.tensor, mesh_config.expert
        state = memory_summary(config.model, config.optimizer, shards, expert_shards=experts)
        if state.total > slack * capacity:
            continue
        fitting = []
        for changed in _variants(config, mesh_config, shape):
            memory = expected_memory(changed, shape.shape).total
            if memory <= slack * capacity:
                fitting.append((changed, memory))
        if not fitting:
            continue
        try:
            mesh = sketch(mesh_config, topology)
        except UserError:  # these axes cannot be laid over this torus
            continue
        for changed, memory in fitting:
            communication = axis_traffic(expected_collectives(changed, mesh.shape), mesh, topology)
            expected = estimate_step(changed, mesh, topology, communication)
            assert expected is not None, "TPUs have published peaks"
            found.append(Candidate(changed, memory, expected))
    return sorted(found, key=lambda candidate: (candidate.estimate.serial, candidate.memory))


def meshes(config: Config, topology: Topology) -> Iterator[c.MeshConfig]:
    """Yields the sizes of data, fsdp, tensor, context and expert whose product is the number of devices.

    context is at most 16 and tensor at most 32: larger values leave each chip too little work.
    """
    model, devices = config.model, topology.num_devices
    tensors = [size for size in divisors(devices) if size <= 32 and model.num_heads % size == 0]
    contexts = [1] if model.attention_dropout else [size for size in divisors(devices) if size <= 16]
    experts = [1] if model.num_experts is None else divisors(model.num_experts)
    for tensor, context, expert in itertools.product(tensors, contexts, experts):
        if devices % (tensor * context * expert):
            continue
        rest = devices // (tensor * context * expert)
        for fsdp in divisors(rest):
            data = rest // fsdp
            if data % topology.num_slices == 0 and model.embed_dim % fsdp == 0:
                yield c.MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context, expert=expert)


def mesh_shape(config: c.MeshConfig) -> Mesh:
    """A mesh without devices: only its `shape` can be read."""
    sizes = dataclasses.asdict(config)
    return cast(Mesh, AbstractMesh(tuple(sizes[axis] for axis in MESH_AXES), MESH_AXES))


def _variants(config: Config, mesh_config: c.MeshConfig, mesh: Mesh) -> Iterator[Config]:
    """Yields all microbatch sizes of a mesh, the whole batch first, with every rematerialisation policy."""
    model, batch = config.model, config.batch
    sequences = batch.tokens_per_batch // model.context_length
    shards = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
    if sequences % shards:
        return
    for count in divisors(sequences // shards):
        if count > MAX_MICROBATCHES:
            return
        for remat in REMATS:
            changed = with_layout(config, mesh_config, sequences // count, remat)
            try:
                c.check(changed)
                check_fit(changed, mesh)
            except UserError:
                break
            yield changed


def with_layout(config: Config, mesh: c.MeshConfig, microbatch: int, remat: str) -> Config:
    """Returns `config` with another layout.

    The vocabulary is padded where the tensor axis does not divide it, and the batch size ramp starts at one microbatch
    at least.
    """
    config = with_padded_vocabulary(c.replace(config, {"mesh": dataclasses.asdict(mesh)}))
    batch, unit = config.batch, microbatch * config.model.context_length
    ramp: dict[str, int | None] = {}
    if batch.ramp_start_tokens is not None and batch.ramp_start_tokens < unit:
        whole = unit == batch.tokens_per_batch  # no room for a ramp
        ramp = {"ramp_start_tokens": None, "ramp_tokens": None} if whole else {"ramp_start_tokens": unit}
    return c.replace(
        config,
        {
            "model": {"remat": remat},
            "batch": {"microbatch_size": microbatch, **ramp},
        },
    )


def with_padded_vocabulary(config: Config) -> Config:
    """Returns `config` with a vocabulary that its mesh's tensor axis divides."""
    vocab_size, tensor = config.model.vocab_size, config.mesh.tensor
    assert vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
    if vocab_size % tensor == 0:
        return config
    multiple = math.lcm(VOCABULARY_MULTIPLE, tensor)
    return c.replace(config, {"model": {"vocab_size": -(-vocab_size // multiple) * multiple}})


def search(
    config: Config, topology: Topology, capacity: int, compile: Callable[[Config, Mesh], CompileResult]
) -> Iterator[Trial]:
    """Compiles candidates one after the other, the most promising first.

    The next candidate is the fastest by formula among those expected to fit. Once one fits, slower ones of the same
    mesh are skipped. The ratio of compiled to expected memory corrects the expectation for all candidates with the same
    rematerialisation policy.

    Args:
      config: with model.vocab_size set.
      capacity: bytes of a device.
      compile: (config, mesh) -> the compiled training step.
    """
    waiting = candidates(config, topology, capacity)
    correction = dict.fromkeys(REMATS, 1.0)
    while True:
        fitting = (other for other in waiting if other.memory * correction[other.config.model.remat] <= capacity)
        if (candidate := next(fitting, None)) is None:
            return
        waiting.remove(candidate)
        mesh = lay_out(candidate.config.mesh, topology)
        compiled = compile(candidate.config, mesh)
        needed = compiled.memory.total if isinstance(compiled, CompiledProgram) else compiled.needed
        correction[candidate.config.model.remat] = needed / candidate.memory
        if not isinstance(compiled, CompiledProgram):
            yield Trial(candidate, mesh, compiled, None, None)
            continue
        communication = axis_traffic(compiled.collectives, mesh, topology)
        yield Trial(
            candidate, mesh, compiled, communication, estimate_step(candidate.config, mesh, topology, communication)
        )
        waiting = [
            other
            for other in waiting
            if other.config.mesh != candidate.config.mesh or other.estimate.serial < candidate.estimate.serial
        ]


def override_flags(old: Config, new: Config) -> list[str]:
    """Returns the --config overrides that turn `old` into `new`."""
    return [
        f"--config.{section}.{field.name}={value}"
        for section in ("model", "batch", "mesh")
        for field in dataclasses.fields(getattr(new, section))
        if (value := getattr(getattr(new, section), field.name)) != getattr(getattr(old, section), field.name)
    ]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
