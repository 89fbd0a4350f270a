"""Bytes of a training state by formula."""

import dataclasses
import functools
import math

import jax.numpy as jnp

from gptjax.config import GPTConfig, OptimizerConfig
from gptjax.scaling.parameters import expert_parameter_count, layer_parameters, parameter_count, parameters


@dataclasses.dataclass(frozen=True)
class MemorySummary:
    """Bytes on each device that persist from one training step to the next, and those of gradients; no activations."""

    parameters: int
    gradients: int
    moments: int  # optimizer state
    ema: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.moments + self.ema


def memory_summary(
    model: GPTConfig,
    optimizer: OptimizerConfig,
    shards: int = 1,
    trained: int | None = None,
    expert_shards: int = 1,
) -> MemorySummary:
    """Bytes per device when arrays are sharded over the mesh.

    Slightly low when sharded: norms, some biases, routers and position embeddings are replicated. Trained parameters
    are float32, frozen ones of model.param_dtype.

    Args:
      shards: devices that each array is sharded over, the mesh's fsdp * tensor.
      trained: number of trained parameters, assumed to be spread evenly; None: all.
      expert_shards: devices that the experts are sharded over besides, the mesh's expert.
    """
    count = parameter_count(model)
    trained = count if trained is None else trained
    experts = expert_parameter_count(model)

    def on_device(size: int) -> int:
        """Bytes on a device of `size` bytes of all parameters."""
        held = size * (expert_shards * (count - experts) + experts)
        return -(-held // (count * shards * expert_shards))

    frozen_bytes = max(0, count - trained) * jnp.dtype(model.param_dtype).itemsize
    first, second = moment_counts(model, optimizer)
    first_width = 2 if optimizer.first_moment_dtype == "bfloat16" else 4
    return MemorySummary(
        parameters=on_device(4 * trained + frozen_bytes),
        gradients=on_device(4 * trained),
        moments=on_device(-(-(first * first_width + second * 4) * trained // count)),
        ema=0 if optimizer.ema_decay is None else on_device(4 * trained),
    )


@functools.lru_cache(maxsize=256)
def moment_counts(model: GPTConfig, optimizer: OptimizerConfig) -> tuple[int, int]:
    """Number of entries of the first and of the second moments when all of `model` is trained.

    The averages of `muon_variance_decay`, one number for each neuron, are not counted.
    """
    every = sum(part.size for part in parameters(model) if part.kind != "balance")
    match optimizer.name:
        case "adamw":
            return every, every
        case "muon":  # has no second moments of kernels
            layers = (part for n in range(model.num_layers) for part in layer_parameters(model, n))
            return every, every - sum(part.size for part in layers if part.kind == "kernel")
        case "adafactor":
            saved = sum(_saved_by_factoring(part.shape, optimizer.min_factored_dim) for part in parameters(model))
            return (every if optimizer.beta1 > 0 else 0), every - saved


def _saved_by_factoring(shape: tuple[int, ...], min_dim: int) -> int:
    """Entries by which factors of the two largest axes are fewer than the second moments of an array."""
    if len(shape) < 2:
        return 0
    size, (columns, rows) = math.prod(shape), sorted(shape)[-2:]
    return size - size // rows - size // columns if columns >= min_dim else 0
