"""Peak rates of devices, and the links between the chips of a TPU."""

import dataclasses
import functools
import logging
import re
import time

import jax
import jax.numpy as jnp


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
    program_memory: float  # bytes of a chip that programs may use, as libtpu 0.0.42 says


# https://cloud.google.com/tpu/docs (v4, v5e, v5p, v6e), which gives the bandwidth of all links of a chip in both
# directions (v5e 400, v5p 1200, v6e 800 GB/s; v4 2400 Gb/s in one): here divided by links and directions. Between
# slices: per chip for v5p (50 Gb/s), per pod for v5e (6.4 Tb/s) and v6e (25.6 Tb/s). The figure of v4, and where a
# torus has wraparound links, are from "How to Scale Your Model" (Austin et al. 2025, part 2).
TPU_CHIPS = {
    chip.name: chip
    for chip in (
        TPUChip("v4", "TPU v4", 50 * GB, 6.25 * GB, 3, 4, 4096, 30.75 * GiB),
        TPUChip("v5e", "TPU v5e", 50 * GB, 3.125 * GB, 2, 16, 256, 15.75 * GiB),
        TPUChip("v5p", "TPU v5p", 100 * GB, 6.25 * GB, 3, 4, 6144, 95.74 * GiB),
        TPUChip("v6e", "TPU v6e", 100 * GB, 12.5 * GB, 2, 16, 256, 31.25 * GiB),
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
      device: a CPU is measured, in float32 whatever the dtype (a tenth of a second, once); others are looked up.
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
def _measured_cpu_flops(size: int = 1024, repeats: int = 5) -> float:
    """FLOP/s of the fastest of `repeats` float32 products of two (size, size) matrices over all cores.

    Larger matrices are no faster, and would delay the start of every run.
    """
    with jax.default_device(jax.local_devices(backend="cpu")[0]):
        x_XX = jnp.ones((size, size), jnp.float32)
        product = jax.jit(jnp.matmul)
        product(x_XX, x_XX).block_until_ready()
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            product(x_XX, x_XX).block_until_ready()
            times.append(time.perf_counter() - start)
    return 2 * size**3 / min(times)
