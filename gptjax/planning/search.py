"""Which mesh, microbatch and rematerialisation to take: all are weighed by formula, the likeliest are compiled."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator

from jax.sharding import Mesh

from gptjax import config as c
from gptjax.config import Config, UserError
from gptjax.parallel.mesh import check_fit
from gptjax.planning.compile import Compiled, Fits
from gptjax.planning.estimate import Estimate, Traffic, communicate, estimate
from gptjax.planning.formulas import expected_collectives, expected_memory
from gptjax.planning.topology import Topology, lay_out

REMATS = ("none", "dots", "attention", "full", "offload")
VOCABULARY_MULTIPLE = 128  # rows that fill a TPU's lanes on every device
HOPE = 2  # times the device's memory: formulas that ask for more are not that far off
MAX_MICROBATCHES = 4096  # of a step: beyond it a plan is no plan


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A config that differs from the one asked about in mesh, microbatch, rematerialisation, padding of the vocabulary.

    Attributes:
      memory: bytes on a device, by formula.
      estimate: by formula.
    """

    config: Config
    memory: int
    estimate: Estimate


@dataclasses.dataclass(frozen=True)
class Trial:
    """A candidate that was compiled.

    Attributes:
      communication, estimate: by the compiled program; None where it does not fit.
    """

    candidate: Candidate
    mesh: Mesh
    compiled: Compiled
    communication: list[Traffic] | None
    estimate: Estimate | None


def candidates(config: Config, topology: Topology, capacity: int) -> list[Candidate]:
    """All layouts that divide the config and that the formulas let fit, those with the shortest step first.

    A step's time is that without overlap, which tells apart what communicates more and less.

    Args:
      config: with the vocabulary filled in.
      capacity: bytes of a device.
    """
    found = []
    for mesh_config in meshes(config, topology):
        try:
            mesh = lay_out(mesh_config, topology)
        except UserError:  # these axes cannot be laid over this torus
            continue
        for changed in _variants(config, mesh_config, mesh):
            memory = expected_memory(changed, mesh.shape).total
            if memory <= HOPE * capacity:
                communication = communicate(expected_collectives(changed, mesh.shape), mesh, topology)
                expected = estimate(changed, mesh, topology, communication)
                assert expected is not None, "TPUs have published peaks"
                found.append(Candidate(changed, memory, expected))
    return sorted(found, key=lambda candidate: (candidate.estimate.serial, candidate.memory))


def meshes(config: Config, topology: Topology) -> Iterator[c.MeshConfig]:
    """The products of data, fsdp, tensor and context that use all devices and divide the model.

    Context and tensor are tried up to 16 and 32: positions or heads cut smaller leave a chip too little to do.
    """
    model, devices = config.model, topology.num_devices
    for tensor, context in itertools.product(_divisors(devices), repeat=2):
        rest = devices // (tensor * context)
        if devices % (tensor * context) or tensor > 32 or context > 16 or (context > 1 and model.attention_dropout):
            continue
        for fsdp in _divisors(rest):
            data = rest // fsdp
            if data % topology.num_slices == 0:
                yield c.MeshConfig(data=data, fsdp=fsdp, tensor=tensor, context=context)


def _variants(config: Config, mesh_config: c.MeshConfig, mesh: Mesh) -> Iterator[Config]:
    """Of one mesh: microbatches from the whole batch down, halved until a device has one sequence; all remats."""
    model, batch = config.model, config.batch
    sequences = batch.tokens_per_batch // model.context_length
    shards = math.prod(mesh.shape[axis] for axis in ("data", "fsdp", "expert"))
    if sequences % shards:
        return
    for count in _divisors(sequences // shards):
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
    """`config` laid out so, its vocabulary rounded up where `mesh` asks for it, its ramp started later if it must."""
    vocab_size = config.model.vocab_size
    assert vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
    if vocab_size % mesh.tensor:
        multiple = math.lcm(VOCABULARY_MULTIPLE, mesh.tensor)
        vocab_size = -(-vocab_size // multiple) * multiple
    batch, unit = config.batch, microbatch * config.model.context_length
    ramp: dict[str, int | None] = {}
    if batch.ramp_start_tokens is not None and batch.ramp_start_tokens < unit:
        whole = unit == batch.tokens_per_batch  # nothing is left to ramp
        ramp = {"ramp_start_tokens": None, "ramp_tokens": None} if whole else {"ramp_start_tokens": unit}
    return c.replace(
        config,
        {
            "model": {"remat": remat, "vocab_size": vocab_size},
            "batch": {"microbatch_size": microbatch, **ramp},
            "mesh": dataclasses.asdict(mesh),
        },
    )


def search(
    config: Config, topology: Topology, capacity: int, compile: Callable[[Config, Mesh], Compiled]
) -> Iterator[Trial]:
    """Compiles one candidate after the other, the most promising first; what fits is not sorted by its time.

    The next is the quickest by formula that is believed to fit, unless it is slower by formula than one of its mesh
    that does. What each turns out to need corrects the belief in all others of its rematerialisation.

    Args:
      config: with the vocabulary filled in.
      capacity: bytes of a device.
      compile: a training step.
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
        needed = compiled.memory.total if isinstance(compiled, Fits) else compiled.needed
        correction[candidate.config.model.remat] = needed / candidate.memory
        if not isinstance(compiled, Fits):
            yield Trial(candidate, mesh, compiled, None, None)
            continue
        communication = communicate(compiled.collectives, mesh, topology)
        yield Trial(candidate, mesh, compiled, communication, estimate(candidate.config, mesh, topology, communication))
        waiting = [
            other
            for other in waiting
            if other.config.mesh != candidate.config.mesh or other.estimate.serial < candidate.estimate.serial
        ]


def flags(old: Config, new: Config) -> list[str]:
    """The overrides that make `new` of `old` on the command line of any command that takes a config."""
    return [
        f"--config.{section}.{field.name}={value}"
        for section in ("model", "batch", "mesh")
        for field in dataclasses.fields(getattr(new, section))
        if (value := getattr(getattr(new, section), field.name)) != getattr(getattr(old, section), field.name)
    ]


def _divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]
