"""Memory and communication of a training step by formula: approximate, but fast enough to rank thousands of plans."""

import dataclasses
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from gptjax.config import Config, GPTConfig
from gptjax.parallel.platforms import PLATFORM_DEFAULTS
from gptjax.parallel.ring import routes as ring_routes
from gptjax.planning import widths
from gptjax.planning.compile import microbatches
from gptjax.planning.program_text import Collective
from gptjax.scaling.flops import seen_positions
from gptjax.scaling.memory import memory_summary
from gptjax.scaling.parameters import expert_parameter_count, non_embedding_parameter_count


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
    summary = memory_summary(model, config.optimizer, shards, expert_shards=mesh["expert"])
    # With gradient accumulation: a microbatch's gradient, and the sum of those before it.
    gradients = summary.gradients * (2 if microbatches(config) > 1 else 1)
    size = jnp.dtype(model.dtype).itemsize
    tokens = _tokens(config, mesh)
    D, V = model.embed_dim, model.vocab_size or 0
    scores = _scores(config, mesh)
    kept = model.num_layers * (widths.saved_bytes(model, mesh, tokens) + (scores if model.remat == "none" else 0))
    # The activations of a layer and positions gathered over tensor; of experts also the gradients.
    layer = widths.layer_bytes(model, mesh, tokens) + 2 * tokens * D * size + scores
    layer += widths.expert_bytes(model, mesh, tokens)
    # Gathered weights of this and the next layer, and an unreduced gradient: float32, for experts in the model's dtype.
    experts = expert_parameter_count(model) / model.num_layers
    others = non_embedding_parameter_count(model) / model.num_layers - experts
    layer += (others * (2 * size + 4) + experts / mesh["expert"] * 3 * size) / mesh["tensor"]
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
    round the ring of context; a mixture sends the tokens of each layer to their experts over expert, and back.
    """
    model = config.model
    size = jnp.dtype(model.dtype).itemsize
    count, tensor = microbatches(config), mesh["tensor"]
    found = []
    weights = round(widths.gathered_parameters(model, mesh))
    if mesh["fsdp"] > 1:
        group = device_group(mesh, "fsdp")
        found += [
            Collective("all-gather", weights * size, group, 2 * count),
            Collective("reduce-scatter", weights * size, group, count),
        ]
    experts = round(expert_parameter_count(model) / (mesh["expert"] * tensor))
    # Gradients of experts are not reduced over expert, which shards them, and have the model's dtype.
    for payload, names in (
        (4 * (weights - experts), ("data", "expert", "context")),
        (size * experts, ("data", "context")),
    ):
        axes = [axis for axis in names if mesh[axis] > 1]
        if axes and payload:
            found.append(Collective("all-reduce", payload // mesh["fsdp"], device_group(mesh, *axes), count))
    tokens = _tokens(config, mesh)
    activation = round(tokens * model.embed_dim) * size
    passes = _passes(model)
    if tensor > 1:
        times = 2 * passes * model.num_layers * count
        found += [
            Collective(kind, activation, device_group(mesh, "tensor"), times)
            for kind in ("all-gather", "reduce-scatter")
        ]
    if mesh["expert"] > 1 and model.num_experts is not None:
        rows = round(widths.expert_rows(model, mesh, tokens)) * model.embed_dim * size
        times = 2 * _expert_passes(model) * model.num_layers * count
        found.append(Collective("all-to-all", rows, device_group(mesh, "expert"), times))
    if mesh["context"] > 1:
        hops = sum(_ring_hops(model, layer, mesh["context"]) for layer in range(model.num_layers)) * count
        key_values = round(tokens * widths.key_value_width(model, tensor)) * size // tensor
        found.append(
            Collective("collective-permute", key_values, device_group(mesh, "context")[:2], hops * (passes + 1))
        )
    return found


def _ring_hops(model: GPTConfig, layer: int, shards: int) -> int:
    """Number of times that a layer sends its keys to the next device: round the ring, or as far as its band reaches."""
    chunk = model.context_length // (2 * shards)
    band = seen_positions(model, layer)
    reach = shards if band == model.context_length else -(-(band - 1) // chunk)
    return sum(hops for _, hops in ring_routes(shards, reach))


def _passes(model: GPTConfig) -> int:
    """Passes over a layer: one forward, one backward, and one more with recomputation."""
    return 2 if model.remat in ("none", "cheap", "dots") else 3


def _expert_passes(model: GPTConfig) -> int:
    """Passes over the experts of a layer, whose products are recomputed unless remat is "none"."""
    return 2 if model.remat == "none" else 3


def device_group(mesh: Mapping[str, int], *axes: str) -> tuple[int, ...]:
    """Returns the mesh indices of the first device's group: the devices that differ from it along `axes` only."""
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    return tuple(ids[tuple(slice(None) if axis in axes else 0 for axis in mesh)].ravel().tolist())
