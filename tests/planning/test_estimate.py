import dataclasses

import jax
import pytest

from gptjax.config import BatchConfig, Config, GPTConfig, VisionConfig, replace
from gptjax.planning.estimate import (
    AxisTraffic,
    StepEstimate,
    axis_traffic,
    collective_seconds,
    estimate_step,
    estimate_training,
    hbm_traffic,
    recomputed_flops_per_token,
)
from gptjax.planning.formulas import expected_collectives, expected_memory
from gptjax.planning.program_text import Collective, mesh_axes
from gptjax.planning.topology import Topology
from gptjax.scaling.devices import TPU_CHIPS
from gptjax.scaling.flops import flops_per_token, forward_flops_per_token, image_flops, most_images
from gptjax.scaling.parameters import parameter_count
from gptjax.stages import registry
from tests.planning.paper_tpu import mesh

V5E = Topology(TPU_CHIPS["v5e"], (16, 16))
TWO_SLICES = Topology(TPU_CHIPS["v5e"], (2, 2), num_slices=2)
MODEL = GPTConfig(vocab_size=1000, context_length=128, num_layers=4, num_heads=4, embed_dim=64)
CONFIG = Config(model=MODEL, batch=BatchConfig(total_tokens=1_000_000, tokens_per_batch=256 * 128, microbatch_size=256))
RING = tuple(range(16))  # the innermost 16 chips of a v5e pod: a closed dimension


def test_an_all_gather_is_bound_by_its_ring() -> None:
    laid_out = mesh(V5E, fsdp=16, tensor=16)
    # 15 of 16 MB arrive over two links of 50 GB/s; an all-reduce takes twice as long.
    assert collective_seconds(Collective("all-gather", 16_000_000, RING, 3), laid_out, V5E) == pytest.approx(
        (3 * 15e6 / 100e9, 0)
    )
    assert collective_seconds(Collective("all-reduce", 16_000_000, RING, 1), laid_out, V5E) == pytest.approx(
        (30e6 / 100e9, 0)
    )


def test_an_all_to_all_is_bound_by_the_bisection_of_its_ring() -> None:
    # Each of 16 chips has 16 MB: of 256 MB half crosses the middle, a quarter each way, over two links each way.
    exchange = Collective("all-to-all", 16_000_000, RING, 1)
    assert collective_seconds(exchange, mesh(V5E, fsdp=16, tensor=16), V5E) == pytest.approx((256e6 / 4 / 2 / 50e9, 0))


def test_a_permute_passes_its_array_over_one_link() -> None:
    permute = Collective("collective-permute", 5_000_000, (0, 1), 2)
    assert collective_seconds(permute, mesh(V5E, fsdp=16, tensor=16), V5E) == pytest.approx((2 * 5e6 / 50e9, 0))


def test_permutes_in_opposite_directions_take_the_same_time() -> None:
    there, back = (Collective("collective-permute", 5_000_000, (0, target), 1) for target in (1, 15))
    (part,) = axis_traffic([there, back], mesh(V5E, fsdp=16, tensor=16), V5E)
    assert (part.bytes, part.ici_seconds) == (10e6, pytest.approx(5e6 / 50e9))


def test_collectives_between_slices_use_the_network() -> None:
    laid_out = mesh(TWO_SLICES, data=2, fsdp=4)
    network = TPU_CHIPS["v5e"].network
    over_data = Collective("all-reduce", 8_000_000, (0, 4), 1)
    assert collective_seconds(over_data, laid_out, TWO_SLICES) == pytest.approx((0, 2 * 8e6 / 2 / network))
    # Over all eight: reduced within a slice of 2 x 2 over two links, then a quarter of it between the slices.
    over_all = Collective("all-reduce", 8_000_000, (), 1)
    assert collective_seconds(over_all, laid_out, TWO_SLICES) == pytest.approx((2 * 6e6 / 100e9, 2 * 2e6 / 2 / network))


