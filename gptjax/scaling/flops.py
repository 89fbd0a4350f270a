"""Parameters, floating-point operations and bytes of a model by formula, and the peak rates of devices.

These are formulas because XLA's cost analysis counts the body of a scan over layers only once. Tests compare them with
the model.
"""

import dataclasses
import functools
import logging
import math
import re
import time

import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig, OptimizerConfig

# --- the model --------------------------------------------------------------------------------------------------------


def parameter_count(model: GPTConfig) -> int:
    """Number of parameters; vocab_size must be set. The tied head (Radford et al. 2018, section 3.1) counts once."""
    embedding_rows = _vocab_size(model) + model.context_length
    return non_embedding_parameter_count(model) + embedding_rows * model.embed_dim


def non_embedding_parameter_count(model: GPTConfig) -> int:
    """Number of parameters without token and position embeddings: N of Kaplan et al. 2020, section 2.1, with biases."""
    D, F = model.embed_dim, model.feed_forward_dim
    attention = (D + model.qkv_bias) * 3 * D + (D + 1) * D
    feed_forward = (D + 1) * F + (F + 1) * D
    norm = 2 * D
    adapter = 0 if model.adapter_dim is None else 2 * D * model.adapter_dim + model.adapter_dim + D
    final_norm = norm if model.norm_position == "pre" else 0
    return model.num_layers * (attention + feed_forward + 2 * norm + 2 * adapter) + final_norm


def forward_flops_per_token(model: GPTConfig) -> int:
    """Floating-point operations of the forward pass over a full context, per token.

    Counts every matrix product, two operations per multiply-add: the layers, the head, and attention's two products.
    Attention is counted as PaLM does (Chowdhery et al. 2022, appendix B): a dense layer as if each position saw all
    `context_length` of them, the causal half included; a banded layer as if each saw min(band_width, context_length).
    Embedding look-ups, biases, norms, softmax and activations are not counted.
    """
    layers = range(model.num_layers)
    return (
        model.num_layers * _kernel_flops(model) + sum(_attention_flops(model, n) for n in layers) + _head_flops(model)
    )


def _kernel_flops(model: GPTConfig) -> int:
    """Forward pass of a layer per token: the products with its kernels."""
    D, F = model.embed_dim, model.feed_forward_dim
    return 2 * (3 * D * D + D * D + 2 * D * F) + 2 * (4 * D * (model.adapter_dim or 0))


def _attention_flops(model: GPTConfig, layer: int) -> int:
    """Forward pass of a layer per token: scores, and weighted sums of values."""
    kind = model.attention_pattern[layer % len(model.attention_pattern)]
    seen = model.context_length if kind == "dense" else min(model.band_width, model.context_length)
    return 4 * model.embed_dim * seen


def _head_flops(model: GPTConfig) -> int:
    return 2 * model.embed_dim * _vocab_size(model)


def flops_per_token(model: GPTConfig) -> int:
    """Floating-point operations per token of a training step in which all parameters are trained.

    It is three times the forward pass, as the backward pass costs two. Recomputation by rematerialisation is not
    counted (Chowdhery et al. 2022, appendix B).
    """
    return 3 * forward_flops_per_token(model)


@dataclasses.dataclass(frozen=True)
class TrainedPart:
    """The trained part of a model whose other parameters are frozen.

    Attributes:
      weights: trained entries of matrices: kernels of layers, and the token embedding, which is the tied head.
      low_rank: trained entries of low-rank matrices next to kernels.
      lowest_layer: the number, from 0, of the lowest layer with trained parameters; the backward pass ends there.
    """

    weights: int
    low_rank: int
    lowest_layer: int


def partial_flops_per_token(model: GPTConfig, trained: TrainedPart) -> int:
    """Floating-point operations per token of a training step in which a part of the parameters is trained.

    The forward pass, the gradients of activations down to the lowest trained layer, and the gradients of trained
    weights; with everything trained it is `flops_per_token`.
    """
    above = range(trained.lowest_layer, model.num_layers)
    activation_gradients = sum(_kernel_flops(model) + 2 * _attention_flops(model, n) for n in above) + _head_flops(
        model
    )
    low_rank = 3 * 2 * trained.low_rank  # forward pass, gradients of activations, gradients of weights
    return forward_flops_per_token(model) + activation_gradients + 2 * trained.weights + low_rank


