"""Ahead-of-time compilation of the training step, for a mesh of devices that need not exist."""

import dataclasses
import math
import re
import time
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.checkpoint.state import abstract_state, state_shardings
from gptjax.config import Config
from gptjax.optim.optimizers import schedule
from gptjax.parallel.mesh import batch_sharding, check_fit
from gptjax.planning.program_text import Collective, collectives
from gptjax.planning.topology import parse_bytes
from gptjax.scaling.flops import most_images
from gptjax.stages import registry
from gptjax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class DeviceMemory:
    """Memory of a compiled program on each device in bytes, as reported by the compiler.

    Attributes:
      arguments: size of the arguments.
      temporaries: size of temporaries and of results that do not alias an argument: their peak on a TPU. On a CPU, and
        where host memory is used, the compiler reports no peak and this is their sum, an upper bound.
      total: arguments, temporaries and generated code.
      host: size of arguments and temporaries in host memory.
    """

    arguments: int
    temporaries: int
    total: int
    host: int


@dataclasses.dataclass(frozen=True)
class CompiledProgram:
    """A program that fits the device."""

    memory: DeviceMemory
    collectives: list[Collective]
    seconds: float  # lowering and compilation time on this machine


@dataclasses.dataclass(frozen=True)
class OutOfMemory:
    """A program that the compiler rejects: the bytes that it needs of a device, and the device's capacity."""

    needed: int
    capacity: int


CompileResult = CompiledProgram | OutOfMemory


def compile_lowered(trace: Any, mesh: Mesh, unknown_trip_count: int = 1) -> CompileResult:
    """Compiles a lowered program for `mesh`.

    Args:
      trace: () -> jax.stages.Lowered, called with `mesh` in use.
      unknown_trip_count: as in `collectives`.
    """
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        compiled = compile_or_refuse(trace())
    if isinstance(compiled, OutOfMemory):
        return compiled
    seconds = time.perf_counter() - start
    analysis, text = compiled.memory_analysis(), compiled.as_text()
    assert analysis is not None, "XLA reports memory on CPUs, GPUs and TPUs"
    assert text is not None, "and the compiled program"
    arguments = analysis.argument_size_in_bytes
    host = analysis.host_temp_size_in_bytes + analysis.host_argument_size_in_bytes
    if mesh.devices.flat[0].platform == "tpu" and host == 0:  # with offloading, the peak includes host memory
        temporaries = analysis.peak_memory_in_bytes - arguments
    else:
        temporaries = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    total = arguments + temporaries + analysis.generated_code_size_in_bytes
    memory = DeviceMemory(arguments, temporaries, total, host)
    return CompiledProgram(memory, collectives(text, unknown_trip_count), seconds)


def compile_or_refuse(lowered: jax.stages.Lowered) -> jax.stages.Compiled | OutOfMemory:
    """Compiles a program, or returns what the compiler says of the memory that it lacks."""
    try:
        return lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if (too_big := read_refusal(str(error))) is None:
            raise
        return too_big


def read_refusal(message: str) -> OutOfMemory | None:
    """Parses the compiler's out-of-memory error; returns None for any other message."""
    size = r"([\d.]+[KMGT]?)"
    if found := re.search(rf"Used {size} of {size} hbm", message):
        return OutOfMemory(parse_bytes(found[1]), parse_bytes(found[2]))
    if found := re.search(rf"\({size}\) exceeds available HBM \({size}\)", message):
        return OutOfMemory(parse_bytes(found[1]), parse_bytes(found[2]))
    return None


def compile_training_step(config: Config, mesh: Mesh) -> CompileResult:
    """Compiles the training step that `gptjax.main` would run; the rows of a model of images have `most_images` each.

    Args:
      config: with model.vocab_size set.

    Raises:
      UserError: sizes are not divisible by the mesh axes.
    """
    check_fit(config, mesh)
    count = microbatches(config)

    def trace() -> jax.stages.Lowered:
        objective = registry.objective(config)
        parameters = objective.parameters
        step = make_train_step(objective, state_shardings(parameters, mesh))
        shape, sharding = (
            (count, config.sequences_per_microbatch, config.model.context_length),
            batch_sharding(mesh, None),
        )
        kinds = {"tokens": np.int32, "targets": np.int32, "weights": np.float32}
        if config.data.packing == "segment" or registry.definition(config).conversational:
            kinds |= {"segments": np.int32, "positions": np.int32}
        batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()}
        if config.model.reads_images:
            of_images = (*shape[:2], most_images(config.model), config.model.vision.values_per_image)
            batch["images"] = jax.ShapeDtypeStruct(of_images, np.uint8, sharding=sharding)
        scalars = (np.int32(count), schedule(config, 1, 1, 1))
        return step.lower(abstract_state(parameters, mesh), batch, *scalars)

    return compile_lowered(trace, mesh, unknown_trip_count=count)


def microbatches(config: Config) -> int:
    """Returns the number of microbatches of a full batch."""
    return config.batch.tokens_per_batch // (config.sequences_per_microbatch * config.model.context_length)


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Exact size of the training state on each device, in bytes."""

    parameters: int
    optimizer: int
    average: int


def state_bytes(config: Config, mesh: Mesh) -> StateBytes:
    """Computes the size of the training state's shards; `config` has model.vocab_size set."""
    parameters = registry.parameters(config)
    with jax.set_mesh(mesh):
        state = abstract_state(parameters, mesh)

    def size(tree: Any) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
        )

    return StateBytes(size(state.params), size(state.opt_state), size(state.ema))
