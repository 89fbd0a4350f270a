import logging
from dataclasses import dataclass

import jax
import pytest

from gptjax.scaling import devices


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("TPU v4", "TPU v4"),
        ("TPU v5 lite", "TPU v5 lite"),
        ("TPU v5", "TPU v5"),
        ("TPU v5p", "TPU v5p"),
        ("TPU v6 lite", "TPU v6 lite"),
        ("TPU7x", "TPU7x"),
        ("NVIDIA A100-SXM4-40GB", "A100"),
        ("NVIDIA A100-SXM4-80GB", "A100-SXM4-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100 80GB HBM3"),
        ("NVIDIA H200", "H200"),
        ("NVIDIA H200 NVL", "H200 NVL"),
        ("NVIDIA H100 NVL", "H100 NVL"),
        ("NVIDIA B200 NVL", None),
        ("NVIDIA A10G", "A10G"),
        ("NVIDIA L40S", "L40S"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA T400", None),
    ],
)
def test_device_kinds_find_their_entry(kind: str, name: str | None) -> None:
    peak = devices.device_peak(kind)
    assert (peak and peak.name) == name


@dataclass(frozen=True)
class Device:
    device_kind: str
    platform: str = "gpu"


def test_peak_depends_on_dtype() -> None:
    h100 = Device("NVIDIA H100 PCIe")
    assert devices.peak_flops(h100, "bfloat16") == 756e12
    assert devices.peak_flops(h100, "float32") == 51e12


def test_an_unknown_device_has_no_peak_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert devices.peak_flops(Device("Abacus 3"), "bfloat16") is None
        assert devices.peak_flops(Device("Abacus 3"), "bfloat16") is None
    assert [record.getMessage() for record in caplog.records] == [
        "no peak FLOP/s known for Abacus 3 in bfloat16: mfu will be null"
    ]


def test_a_cpu_is_measured_once() -> None:
    cpu = jax.devices("cpu")[0]
    peak = devices.peak_flops(cpu, "float32")
    assert peak is not None
    assert 1e8 < peak < 1e14
    measured = devices._measured_cpu_flops.cache_info().misses
    assert devices.peak_flops(cpu, "bfloat16") == peak
    assert devices._measured_cpu_flops.cache_info().misses == measured
