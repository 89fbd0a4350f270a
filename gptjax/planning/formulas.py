"""Memory and communication of a training step by formula: approximate, but fast enough to rank thousands of plans."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from gptjax.config import Config, GPTConfig
from gptjax.parallel.platforms import PLATFORM_DEFAULTS
from gptjax.planning.compile import microbatches
from gptjax.planning.program_text import Collective
from gptjax.scaling.flops import memory_summary, non_embedding_parameter_count, parameter_count


@dataclasses.dataclass(frozen=True)
class ExpectedMemory:
    """Expected memory of a training step on a device, in bytes."""

    state: int  # parameters, optimizer moments, EMA
    gradients: int
    kept: int  # activations saved for the backward pass
    working: int  # temporaries of one layer, or of the loss

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.kept + self.working


def expected_memory(config: Config, mesh: Mapping[str, int]) -> ExpectedMemory:
    """Estimates the memory of a step on a TPU.

    Activations follow Korthikanti et al. 2022, section 4, with sequence parallelism over `tensor`. Attention scores are
    materialised only where the splash kernel is not used, for example with attention dropout.
    """
    model, shards = config.model, mesh["fsdp"] * mesh["tensor"]
    summary = memory_summary(model, config.optimizer, shards)
    # With gradient accumulation: a microbatch's gradient, and the sum of those before it.
    gradients = summary.gradients * (2 if microbatches(config) > 1 else 1)
    size = jnp.dtype(model.dtype).itemsize
    tokens = _tokens(config, mesh)
    D, F, V = model.embed_dim, model.feed_forward_dim, model.vocab_size or 0
    unit = tokens * D * size / mesh["tensor"]  # one activation of the model's width
    widths = {"none": 17, "cheap": 6 + F / D, "dots": 5 + F / D, "attention": 2, "full": 1, "offload": 0}[model.remat]
    layer = 17 * unit + 2 * tokens * D * size + _scores(config, mesh)
    kept = model.num_layers * (widths * unit + (_scores(config, mesh) if model.remat == "none" else 0))
    layer_weights = non_embedding_parameter_count(model) / model.num_layers / mesh["tensor"]
    layer += layer_weights * (2 * size + 4)  # gathered weights of this and the next layer, and an unreduced gradient
    loss = (
        min(tokens, PLATFORM_DEFAULTS["tpu"].loss_chunk_tokens) * V / mesh["tensor"] * 10
        + V * D / mesh["tensor"] * (size + 8)
        + 4 * tokens * D
    )
    return ExpectedMemory(summary.total - summary.gradients, gradients, int(kept), int(max(layer, loss)))


def _tokens(config: Config, mesh: Mapping[str, int]) -> float:
    """Tokens of a microbatch on one device."""
    shards = math.prod(mesh[axis] for axis in ("data", "fsdp", "expert", "context"))
    return config.sequences_per_microbatch * config.model.context_length / shards


def _scores(config: Config, mesh: Mapping[str, int]) -> float:
    """Bytes of a layer's attention scores and probabilities; 0 where a kernel does not materialise them."""
    model = config.model
    if model.attention_backend != "xla" and model.attention_dropout == 0 and model.dtype == "bfloat16":
        return 0
    return _tokens(config, mesh) * model.context_length * model.num_heads / mesh["tensor"] * 8


def expected_collectives(config: Config, mesh: Mapping[str, int]) -> list[Collective]:
    """Predicts the collectives of a step from its layout, with payloads in the activations' dtype.

    Per microbatch: weights are all-gathered over fsdp in the forward and the backward pass; gradients are reduced over
    fsdp, and in float32 over data; each layer has two all-gathers and two reduce-scatters over tensor in the forward
    pass, the recomputation and twice in the backward pass (Korthikanti et al. 2022, section 4.2.2); keys and values go
    round the ring of context.
    """
    model = config.model
    size = jnp.dtype(model.dtype).itemsize
    count, tensor = microbatches(config), mesh["tensor"]
    found = []
    weights = parameter_count(model) // tensor
    if mesh["fsdp"] > 1:
        group = _group(mesh, "fsdp")
        found += [
            Collective("all-gather", weights * size, group, 2 * count),
            Collective("reduce-scatter", weights * size, group, count),
        ]
    if mesh["data"] * mesh["expert"] * mesh["context"] > 1:
        axes = [axis for axis in ("data", "expert", "context") if mesh[axis] > 1]
        share = weights // mesh["fsdp"]
        found.append(Collective("all-reduce", 4 * share, _group(mesh, *axes), count))
    activation = round(_tokens(config, mesh) * model.embed_dim) * size
    passes = _passes(model)
    if tensor > 1:
        times = 2 * passes * model.num_layers * count
        found += [
            Collective(kind, activation, _group(mesh, "tensor"), times) for kind in ("all-gather", "reduce-scatter")
        ]
    if mesh["context"] > 1:
        rounds = (mesh["context"] - 1) * model.num_layers * count
        ends = _group(mesh, "context")[:2]
        found.append(Collective("collective-permute", 2 * activation // tensor, ends, rounds * (passes + 1)))
    return found


def _passes(model: GPTConfig) -> int:
    """Passes over a layer: one forward, one backward, and one more with recomputation."""
    return 2 if model.remat in ("none", "cheap", "dots") else 3


def _group(mesh: Mapping[str, int], *axes: str) -> tuple[int, ...]:
    """Returns the mesh indices of the first device's group: the devices that differ from it along `axes` only."""
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    return tuple(ids[tuple(slice(None) if axis in axes else 0 for axis in mesh)].ravel().tolist())
