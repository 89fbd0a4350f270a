"""Memory and communication of a step by formula: rough, and quick enough to try thousands of plans before compiling."""

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
    """Bytes on a device in a step."""

    state: int  # parameters, moments, average
    gradients: int
    kept: int  # what the forward pass keeps for the backward pass
    working: int  # of one layer at a time, or of the loss

    @property
    def total(self) -> int:
        return self.state + self.gradients + self.kept + self.working


def expected_memory(config: Config, mesh: Mapping[str, int]) -> ExpectedMemory:
    """What a step will need on a TPU, where attention never holds all scores unless its probabilities are dropped.

    Activations follow Korthikanti et al. 2022, section 4, with positions spread over `tensor` between the products.
    """
    model, shards = config.model, mesh["fsdp"] * mesh["tensor"]
    summary = memory_summary(model, config.optimizer, shards)
    # One microbatch's gradient beside the sum of those before it; both of the stacked layers.
    gradients = summary.gradients * (2 if microbatches(config) > 1 else 1)
    size = jnp.dtype(model.dtype).itemsize
    tokens = _tokens(config, mesh)
    D, F, V = model.embed_dim, model.feed_forward_dim, model.vocab_size or 0
    unit = tokens * D * size / mesh["tensor"]  # an activation as wide as the model
    widths = {"none": 17, "cheap": 6 + F / D, "dots": 5 + F / D, "attention": 2, "full": 1, "offload": 0}[model.remat]
    layer = 17 * unit + 2 * tokens * D * size + _scores(config, mesh)
    kept = model.num_layers * (widths * unit + (_scores(config, mesh) if model.remat == "none" else 0))
    layer_weights = non_embedding_parameter_count(model) / model.num_layers / mesh["tensor"]
    layer += layer_weights * (2 * size + 4)  # gathered, the next one too, and a gradient not yet summed
    loss = (
        min(tokens, PLATFORM_DEFAULTS["tpu"].loss_chunk_tokens) * V / mesh["tensor"] * 10
        + V * D / mesh["tensor"] * (size + 8)
        + 4 * tokens * D
    )
    return ExpectedMemory(summary.total - summary.gradients, gradients, int(kept), int(max(layer, loss)))


def _tokens(config: Config, mesh: Mapping[str, int]) -> float:
    """Of a microbatch, on a device."""
    shards = math.prod(mesh[axis] for axis in ("data", "fsdp", "expert", "context"))
    return config.sequences_per_microbatch * config.model.context_length / shards


def _scores(config: Config, mesh: Mapping[str, int]) -> float:
    """Bytes of a layer's attention scores and probabilities, where they are held."""
    model = config.model
    if model.attention_backend != "xla" and model.attention_dropout == 0 and model.dtype == "bfloat16":
        return 0
    return _tokens(config, mesh) * model.context_length * model.num_heads / mesh["tensor"] * 8


def expected_collectives(config: Config, mesh: Mapping[str, int]) -> list[Collective]:
    """What a step will communicate: the sums that its layout asks for, in the dtype of the activations.

    For each microbatch: layers gathered over fsdp forward and backward, gradients reduced over fsdp and data; two
    gatherings and two reductions a layer over tensor forward, again where it is computed again, and twice backward
    (Korthikanti et al. 2022, section 4.2.2); keys and values passed round the ring of context.
    """
    model = config.model
    size, stored = jnp.dtype(model.dtype).itemsize, jnp.dtype(model.param_dtype).itemsize
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
        found.append(Collective("all-reduce", share * stored, _group(mesh, *axes), count))
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
    """Through a layer: forward, backward as two, and forward again where it is computed again."""
    return 2 if model.remat in ("none", "cheap", "dots") else 3


def _group(mesh: Mapping[str, int], *axes: str) -> tuple[int, ...]:
    """The devices that differ from the first one along `axes` only, by their places in the mesh."""
    ids = np.arange(math.prod(mesh.values())).reshape(tuple(mesh.values()))
    return tuple(ids[tuple(slice(None) if axis in axes else 0 for axis in mesh)].ravel().tolist())