def _vocab_size(model: GPTConfig) -> int:
    assert model.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
    return model.vocab_size


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
    model: GPTConfig, optimizer: OptimizerConfig, shards: int = 1, trained: int | None = None
) -> MemorySummary:
    """Bytes per device when each array is sharded over `shards` devices, the mesh's fsdp * tensor.

    Slightly low when sharded: norms, some biases and position embeddings are replicated. Trained parameters are
    float32, frozen ones of model.param_dtype.

    Args:
      trained: number of trained parameters; None: all.
    """
    parameters = parameter_count(model)
    trained = parameters if trained is None else trained
    frozen_bytes = max(0, parameters - trained) * jnp.dtype(model.param_dtype).itemsize
    every, tree = (-(-count // shards) for count in (4 * trained + frozen_bytes, 4 * trained))
    first, second = moment_counts(model, optimizer)
    first_width = 2 if optimizer.first_moment_dtype == "bfloat16" else 4
    moments = -(-(first * first_width + second * 4) * trained // (parameters * shards))
    return MemorySummary(
        parameters=every, gradients=tree, moments=moments, ema=0 if optimizer.ema_decay is None else tree
    )


def moment_counts(model: GPTConfig, optimizer: OptimizerConfig) -> tuple[int, int]:
    """Number of entries of the first and of the second moments when all of `model` is trained."""
    every, D, F, H, K = parameter_count(model), model.embed_dim, model.feed_forward_dim, model.num_heads, model.head_dim
    kernels = [(D, 3, H, K), (H, K, D), (D, F), (F, D)]  # of a layer
    if model.adapter_dim is not None:
        kernels += 2 * [(D, model.adapter_dim), (model.adapter_dim, D)]
    if optimizer.name == "adamw":
        return every, every
    if optimizer.name == "muon":  # has no second moments of kernels
        return every, every - model.num_layers * sum(map(math.prod, kernels))
    biases = [] if not model.qkv_bias else [(3, H, K)]
    tables = [(_vocab_size(model), D), (model.context_length, D)]
    saved = 0
    for shape, count in [*((s, model.num_layers) for s in kernels + biases), *((s, 1) for s in tables)]:
        *_, columns, rows = sorted(shape)
        if columns >= optimizer.min_factored_dim:
            saved += count * (math.prod(shape) - math.prod(shape) // rows - math.prod(shape) // columns)
    return (every if optimizer.beta1 > 0 else 0), every - saved


# --- the devices ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class DevicePeak:
    """Peak rates of one JAX device by the vendor's data sheet, dense (without sparsity)."""

    name: str  # words in JAX's device_kind
    bfloat16: float  # FLOP/s, float32 accumulation
    float32: float | None  # FLOP/s, not TF32; None: not published
    memory: float  # bytes
    bandwidth: float  # bytes of memory per second


GB, GiB, TFLOPS = 1e9, 2.0**30, 1e12

# TPUs: https://cloud.google.com/tpu/docs (v2, v3, v4, v5e, v5p, v6e, tpu7x), which publishes no float32 peak. A chip of
# v2, v3 and 7x is two jax devices: half of its figures each.
# NVIDIA: the data sheets of these GPUs (A10G: the one for AWS), the white papers of the GeForce architectures. The data
# sheets of Hopper give bfloat16 with sparsity, twice the dense rate: 1,671 TFLOPS for H100 NVL and H200 NVL.
# V100 and T4 have no bfloat16 units: XLA computes such products in float32. AMD: data sheet of MI300X.
DEVICE_PEAKS = tuple(
    DevicePeak(name, bfloat16 * TFLOPS, None if float32 is None else float32 * TFLOPS, memory, bandwidth * GB)
    for name, bfloat16, float32, memory, bandwidth in (
        ("TPU v2", 22.5, None, 8 * GiB, 350),
        ("TPU v3", 61.5, None, 16 * GiB, 450),
        ("TPU v4", 275, None, 32 * GiB, 1228),
        ("TPU v5 lite", 197, None, 16 * GiB, 819),
        ("TPU v5e", 197, None, 16 * GiB, 819),
        ("TPU v5", 459, None, 95 * GiB, 2765),
        ("TPU v5p", 459, None, 95 * GiB, 2765),
        ("TPU v6 lite", 918, None, 32 * GiB, 1638),
        ("TPU v6e", 918, None, 32 * GiB, 1638),
        ("TPU7x", 1153.5, None, 96 * GiB, 3690),
        ("B200", 2250, 75, 180 * GB, 8000),
        ("GH200", 990, 67, 96 * GB, 4000),
        ("H200", 989, 67, 141 * GB, 4800),
        ("H200 NVL", 835, 60, 141 * GB, 4800),
        ("H100 80GB HBM3", 989, 67, 80 * GB, 3350),
        ("H100 PCIe", 756, 51, 80 * GB, 2000),
        ("H100 NVL", 835, 60, 94 * GB, 3900),
        ("A100-SXM4-80GB", 312, 19.5, 80 * GB, 2039),
        ("A100 80GB PCIe", 312, 19.5, 80 * GB, 1935),
        ("A100", 312, 19.5, 40 * GB, 1555),
        ("A30", 165, 10.3, 24 * GB, 933),
        ("A10", 125, 31.2, 24 * GB, 600),
        ("A10G", 70, 35, 24 * GB, 600),
        ("L40S", 362, 91.6, 48 * GB, 864),
        ("L40", 181, 90.5, 48 * GB, 864),
        ("L4", 121, 30.3, 24 * GB, 300),
        ("T4", 8.1, 8.1, 16 * GB, 300),
        ("V100-SXM2-32GB", 15.7, 15.7, 32 * GB, 900),
        ("V100-SXM2-16GB", 15.7, 15.7, 16 * GB, 900),
        ("V100-PCIE-32GB", 14, 14, 32 * GB, 900),
        ("V100-PCIE-16GB", 14, 14, 16 * GB, 900),
        ("RTX A6000", 154.8, 38.7, 48 * GB, 768),
        ("RTX 6000 Ada Generation", 364, 91.1, 48 * GB, 960),
        ("RTX 3090", 71, 35.6, 24 * GB, 936),
        ("RTX 4090", 165.2, 82.6, 24 * GB, 1008),
        ("RTX 5090", 209.5, 104.8, 32 * GB, 1792),
        ("MI300X", 1307.4, 163.4, 192 * GB, 5300),
    )
)


@dataclasses.dataclass(frozen=True)
class TPUChip:
    """A kind of TPU that is available in slices, and the links between its chips."""

    name: str  # in topologies such as v5p:2x2x1
    device: str  # its name in DEVICE_PEAKS; a chip is one JAX device
    link: float  # bytes per second and direction of one link between neighbouring chips
    network: float  # bytes per second and direction: a chip's share of the network between slices
    dimensions: int  # of the torus
    wraps_at: int  # a dimension that is a multiple of it has wraparound links
    max_chips: int  # in a slice


# https://cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), which gives the bandwidth of all links of a chip in both
# directions (v5e 400, v5p 1200, v6e 800 GB/s; v4 2400 Gb/s in one): here divided by links and directions. Between
# slices: per chip for v5p (50 Gb/s), per pod for v5e (6.4 Tb/s) and v6e (25.6 Tb/s). The figure of v4, and where a
# torus has wraparound links, are from "How to Scale Your Model" (Austin et al. 2025, part 2).
TPU_CHIPS = {
    chip.name: chip
    for chip in (
        TPUChip("v4", "TPU v4", 50 * GB, 6.25 * GB, 3, 4, 4096),
        TPUChip("v5e", "TPU v5e", 50 * GB, 3.125 * GB, 2, 16, 256),
        TPUChip("v5p", "TPU v5p", 100 * GB, 6.25 * GB, 3, 4, 6144),
        TPUChip("v6e", "TPU v6e", 100 * GB, 12.5 * GB, 2, 16, 256),
    )
}

# Words that name a slower or faster variant of a device. An entry without the word does not stand for the variant.
VARIANT = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|D|NVL)\b", re.IGNORECASE)


def device_peak(device_kind: str) -> DevicePeak | None:
    """The most specific entry of DEVICE_PEAKS whose name occurs in `device_kind` as whole words; None: no entry."""
    matches = [
        peak for peak in DEVICE_PEAKS if re.search(rf"\b{re.escape(peak.name)}\b", device_kind, flags=re.IGNORECASE)
    ]
    best = max(matches, key=lambda peak: len(peak.name), default=None)
    if best is None or VARIANT.search(re.sub(re.escape(best.name), "", device_kind, flags=re.IGNORECASE)):
        return None
    return best


@functools.cache
def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Peak FLOP/s of matrix products on one device: the denominator of model FLOPs utilisation (MFU).

    Args:
      device: a CPU is measured, in float32 whatever the dtype (less than a second, once); others are looked up.
      dtype: of the matrix products, "bfloat16" or "float32".

    Returns:
      FLOP/s; None, with a warning, if the device's peak for the dtype is not in DEVICE_PEAKS.
    """
    if device.platform == "cpu":
        # Simulated devices share the cores.
        return _measured_cpu_flops() / jax.local_device_count("cpu")
    peak = device_peak(device.device_kind)
    flops = getattr(peak, dtype, None)
    if flops is None:
        logging.warning("no peak FLOP/s known for %s in %s: mfu will be null", device.device_kind, dtype)
    return flops


@functools.cache
def _measured_cpu_flops(repeats: int = 5) -> float:
    """FLOP/s of the fastest of `repeats` float32 products of two square matrices over all cores.

    The matrices grow until a product takes 10 ms: small ones underestimate a CPU with many cores.
    """
    product = jax.jit(jnp.matmul)
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        for size in (1024, 2048, 4096):
            x_XX = jnp.ones((size, size), jnp.float32)
            product(x_XX, x_XX).block_until_ready()
            times = []
            for _ in range(repeats):
                start = time.perf_counter()
                product(x_XX, x_XX).block_until_ready()
                times.append(time.perf_counter() - start)
            if min(times) > 0.01:
                break
    return 2 * size**3 / min(times)