def test_collectives_are_summed_by_kind_and_axes() -> None:
    laid_out = mesh(V5E, fsdp=16, tensor=16)
    found = [
        Collective("all-gather", 16_000, RING, 2),
        Collective("all-gather", 32_000, RING, 1),
        Collective("all-gather", 16_000, tuple(range(0, 256, 16)), 1),
    ]
    parts = {part.axes: (part.count, part.bytes) for part in axis_traffic(found, laid_out, V5E)}
    assert parts == {("tensor",): (3, 60_000), ("fsdp",): (1, 15_000)}


def test_the_roofline_by_hand() -> None:
    laid_out = mesh(V5E, data=256)
    result = estimate_step(CONFIG, laid_out, V5E, [])
    assert result is not None
    assert result.model_flops == 256 * 128 * flops_per_token(MODEL)
    assert result.compute == pytest.approx(result.model_flops / (256 * 197e12))
    assert result.hbm == pytest.approx(hbm_traffic(CONFIG, laid_out.shape) / 819e9)
    assert result.mfu(result.compute) == pytest.approx(1)


def test_the_images_that_fit_into_a_row_are_computed_too() -> None:
    vision = VisionConfig(encoder="vit", image_size=8, patch_size=4, num_layers=2, num_heads=2, embed_dim=16)
    of_images = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, vision=vision))
    assert most_images(of_images.model) == 128 // (4 + 1)
    assert most_images(MODEL) == 0
    laid_out = mesh(V5E, data=256)
    text, found = (estimate_step(config, laid_out, V5E, []) for config in (CONFIG, of_images))
    assert text is not None
    assert found is not None
    more = 256 * 25 * 3 * image_flops(of_images.model)
    assert found.model_flops - text.model_flops == found.executed_flops - text.executed_flops == more


def test_logits_of_half_the_bytes_move_half_as_many() -> None:
    """Three passes over logits and their gradient: 2 + 2 or 4 + 2 bytes."""
    laid_out = mesh(V5E, data=256)
    moved = {
        dtype: hbm_traffic(replace(CONFIG, {"model": {"logits_dtype": dtype}}), laid_out.shape)
        for dtype in ("auto", "bfloat16", "float32")
    }
    logits = 128 * 1000  # of the one sequence on a device
    assert moved["auto"] == moved["bfloat16"] == moved["float32"] - 3 * 2 * logits


def test_axes_use_different_links() -> None:
    laid_out = mesh(V5E, fsdp=16, tensor=16)
    parts = [
        AxisTraffic("all-gather", (axis,), 1, 1.0, ici, 0.0)
        for axis, ici in (("fsdp", 2.0), ("fsdp", 3.0), ("tensor", 4.0))
    ]
    result = estimate_step(CONFIG, laid_out, V5E, parts)
    assert result is not None
    assert (result.ici, result.busiest, result.overlapped, result.serial) == (
        9,
        5,
        5,
        9 + max(result.compute, result.hbm),
    )


def test_the_bounds_are_the_longest_part_and_the_sum() -> None:
    parts = StepEstimate(
        tokens=100,
        devices=4,
        model_flops=8e12,
        executed_flops=9e12,
        compute=3,
        hbm=2,
        ici=5,
        busiest=4,
        dcn=1,
        peak=1e12,
    )
    assert (parts.overlapped, parts.serial) == (4, 9)
    assert parts.mfu(parts.serial) == 8e12 / (9 * 4 * 1e12)
    run = estimate_training(CONFIG, parts, 8)
    assert run is not None
    assert (run.steps, run.days, run.chip_hours) == (31, 31 * 8 / 86400, 31 * 8 * 4 / 3600)


def test_without_a_number_of_tokens_there_is_no_training_time() -> None:
    epochs = replace(CONFIG, {"batch": {"total_tokens": None, "epochs": 1.0}})
    parts = StepEstimate(1, 1, 1, 1, 1, 1, 1, 1, 1, 1)
    assert estimate_training(epochs, parts, 1) is None


