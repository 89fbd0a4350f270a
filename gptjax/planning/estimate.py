"""How long a step takes at least, by a roofline (Williams et al. 2009), and what a run of them comes to.

Bounds, not promises: peak arithmetic, peak memory bandwidth and peak links of the data sheets. Two are given, between
which a real step is seldom: everything overlaps (the slowest part alone counts), and no communication overlaps with
anything (parts add up). Left out: latencies, the time between kernels, the input pipeline, the ramp of the batch.
Attention counts as MFU counts it, all of a dense layer's square: a kernel that skips the masked half is quicker.
"""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
from jax.sharding import Mesh

from gptjax.config import Config, GPTConfig
from gptjax.losses.cross_entropy import logits_dtype
from gptjax.planning.program_text import Collective, mesh_axes, traffic
from gptjax.planning.topology import Topology, route
from gptjax.scaling.flops import flops_per_token, forward_flops_per_token, parameter_count


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device sends in a step in collectives of one kind over the same mesh axes.

    Attributes:
      kind: of collective.
      axes: of the mesh.
      count: collectives in a step.
      bytes: sent, by the ring algorithm.
      ici_seconds: on the links within a slice; None on a CPU.
      dcn_seconds: on the network between slices; None on a CPU.
    """

    kind: str
    axes: tuple[str, ...]
    count: int
    bytes: float
    ici_seconds: float | None
    dcn_seconds: float | None


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Of a step, in seconds, and what follows.

    Attributes:
      model_flops: by formula, of all devices, nothing computed twice: the numerator of MFU.
      executed_flops: the same with what rematerialisation computes again.
      compute: executed_flops at the devices' peak.
      hbm: the bytes that memory must at least move, at its peak bandwidth.
      ici, dcn: of all collectives, one after the other.
      busiest: of those over the mesh axes that ici spends most on; others may have links of their own.
      overlapped: the longest of compute, hbm, busiest and dcn.
      serial: compute or hbm, then ici, then dcn.
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
    peak: float  # FLOP/s of a device

    @property
    def overlapped(self) -> float:
        return max(self.compute, self.hbm, self.busiest, self.dcn)

    @property
    def serial(self) -> float:
        return max(self.compute, self.hbm) + self.ici + self.dcn

    def mfu(self, seconds: float) -> float:
        """Model FLOPs utilisation of a step that takes `seconds` (Chowdhery et al. 2022, appendix B)."""
        return self.model_flops / (seconds * self.devices * self.peak)


def estimate(config: Config, mesh: Mesh, topology: Topology, communication: list[Traffic]) -> Estimate | None:
    """The roofline of a training step; None where the device's peaks are not published for its dtype (a CPU).

    float32 products on a TPU take several passes in bfloat16, whose number is not published.
    """
    peak, model = topology.peak, config.model
    flops = None if peak is None else getattr(peak, model.dtype)
    if peak is None or flops is None:
        return None
    tokens, devices = config.batch.tokens_per_batch, topology.num_devices
    by_axes: dict[tuple[str, ...], float] = {}
    for part in communication:
        by_axes[part.axes] = by_axes.get(part.axes, 0) + (part.ici_seconds or 0)
    executed = tokens * (flops_per_token(model) + recomputed_flops_per_token(model))
    return Estimate(
        tokens=tokens,
        devices=devices,
        model_flops=tokens * flops_per_token(model),
        executed_flops=executed,
        compute=executed / (devices * flops),
        hbm=hbm_traffic(config, mesh.shape) / peak.bandwidth,
        ici=sum(by_axes.values()),
        busiest=max(by_axes.values(), default=0),
        dcn=sum(part.dcn_seconds or 0 for part in communication),
        peak=flops,
    )


def recomputed_flops_per_token(model: GPTConfig) -> int:
    """What the backward pass computes again under `model.remat`, per token, of the products that MFU counts."""
    D, F = model.embed_dim, model.feed_forward_dim
    assert model.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
    layers = forward_flops_per_token(model) - 2 * D * model.vocab_size
    products = model.num_layers * 2 * (4 * D * D + 2 * D * F)
    attention = layers - products  # its two products with scores
    again = {"none": 0, "cheap": 0, "dots": attention, "attention": products, "full": layers, "offload": layers}
    return again[model.remat]


def hbm_traffic(config: Config, mesh: Mapping[str, int]) -> float:
    """Bytes that the memory of a device moves in a step, roughly; attention's scores are taken to stay on the chip.

    Weights are written once and read once for every pass over a microbatch (forward, again, and two products
    backward), gradients added up in float32, optimizer state read and written. Of activations a layer makes 34 bytes a
    token and unit of width in bfloat16 (Korthikanti et al. 2022, section 4.1): written and read in a forward pass, and
    as much again twice backward. Logits, of their own dtype, are written and read twice, and their gradient, of the
    model's, too.
    """
    model, batch = config.model, config.batch
    size, stored = jnp.dtype(model.dtype).itemsize, jnp.dtype(model.param_dtype).itemsize
    count = parameter_count(model)
    microbatches = batch.tokens_per_batch // (config.sequences_per_microbatch * model.context_length)
    passes = 3 if model.remat in ("none", "cheap", "dots") else 4
    shards = mesh["fsdp"] * mesh["tensor"]
    weights = microbatches * (2 * passes * count * size / mesh["tensor"] + 3 * stored * count / shards)
    optimizer = 7 * stored * count / shards  # reads gradient, parameter, two moments; writes the last three
    sequences = batch.tokens_per_batch // model.context_length / (mesh["data"] * mesh["fsdp"] * mesh["expert"])
    tokens = sequences * model.context_length / mesh["context"]
    layers = passes * 2 * 17 * size * model.num_layers * model.embed_dim * tokens / mesh["tensor"]
    logit = jnp.dtype(logits_dtype(model, "tpu")).itemsize
    logits = 3 * (logit + size) * tokens * (model.vocab_size or 0) / mesh["tensor"]
    return weights + optimizer + layers + logits


def communicate(found: list[Collective], mesh: Mesh, topology: Topology) -> list[Traffic]:
    """What the collectives of a step cost, by kind and mesh axes, the longest first.

    Of permutes over the same axes those to different neighbours use different links, and so the same time.
    """
    groups: dict[tuple[str, tuple[str, ...]], list[Collective]] = {}
    for collective in found:
        axes = mesh_axes(collective.members, mesh.shape)
        groups.setdefault((collective.kind, axes), []).append(collective)
    parts = []
    for (kind, axes), group in groups.items():
        sent = sum(traffic(collective, topology.num_devices) for collective in group)
        times: tuple[float | None, float | None] = (None, None)
        if topology.chip is not None:
            by_neighbour: dict[tuple[int, ...], list[tuple[float, float]]] = {}
            for collective in group:
                neighbour = collective.members if kind == "collective-permute" else ()
                by_neighbour.setdefault(neighbour, []).append(seconds(collective, mesh, topology))
            sums = [[sum(part) for part in zip(*costs, strict=True)] for costs in by_neighbour.values()]
            times = max(ici for ici, _ in sums), max(dcn for _, dcn in sums)
        parts.append(Traffic(kind, axes, sum(collective.count for collective in group), sent, *times))
    return sorted(parts, key=lambda part: -((part.ici_seconds or 0) + (part.dcn_seconds or 0) or part.bytes))


def seconds(collective: Collective, mesh: Mesh, topology: Topology) -> tuple[float, float]:
    """Of all runs of a collective, at the peak of the links: within slices, and on the network between them.

    A gathering or reduction sends each chip's share once round a ring in every dimension at a time (Chan et al. 2007);
    over several slices it does so within each slice, and then each chip passes on its share of what the slice has.
    An exchange of all with all is bound by the links across the middle of the longest dimension.
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
class Training:
    """A whole run, if each step takes `seconds`."""

    steps: int
    days: float
    chip_hours: float


def training(config: Config, estimate: Estimate, seconds: float) -> Training | None:
    """For the tokens that the config sets, at the full batch; None: it sets epochs, and the corpus is not read here."""
    if config.batch.total_tokens is None:
        return None
    steps = -(-config.batch.total_tokens // config.batch.tokens_per_batch)
    return Training(steps, steps * seconds / 86400, steps * seconds / 3600 * estimate.devices)
