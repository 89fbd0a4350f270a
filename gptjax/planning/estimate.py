"""Roofline estimates of step time and training time (Williams et al. 2009).

Estimates assume the peak FLOP/s, memory bandwidth and link bandwidth of the data sheets. There are two per step: with
everything overlapped (the slowest part counts) and with no communication overlapped (parts add up). A real step is
usually slower than the first. Not modelled: latencies, gaps between kernels, the input pipeline, the batch size ramp.
Attention is counted as for MFU, with all scores of a dense layer: a kernel that skips masked blocks is faster.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.config import Config, GPTConfig
from gptjax.losses.cross_entropy import logits_dtype
from gptjax.planning import widths
from gptjax.planning.program_text import Collective, bytes_sent, mesh_axes
from gptjax.planning.topology import Topology, route
from gptjax.scaling.flops import (
    attention_flops,
    expert_flops,
    flops_per_token,
    forward_flops_per_token,
    head_flops,
    image_step_flops,
    most_images,
)
from gptjax.scaling.memory import memory_summary


@dataclasses.dataclass(frozen=True)
class AxisTraffic:
    """Traffic of one device in a step, over all collectives of one kind and the same mesh axes.

    Attributes:
      kind: kind of collective, such as "all-gather".
      axes: mesh axes.
      count: number of collectives in a step.
      bytes: bytes sent, with ring algorithms.
      ici_seconds: time on the links within a slice; None on a CPU.
      dcn_seconds: time on the network between slices; None on a CPU.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    ici_seconds: float | None
    dcn_seconds: float | None


