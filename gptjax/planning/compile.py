"""The real training step, compiled for a mesh that need not be there."""

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
from gptjax.stages import registry
from gptjax.training.step import make_train_step


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, as the compiled program says.

    Attributes:
      arguments: what is there before it runs.
      temporaries: what it needs besides, its results where they do not take an argument's place included: at most at a
        time on a TPU; all together, which may be more, on a CPU and where the host's memory is used, as the compiler
        does not tell the peak there.
      total: both, and its code.
      host: what it keeps in the memory of the host.
    """

    arguments: int
    temporaries: int
    total: int
    host: int


@dataclasses.dataclass(frozen=True)
class Fits:
    """A program that compiles."""

    memory: Memory
    collectives: list[Collective]
    seconds: float  # of lowering and compiling, on this machine


@dataclasses.dataclass(frozen=True)
class TooBig:
    """A program that the compiler refuses: bytes on a device that it needs, and that there are."""

    needed: int
    capacity: int


Compiled = Fits | TooBig


def compile_lowered(trace: Any, mesh: Mesh, unknown_trip_count: int = 1) -> Compiled:
    """Compiles for `mesh` what `trace()` lowers.

    Args:
      trace: () -> jax.stages.Lowered, called with `mesh` in use.
      unknown_trip_count: as of `collectives`.
    """
    start = time.perf_counter()
    try:
        with jax.set_mesh(mesh):
            compiled = trace().compile()
    except jax.errors.JaxRuntimeError as error:
        if (too_big := read_refusal(str(error))) is None:
            raise
        return too_big
    seconds = time.perf_counter() - start
    analysis = compiled.memory_analysis()
    assert analysis is not None, "XLA tells the memory on CPUs, GPUs and TPUs"
    arguments = analysis.argument_size_in_bytes
    host = analysis.host_temp_size_in_bytes + analysis.host_argument_size_in_bytes
    if mesh.devices.flat[0].platform == "tpu" and host == 0:  # the peak counts what waits in the host's memory too
        temporaries = analysis.peak_memory_in_bytes - arguments
    else:
        temporaries = analysis.temp_size_in_bytes + analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    total = arguments + temporaries + analysis.generated_code_size_in_bytes
    memory = Memory(arguments, temporaries, total, host)
    return Fits(memory, collectives(compiled.as_text(), unknown_trip_count), seconds)


def read_refusal(message: str) -> TooBig | None:
    """What the compiler says when a program is too big for the device; None: it says something else."""
    size = r"([\d.]+[KMGT]?)"
    if found := re.search(rf"Used {size} of {size} hbm", message):
        return TooBig(parse_bytes(found[1]), parse_bytes(found[2]))
    if found := re.search(rf"\({size}\) exceeds available HBM \({size}\)", message):
        return TooBig(parse_bytes(found[1]), parse_bytes(found[2]))
    return None


def compile_training_step(config: Config, mesh: Mesh) -> Compiled:
    """The step that `gptjax.main` would run.

    Args:
      config: with the vocabulary filled in.

    Raises:
      UserError: sizes do not divide over the mesh.
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
        if config.data.packing == "segment":
            kinds |= {"segments": np.int32, "positions": np.int32}
        batch = {name: jax.ShapeDtypeStruct(shape, kind, sharding=sharding) for name, kind in kinds.items()}
        scalars = (np.int32(count), schedule(config, 1, 1, 1))
        return step.lower(abstract_state(parameters, mesh), batch, *scalars)

    return compile_lowered(trace, mesh, unknown_trip_count=count)


def microbatches(config: Config) -> int:
    """Of a full batch."""
    return config.batch.tokens_per_batch // (config.sequences_per_microbatch * config.model.context_length)


@dataclasses.dataclass(frozen=True)
class StateBytes:
    """Exact bytes on each device of what a step keeps."""

    parameters: int
    optimizer: int
    average: int


def state_bytes(config: Config, mesh: Mesh) -> StateBytes:
    """Of the training state's shards; config with the vocabulary filled in."""
    parameters = registry.parameters(config)
    with jax.set_mesh(mesh):
        state = abstract_state(parameters, mesh)

    def size(tree: Any) -> int:
        return sum(
            math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree)
        )

    return StateBytes(size(state.params), size(state.opt_state), size(state.ema))
