"""Sizes of layers on a device, and of the exchange between experts, by hand."""

import dataclasses

import pytest

from gptjax.config import BatchConfig, Config, GPTConfig, replace
from gptjax.planning import widths
from gptjax.planning.estimate import recomputed_flops_per_token
from gptjax.planning.formulas import expected_collectives, expected_memory
from gptjax.planning.program_text import mesh_axes
from gptjax.scaling.flops import attention_flops, expert_flops, forward_flops_per_token, head_flops
from gptjax.scaling.parameters import expert_parameter_count, parameter_count

ONE = dict.fromkeys(("data", "fsdp", "tensor", "context", "expert"), 1)
GPT2 = GPTConfig(vocab_size=1000, context_length=128, num_layers=4, num_heads=4, embed_dim=64)
MIXTURE = dataclasses.replace(
    GPT2, num_kv_heads=2, ffw_dim=32, gated=True, num_experts=8, experts_per_token=2, positions="rotary"
)
CONFIG = Config(model=MIXTURE, batch=BatchConfig(total_tokens=10**6, tokens_per_batch=64 * 128, microbatch_size=64))


def test_a_dense_layer_has_34_bytes_a_token_and_unit_of_width() -> None:
    """Korthikanti et al. 2022, section 4.1."""
    assert widths.layer_bytes(GPT2, ONE, 10) == 34 * 64 * 10
    assert widths.layer_bytes(GPT2, {**ONE, "tensor": 4}, 10) == 34 * 64 * 10 / 4


@pytest.mark.parametrize(
    ("remat", "width"), [("none", 17), ("cheap", 10), ("dots", 9), ("attention", 2), ("full", 1), ("offload", 0)]
)
def test_a_policy_keeps_so_many_widths(remat: str, width: int) -> None:
    model = dataclasses.replace(GPT2, remat=remat)
    assert widths.saved_bytes(model, ONE, 10) == 2 * width * 64 * 10
    grouped = dataclasses.replace(model, num_kv_heads=1)  # a quarter of the keys and values
    kept = {"none": 1.5, "cheap": 1.5, "dots": 1.5}.get(remat, 0)
    assert widths.saved_bytes(grouped, ONE, 10) == 2 * (width - kept) * 64 * 10


def test_experts_hold_a_row_for_each_expert_of_a_token() -> None:
    assert widths.expert_rows(GPT2, ONE, 10) == 0
    assert widths.expert_rows(MIXTURE, ONE, 10) == 20
    # Inputs and outputs of width 64, and gate, up and their product of width 32.
    assert widths.expert_bytes(MIXTURE, ONE, 10) == 2 * 20 * (2 * 64 + 3 * 32)
    assert widths.expert_bytes(MIXTURE, {**ONE, "tensor": 4}, 10) == 2 * 20 * (2 * 64 + 3 * 8)


@pytest.mark.parametrize(("shards", "rows"), [(2, 40), (4, 80), (8, 80)])
def test_the_buffers_of_the_exchange_hold_the_worst_case(shards: int, rows: int) -> None:
    """All tokens choose the same device, with both their experts there; a device with one expert takes one."""
    assert widths.expert_rows(MIXTURE, {**ONE, "expert": shards}, 10) == rows


def test_experts_are_not_gathered_over_expert() -> None:
    experts = expert_parameter_count(MIXTURE)
    assert widths.gathered_parameters(MIXTURE, ONE) == parameter_count(MIXTURE)
    assert widths.gathered_parameters(MIXTURE, {**ONE, "expert": 4, "tensor": 2, "fsdp": 8}) == (
        (parameter_count(MIXTURE) - experts) / 2 + experts / 8
    )


def test_tokens_are_sent_to_their_experts_and_back_in_each_pass() -> None:
    shape = {**ONE, "expert": 4}
    (exchange,) = (item for item in expected_collectives(CONFIG, shape) if item.kind == "all-to-all")
    assert mesh_axes(exchange.members, shape) == ("expert",)
    tokens = 64 * 128 / 4
    assert exchange.payload == 2 * 64 * widths.expert_rows(MIXTURE, shape, tokens)
    assert exchange.count == 2 * 2 * 4  # there and back, forward and backward, in four layers
    again = replace(CONFIG, {"model": {"remat": "dots"}})
    (exchange,) = (item for item in expected_collectives(again, shape) if item.kind == "all-to-all")
    assert exchange.count == 2 * 3 * 4


def test_gradients_of_experts_are_reduced_over_the_axes_that_do_not_shard_them() -> None:
    shape = {**ONE, "expert": 4, "data": 2, "context": 2}
    experts = expert_parameter_count(MIXTURE)
    found = {
        mesh_axes(item.members, shape): item.payload
        for item in expected_collectives(CONFIG, shape)
        if item.kind == "all-reduce"
    }
    assert found == {
        ("data", "context", "expert"): 4 * (parameter_count(MIXTURE) - experts),
        ("data", "context"): 2 * experts // 4,
    }


def test_a_banded_layer_passes_its_keys_to_neighbours_only() -> None:
    """A ring of 8 has 7 hops; chunks have 8 positions, and a band of 9 reaches one chunk on either side."""
    shape = {**ONE, "context": 8}
    hops = {}
    for pattern in (("dense",), ("dense", "banded")):
        config = replace(CONFIG, {"model": {"attention_pattern": pattern, "band_width": 9}})
        (ring,) = (item for item in expected_collectives(config, shape) if item.kind == "collective-permute")
        hops[pattern] = ring.count
        assert ring.payload == 2 * 64 * (64 * 128 // 8)  # keys and values of two heads of width 16
    assert hops == {("dense",): 3 * 4 * 7, ("dense", "banded"): 3 * (2 * 7 + 2 * 2)}


def test_heads_of_keys_are_repeated_where_tensor_needs_more() -> None:
    assert [widths.key_value_width(MIXTURE, shards) for shards in (1, 2, 4)] == [2 * 2 * 16, 2 * 2 * 16, 2 * 4 * 16]
    assert widths.key_value_width(GPT2, 3) == 2 * 4 * 16


def test_experts_are_recomputed_by_all_policies_but_none() -> None:
    again = {
        remat: recomputed_flops_per_token(dataclasses.replace(MIXTURE, remat=remat))
        for remat in ("none", "cheap", "dots", "attention", "full")
    }
    layers = forward_flops_per_token(MIXTURE) - head_flops(MIXTURE)
    attention = 4 * attention_flops(MIXTURE, 0)
    assert again == {
        "none": 0,
        "cheap": expert_flops(MIXTURE),
        "dots": expert_flops(MIXTURE) + attention,
        "attention": layers - attention,
        "full": layers,
    }


def test_the_expert_axis_divides_the_state_of_experts() -> None:
    whole, divided = (expected_memory(CONFIG, {**ONE, "expert": shards}).state for shards in (1, 4))
    assert whole - divided == pytest.approx(12 * expert_parameter_count(MIXTURE) * 3 / 4, abs=8)