@dataclasses.dataclass(frozen=True)
class StepEstimate:
    """Estimated time of a training step; times in seconds.

    Attributes:
      model_flops: FLOPs of the model over all devices, without recomputation: the numerator of MFU.
      executed_flops: FLOPs including rematerialisation.
      compute: time of executed_flops at the devices' peak.
      hbm: time of the memory traffic at peak bandwidth.
      ici, dcn: time of all collectives within and between slices, one after the other.
      busiest: time of the collectives over the mesh axes with the largest ici time; other axes may use other links.
      overlapped: maximum of compute, hbm, busiest and dcn.
      serial: max(compute, hbm) + ici + dcn.
    """

    tokens: int
    devices: int
    model_flops: float
    executed_flops: float
    compute: float
    hbm: float
    ici: float
    busiest: float
    dcn: float
    peak: float  # peak FLOP/s of a device

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.hbm, self.busiest, self.dcn)

    @property
    def serial(self) -> float:
        return max(self.compute, self.hbm) + self.ici + self.dcn

    @property
    def bound(self) -> str:
        """The largest part of the step, with communication not overlapped: compute, memory, links or network."""
        parts = {"compute": self.compute, "memory": self.hbm, "links": self.ici, "network": self.dcn}
        return max(parts, key=parts.__getitem__)

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step that takes `seconds` (Chowdhery et al. 2022, appendix B)."""
        return self.model_flops / (seconds * self.devices * self.peak)


def estimate_step(
    config: Config, mesh: Mesh, topology: Topology, communication: list[AxisTraffic]
) -> StepEstimate | None:
    """Computes the roofline of a training step; None where the device's peak is not published for the model's dtype.

    That is the case for CPUs, and for float32 on TPUs, whose float32 products take several bfloat16 passes.
    """
    peak, model = topology.peak, config.model
    flops = None if peak is None else getattr(peak, model.dtype)
    if peak is None or flops is None:
        return None
    tokens, devices = config.batch.tokens_per_batch, topology.num_devices
    by_axes: dict[tuple[str, ...], float] = {}
    for part in communication:
        by_axes[part.axes] = by_axes.get(part.axes, 0) + (part.ici_seconds or 0)
    images = tokens // model.context_length * most_images(model)
    of_images = images * image_step_flops(model, "all")
    executed = tokens * (flops_per_token(model) + recomputed_flops_per_token(model)) + of_images
    return StepEstimate(
        tokens=tokens,
        devices=devices,
        model_flops=tokens * flops_per_token(model) + of_images,
        executed_flops=executed,
        compute=executed / (devices * flops),
        hbm=hbm_traffic(config, mesh.shape) / peak.bandwidth,
        ici=sum(by_axes.values()),
        busiest=max(by_axes.values(), default=0),
        dcn=sum(part.dcn_seconds or 0 for part in communication),
        peak=flops,
    )


def recomputed_flops_per_token(model: GPTConfig) -> int:
    """Computes the FLOPs per token that the backward pass recomputes under `model.remat`, counted as for MFU.

    "cheap" and "dots" also recompute the grouped products of experts.
    """
    layers = forward_flops_per_token(model) - head_flops(model)
    attention = sum(attention_flops(model, n) for n in range(model.num_layers))  # its two products with scores
    experts = expert_flops(model)
    again = {"none": 0, "cheap": experts, "dots": attention + experts, "attention": layers - attention}
    return again.get(model.remat, layers)


def hbm_traffic(config: Config, mesh: Mapping[str, int]) -> float:
    """Estimates the memory traffic of a device in a step, in bytes; attention scores are assumed to stay on chip.

    Each pass over a microbatch (forward, recomputation, two matrix products backward) writes and reads the gathered
    weights, those of all experts among them, and gradients are accumulated in float32. The update reads the gradient,
    and reads and writes the state: parameters, moments and moving average, in the dtypes of `memory_summary`. A layer's
    activations (`widths.layer_bytes`) are written and read in each pass. Logits (in logits_dtype) and their gradient
    (in the model's dtype) are written and read, three passes in all.
    """
    model, batch = config.model, config.batch
    size = jnp.dtype(model.dtype).itemsize
    microbatches = batch.tokens_per_batch // (config.sequences_per_microbatch * model.context_length)
    passes = 3 if model.remat in ("none", "cheap", "dots") else 4
    state = memory_summary(model, config.optimizer, mesh["fsdp"] * mesh["tensor"], expert_shards=mesh["expert"])
    # Each microbatch reads the float32 parameters, and reads and writes the sum of gradients.
    gathered = 2 * passes * size * widths.gathered_parameters(model, mesh)
    weights = microbatches * (gathered + state.parameters + 2 * state.gradients)
    update = state.gradients + 2 * (state.total - state.gradients)
    sequences = batch.tokens_per_batch // model.context_length / (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    tokens = sequences * model.context_length / mesh["context"]
    layers = passes * 2 * model.num_layers * widths.layer_bytes(model, mesh, tokens)
    logit = jnp.dtype(logits_dtype(model, "tpu")).itemsize
    logits = 3 * (logit + size) * tokens * (model.vocab_size or 0) / mesh["tensor"]
    return weights + update + layers + logits


def axis_traffic(found: list[Collective], mesh: Mesh, topology: Topology) -> list[AxisTraffic]:
    """Sums the cost of a step's collectives by kind and mesh axes, the longest first.

    Permutes to different neighbours along the same axes use different links at the same time.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for collective in found:
        axes = mesh_axes(collective.members, mesh.shape)
        groups.setdefault((collective.kind, axes), []).append(collective)
    parts = []
    for (kind, axes), group in groups.items():
        sent = sum(bytes_sent(collective, topology.num_devices) for collective in group)
        times: tuple[float | None, float | None] = (None, None)
        if topology.chip is not None:
            by_neighbour: dict[tuple[int, ...], list[tuple[float, float]]] = {}
            for collective in group:
                neighbour = collective.members if kind == "collective-permute" else ()
                by_neighbour.setdefault(neighbour, []).append(collective_seconds(collective, mesh, topology))
            sums = [[sum(part) for part in zip(*costs, strict=True)] for costs in by_neighbour.values()]
            times = max(ici for ici, _ in sums), max(dcn for _, dcn in sums)
        parts.append(AxisTraffic(kind, axes, sum(collective.count for collective in group), sent, *times))
    return sorted(parts, key=lambda part: -((part.ici_seconds or 0) + (part.dcn_seconds or 0) or part.bytes))


def collective_seconds(collective: Collective, mesh: Mesh, topology: Topology) -> tuple[float, float]:
    """Computes the time of all runs of a collective at peak link bandwidth: (within slices, between slices).

    All-gathers and reductions use ring algorithms along all torus dimensions at once (Chan et al. 2007); over several
    slices they run within each slice first, and then each chip exchanges its shard with the other slices. All-to-all is
    bound by the bisection bandwidth of the longest dimension.
    """
    assert topology.chip is not None, "a CPU has no links"
    way = route(collective.members, mesh, topology)
    size = len(collective.members) or topology.num_devices
    within = max(1, size // way.slices)
    if collective.kind == "collective-permute":
        sent, passed = (collective.payload, 0.0) if way.slices == 1 else (0.0, float(collective.payload))
    elif collective.kind == "all-to-all":
        sent = collective.payload * way.length / 4
        passed = collective.payload * (way.slices - 1) / way.slices
    else:
        times = 2 if collective.kind == "all-reduce" else 1
        sent = times * collective.payload * (within - 1) / within
        passed = times * collective.payload / within * (way.slices - 1) / way.slices
    ici = sent / way.send if sent and way.send else 0.0
    return collective.count * ici, collective.count * passed / topology.chip.network


@dataclasses.dataclass(frozen=True)
class TrainingEstimate:
    """A whole run, if each step takes `seconds`."""

    steps: int
    days: float
    chip_hours: float


def estimate_training(config: Config, estimate: StepEstimate, seconds: float) -> TrainingEstimate | None:
    """Estimates a training run at the full batch size; None where the config sets epochs instead of tokens."""
    if config.batch.total_tokens is None:
        return None
    steps = -(-config.batch.total_tokens // config.batch.tokens_per_batch)
    return TrainingEstimate(steps, steps * seconds / 86400, steps * seconds / 3600 * estimate.devices)
