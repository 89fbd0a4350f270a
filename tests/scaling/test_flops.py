import logging
import time
from dataclasses import dataclass, replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from gptjax.checkpoint.state import init_state
from gptjax.config import Config, GPTConfig, OptimizerConfig
from gptjax.models.gpt import GPT
from gptjax.scaling import flops
from gptjax.stages import registry

SMALL = GPTConfig(vocab_size=512, context_length=64, num_layers=4, num_heads=4, embed_dim=128, dtype="float32")


def gpt2(num_layers: int, embed_dim: int, num_heads: int, context_length: int = 1024) -> GPTConfig:
    return GPTConfig(50257, context_length, num_layers, num_heads, embed_dim)


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (gpt2(12, 768, 12), 124_439_808),
        (gpt2(24, 1024, 16), 354_823_168),
        (gpt2(36, 1280, 20), 774_030_080),
        (gpt2(48, 1600, 25), 1_557_611_200),
    ],
)
def test_gpt2_sizes_are_exact(model: GPTConfig, published: int) -> None:
    assert flops.parameter_count(model) == published


@pytest.mark.parametrize(
    ("num_layers", "embed_dim", "num_heads", "millions", "digits"),
    [
        (12, 768, 12, 125, 0),
        (24, 1024, 16, 356, 0),
        (24, 1536, 16, 760, 0),
        (24, 2048, 16, 1_320, -1),
        (32, 2560, 32, 2_650, -1),
        (32, 4096, 32, 6_660, -1),
        (40, 5120, 40, 12_850, -1),
        (96, 12288, 96, 174_600, -2),
    ],
)
def test_gpt3_sizes_round_to_table_2_1(
    num_layers: int, embed_dim: int, num_heads: int, millions: int, digits: int
) -> None:
    model = gpt2(num_layers, embed_dim, num_heads, context_length=2048)
    assert round(flops.parameter_count(model) / 1e6, digits) == millions


def test_gpt1_has_117_million_parameters() -> None:
    model = GPTConfig(vocab_size=40_000 + 478, context_length=512, norm_position="post")
    assert flops.parameter_count(model) == 116_534_784


@pytest.mark.parametrize(
    "model",
    [
        SMALL,
        replace(SMALL, norm_position="post"),
        replace(SMALL, ffw_dim=320, attention_pattern=("dense", "banded"), band_width=8),
    ],
)
def test_parameter_count_is_that_of_the_model(model: GPTConfig) -> None:
    params = jax.eval_shape(GPT(model).init, jax.random.key(0), jnp.zeros((1, 8), jnp.int32))
    assert flops.parameter_count(model) == sum(leaf.size for leaf in jax.tree.leaves(params))


def test_forward_flops_are_those_xla_counts() -> None:
    model = replace(SMALL, layer_loop="unroll")
    gpt, tokens_BT = GPT(model), jax.ShapeDtypeStruct((2, model.context_length), jnp.int32)
    params = jax.eval_shape(gpt.init, jax.random.key(0), tokens_BT)
    analysis = jax.jit(gpt.apply).lower(params, tokens_BT).compile().cost_analysis()
    assert analysis is not None
    # XLA adds the element-wise operations, a few per cent at this width.
    assert analysis["flops"] / (2 * model.context_length) == pytest.approx(
        flops.forward_flops_per_token(model), rel=0.08
    )


def test_training_flops_follow_palm_appendix_b() -> None:
    model = gpt2(12, 768, 12)
    # 6N over the matrices (the tied head is one, look-ups and vectors are not) + 12 L H Q T.
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert flops.flops_per_token(model) == 6 * matrices + 12 * 12 * 768 * 1024


def test_a_banded_layer_costs_its_band() -> None:
    dense = replace(SMALL, attention_pattern=("dense",))
    mixed = replace(SMALL, attention_pattern=("dense", "banded"), band_width=16)
    saved = 4 * 128 * (64 - 16) * 2  # in two of the four layers
    assert flops.forward_flops_per_token(dense) - flops.forward_flops_per_token(mixed) == saved
    wide = replace(mixed, band_width=1000)
    assert flops.forward_flops_per_token(wide) == flops.forward_flops_per_token(dense)


def test_memory_counts_state_and_divides_by_shards() -> None:
    count = flops.parameter_count(SMALL)
    whole = flops.memory_summary(SMALL, OptimizerConfig())
    assert whole == flops.MemorySummary(4 * count, 4 * count, 8 * count, 0)
    assert whole.total == 16 * count
    assert flops.memory_summary(SMALL, OptimizerConfig(ema_decay=0.99)).total == 20 * count
    # Trained parameters are float32, frozen ones of param_dtype.
    half = replace(SMALL, param_dtype="bfloat16")
    assert flops.memory_summary(half, OptimizerConfig(), shards=4).total == 4 * count
    assert flops.memory_summary(half, OptimizerConfig(), trained=1000).parameters == 2 * (count - 1000) + 4 * 1000


@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(),
        OptimizerConfig(first_moment_dtype="bfloat16"),
        OptimizerConfig(name="muon"),
        OptimizerConfig(name="adafactor", min_factored_dim=16),
        OptimizerConfig(name="adafactor", beta1=0.0, min_factored_dim=16),
        OptimizerConfig(name="adafactor", min_factored_dim=1000),
    ],
    ids=lambda optimizer: f"{optimizer.name}-{optimizer.first_moment_dtype}",
)
def test_moments_are_those_of_the_state(optimizer: OptimizerConfig) -> None:
    config = Config(model=SMALL, optimizer=optimizer)
    state = jax.eval_shape(lambda: init_state(registry.parameters(config)))
    arrays = [leaf for leaf in jax.tree.leaves(nn.unbox(state).opt_state) if leaf.ndim > 0]
    # Adafactor has a number in the place of what it does not keep, and Muon its coefficients.
    small = 12 + 3 * 4 * SMALL.num_layers * 20
    counted = flops.memory_summary(SMALL, optimizer).moments
    assert counted <= sum(leaf.size * leaf.dtype.itemsize for leaf in arrays) <= counted + small


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
    peak = flops.device_peak(kind)
    assert (peak and peak.name) == name


@dataclass(frozen=True)
class Device:
    device_kind: str
    platform: str = "gpu"


def test_peak_depends_on_dtype() -> None:
    h100 = Device("NVIDIA H100 PCIe")
    assert flops.peak_flops(h100, "bfloat16") == 756e12
    assert flops.peak_flops(h100, "float32") == 51e12


def test_an_unknown_device_has_no_peak_and_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert flops.peak_flops(Device("Abacus 3"), "bfloat16") is None
        assert flops.peak_flops(Device("Abacus 3"), "bfloat16") is None
    assert [record.getMessage() for record in caplog.records] == [
        "no peak FLOP/s known for Abacus 3 in bfloat16: mfu will be null"
    ]


def test_a_cpu_is_measured_once() -> None:
    cpu = jax.devices("cpu")[0]
    peak = flops.peak_flops(cpu, "float32")
    assert peak is not None
    assert 1e9 < peak < 1e14
    start = time.perf_counter()
    assert flops.peak_flops(cpu, "bfloat16") == peak
    assert time.perf_counter() - start < 0.01
