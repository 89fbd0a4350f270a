"""What a model costs: parameters, floating-point operations and bytes by formula, and what devices can deliver.

Formulae, because XLA's own analysis counts the body of a scan over layers once. A test holds them to the real model.
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
    """Parameters of `model`, whose vocab_size is set; the tied head (Radford et al. 2018, section 3.1) counts once."""
    embedding_rows = _vocab_size(model) + model.context_length
    return non_embedding_parameter_count(model) + embedding_rows * model.embed_dim


def non_embedding_parameter_count(model: GPTConfig) -> int:
    """Parameters without the token and position embeddings: N of Kaplan et al. 2020, section 2.1, biases included."""
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
    D, F = model.embed_dim, model.feed_forward_dim
    layer_products = 2 * (3 * D * D + D * D + 2 * D * F) + 2 * (4 * D * (model.adapter_dim or 0))
    head = 2 * D * _vocab_size(model)
    seen = {"dense": model.context_length, "banded": min(model.band_width, model.context_length)}
    pattern = model.attention_pattern
    positions = sum(seen[pattern[layer % len(pattern)]] for layer in range(model.num_layers))
    return model.num_layers * layer_products + 4 * D * positions + head


def flops_per_token(model: GPTConfig) -> int:
    """Floating-point operations of a training step, per token: the numerator of model FLOPs utilisation (MFU).

    Three forward passes: the backward pass costs two. What rematerialisation computes again is not counted
    (Chowdhery et al. 2022, appendix B).
    """
    return 3 * forward_flops_per_token(model)


def _vocab_size(model: GPTConfig) -> int:
    assert model.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
    return model.vocab_size


@dataclasses.dataclass(frozen=True)
class MemorySummary:
    """Bytes on each device that a training step keeps from one step to the next; activations come on top."""

    parameters: int
    gradients: int
    moments: int  # what the optimizer keeps
    ema: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.moments + self.ema


def memory_summary(
    model: GPTConfig, optimizer: OptimizerConfig, shards: int = 1, trained: int | None = None
) -> MemorySummary:
    """Bytes per device when each array is spread over `shards` devices, the mesh's fsdp * tensor.

    Slightly low when sharded: norms, some biases and position embeddings stay whole on every device or axis.

    Args:
      trained: parameters that are trained; None: all.
    """
    parameters, width = parameter_count(model), jnp.dtype(model.param_dtype).itemsize
    trained = parameters if trained is None else trained
    every, tree = (-(-count * width // shards) for count in (parameters, trained))
    first, second = moment_counts(model, optimizer)
    first_dtype = optimizer.first_moment_dtype
    first_width = width if first_dtype == "param_dtype" else jnp.dtype(first_dtype).itemsize
    moments = -(-(first * first_width + second * width) * trained // (parameters * shards))
    return MemorySummary(
        parameters=every, gradients=tree, moments=moments, ema=0 if optimizer.ema_decay is None else tree
    )


def moment_counts(model: GPTConfig, optimizer: OptimizerConfig) -> tuple[int, int]:
    """Numbers in the first and the second moments when all of `model` is trained."""
    every, D, F, H, K = parameter_count(model), model.embed_dim, model.feed_forward_dim, model.num_heads, model.head_dim
    kernels = [(D, 3, H, K), (H, K, D), (D, F), (F, D)]  # of a layer; and its adapters'
    if model.adapter_dim is not None:
        kernels += 2 * [(D, model.adapter_dim), (model.adapter_dim, D)]
    if optimizer.name == "adamw":
        return every, every
    if optimizer.name == "muon":  # orthogonalises the first
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
    """What a vendor's data sheet promises of one jax device, dense (without sparsity)."""

    name: str  # words that JAX's device_kind contains
    bfloat16: float  # FLOP/s, float32 accumulation
    float32: float | None  # FLOP/s, not TF32; None: not published
    memory: float  # bytes
    bandwidth: float  # bytes of memory per second


GB, GiB, TFLOPS = 1e9, 2.0**30, 1e12

# TPUs: https://cloud.google.com/tpu/docs (v2, v3, v4, v5e, v5p, v6e, tpu7x), which publishes no float32 peak. A chip of
# v2, v3 and 7x is two jax devices: half of its figures each.
# NVIDIA: the data sheets of these GPUs (A10G: the one for AWS), the white papers of the GeForce architectures. V100 and
# T4 have no bfloat16 units: XLA computes such products in float32. AMD: data sheet of MI300X.
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
    """A kind of TPU that is rented in slices: how its chips are connected."""

    name: str  # in topologies such as v5p:2x2x1
    device: str  # its name in DEVICE_PEAKS; a chip is one JAX device
    link: float  # bytes per second and direction of one link between neighbouring chips
    network: float  # bytes per second and direction of a chip's share in the links between slices
    dimensions: int  # of the torus
    wraps_at: int  # a dimension that is a multiple of it closes to a ring
    max_chips: int  # of a slice


# https://cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), which gives the bandwidth of all links of a chip in both
# directions (v5e 400, v5p 1200, v6e 800 GB/s; v4 2400 Gb/s in one): here divided by links and directions. Between
# slices: per chip for v5p (50 Gb/s), per pod for v5e (6.4 Tb/s) and v6e (25.6 Tb/s); v4, whose figure is not there, as
# "How to Scale Your Model" (Austin et al. 2025, part 2) has it, which also tells where a torus closes.
TPU_CHIPS = {
    chip.name: chip
    for chip in (
        TPUChip("v4", "TPU v4", 50 * GB, 6.25 * GB, 3, 4, 4096),
        TPUChip("v5e", "TPU v5e", 50 * GB, 3.125 * GB, 2, 16, 256),
        TPUChip("v5p", "TPU v5p", 100 * GB, 6.25 * GB, 3, 4, 6144),
        TPUChip("v6e", "TPU v6e", 100 * GB, 12.5 * GB, 2, 16, 256),
    )
}

# Words that make another, slower or faster, device of a name in the table.
VARIANT = re.compile(r"\b(MIG|Laptop|Max-Q|Ti|D)\b", re.IGNORECASE)


def device_peak(device_kind: str) -> DevicePeak | None:
    """The most specific entry of DEVICE_PEAKS whose name stands in `device_kind` as whole words; None: no entry."""
    if VARIANT.search(device_kind):
        return None
    matches = [
        peak for peak in DEVICE_PEAKS if re.search(rf"\b{re.escape(peak.name)}\b", device_kind, flags=re.IGNORECASE)
    ]
    return max(matches, key=lambda peak: len(peak.name), default=None)


@functools.cache
def peak_flops(device: jax.Device, dtype: str) -> float | None:
    """Peak FLOP/s of matrix products on one device: the denominator of MFU.

    Args:
      device: a CPU is measured, in float32 whatever the dtype (less than a second, once); others are looked up.
      dtype: of the model's products, "bfloat16" or "float32".

    Returns:
      FLOP/s; None, with a warning, when the device's peak for the dtype is not in DEVICE_PEAKS.
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
def _measured_cpu_flops(size: int = 2048, repeats: int = 5) -> float:
    """FLOP/s of the fastest of `repeats` float32 products of two (size, size) matrices over all cores."""
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x_NN = jnp.ones((size, size), jnp.float32)
        product = jax.jit(jnp.matmul)
        product(x_NN, x_NN).block_until_ready()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            product(x_NN, x_NN).block_until_ready()
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