def test_a_cpu_and_float32_on_a_tpu_have_no_published_peak() -> None:
    laid_out = mesh(V5E, data=256)
    assert estimate_step(CONFIG, laid_out, Topology(None, (256,)), []) is None
    assert estimate_step(replace(CONFIG, {"model": {"dtype": "float32"}}), laid_out, V5E, []) is None


def test_recomputed_flops_of_each_remat_policy() -> None:
    again = {remat: recomputed_flops_per_token(dataclasses.replace(MODEL, remat=remat)) for remat in REMATS}
    layers = forward_flops_per_token(MODEL) - 2 * 64 * 1000
    assert again["none"] == 0
    assert again["full"] == again["offload"] == layers == again["dots"] + again["attention"]
    assert again["dots"] == 4 * 64 * 4 * 128  # the products with scores of four layers that see 128 positions


REMATS = ("none", "dots", "attention", "full", "offload")


def test_expected_memory_falls_with_recomputation_and_sharding() -> None:
    one = dict.fromkeys(("data", "fsdp", "tensor", "context", "expert"), 1)
    totals = [expected_memory(replace(CONFIG, {"model": {"remat": remat}}), one).total for remat in REMATS]
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(REMATS)
    spread = [expected_memory(CONFIG, one | {axis: 4}).total for axis in ("data", "fsdp", "tensor", "context")]
    assert all(total < expected_memory(CONFIG, one).total for total in spread)
    assert spread[1] < spread[0]  # fsdp spreads the state too


def test_expected_collectives_are_over_the_right_axes() -> None:
    shape = {"data": 2, "fsdp": 4, "tensor": 2, "context": 2, "expert": 1}
    found = {(item.kind, mesh_axes(item.members, shape)) for item in expected_collectives(CONFIG, shape)}
    assert found == {
        ("all-gather", ("fsdp",)),
        ("reduce-scatter", ("fsdp",)),
        ("all-reduce", ("data", "context")),
        ("all-gather", ("tensor",)),
        ("reduce-scatter", ("tensor",)),
        ("collective-permute", ("context",)),
    }
    assert expected_collectives(CONFIG, dict.fromkeys(shape, 1)) == []


@pytest.mark.parametrize("param_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("optimizer", [{}, {"ema_decay": 0.9}, {"first_moment_dtype": "bfloat16"}, {"name": "muon"}])
def test_the_state_is_the_one_that_training_allocates(param_dtype, optimizer) -> None:
    config = replace(CONFIG, {"model": {"param_dtype": param_dtype}, "optimizer": optimizer})
    alone = dict.fromkeys(("data", "fsdp", "tensor", "context", "expert"), 1)
    state = registry.parameters(config).boxed_state
    params, allocated = (
        sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        for tree in (state.params, (state.params, state.opt_state, state.ema))
    )
    assert expected_memory(config, alone).state == pytest.approx(allocated, rel=1e-3)
    narrow = replace(config, {"model": {"param_dtype": "float32"}})
    assert hbm_traffic(config, alone) == hbm_traffic(narrow, alone)
    plain = replace(config, {"optimizer": {"name": "adamw", "ema_decay": None, "first_moment_dtype": "param_dtype"}})
    more = hbm_traffic(config, alone) - hbm_traffic(plain, alone)
    assert more == pytest.approx(2 * (allocated - 3 * params), rel=1e-3, abs=100)


def test_gradients_are_reduced_over_data_in_float32() -> None:
    config = replace(CONFIG, {"model": {"param_dtype": "bfloat16"}})
    shape = {**dict.fromkeys(("fsdp", "tensor", "context", "expert"), 1), "data": 4}
    (found,) = expected_collectives(config, shape)
    assert (found.kind, found.payload) == ("all-reduce", 4 * parameter_count(MODEL))
