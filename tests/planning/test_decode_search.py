"""Layouts for generation and for training by formula, without libtpu."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import Config, GPTConfig, MeshConfig, UserError, load_config
from gptjax.models import decoding
from gptjax.models.gpt import GPT, init_params
from gptjax.parallel.mesh import check_fit, check_model_fit, make_mesh
from gptjax.planning import formula_plan
from gptjax.planning.decode_plan import abstract_weights, cache_bytes, cache_shards, step_seconds
from gptjax.planning.decode_search import DecodingLayout, decoding_layouts
from gptjax.planning.formula_plan import FILLED, FormulaPlan, formula_json, formula_table, training_layout
from gptjax.planning.topology import Topology, parse_topology, sketch
from gptjax.scaling.flops import forward_flops_per_token
from gptjax.scaling.parameters import expert_parameter_count, parameter_count

CONFIGS = Path(__file__).parents[2] / "configs"
FOUR = parse_topology("v5e:2x2")
MODEL = GPTConfig(
    vocab_size=512,
    context_length=64,
    num_layers=4,
    num_heads=4,
    embed_dim=64,
    num_kv_heads=2,
    head_width=32,
    attention_pattern=("banded", "dense"),
    band_width=16,
    num_experts=8,
    experts_per_token=2,
    ffw_dim=64,
)
CONFIG = Config(model=MODEL)


def gpt_oss(size: str) -> Config:
    return load_config(f"{CONFIGS / 'gpt_oss.py'}:size={size}")


def test_the_cache_has_the_key_value_heads_and_the_bands_of_the_models() -> None:
    assert cache_bytes(MODEL) == 2 * (2 * 64 + 2 * 16) * 2 * 32 * 2  # keys and values of 2 heads, in bfloat16
    model = GPT(MODEL)

    def prefill(params, tokens_BT):
        return decoding.prefill(model, decoding.unstack(MODEL, params), tokens_BT, jnp.array([64]), 64)[1]

    params = jax.eval_shape(partial(init_params, model), jax.random.key(0))
    params = jax.tree.map(lambda leaf: leaf.value, params, is_leaf=lambda leaf: hasattr(leaf, "names"))
    cache = jax.eval_shape(prefill, params, jax.ShapeDtypeStruct((1, 64), jnp.int32))
    assert cache_bytes(MODEL) == sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))
    published = gpt_oss("120b").model
    assert cache_bytes(published) == 2 * 18 * (131_072 + 128) * 8 * 64 * 2


def test_weights_that_cannot_be_converted_are_a_user_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(lowered: object) -> None:
        raise jax.errors.JaxRuntimeError("the total memory required (31.38G) exceeds available HBM (15.75G).")

    monkeypatch.setattr(jax.stages.Lowered, "compile", compile_)
    with pytest.raises(UserError, match=r"needs 31.38 GiB of a device's 15.75: set --config.model.param"):
        abstract_weights(MODEL, make_mesh(MeshConfig()), "bfloat16")


def test_key_value_heads_are_whole_where_tensor_does_not_divide_them() -> None:
    assert [cache_shards(MODEL, {"tensor": size}) for size in (1, 2, 4)] == [1, 2, 1]


def test_a_step_reads_the_experts_that_its_tokens_choose() -> None:
    """One token reads 2 of 8 experts, and many tokens all of them."""
    assert FOUR.peak is not None
    mesh = {"data": 4, "fsdp": 1, "tensor": 1, "context": 1, "expert": 1}
    weights = 2 * parameter_count(MODEL)
    read = weights - 2 * expert_parameter_count(MODEL) * 6 / 8
    assert step_seconds(MODEL, FOUR, mesh, weights, 1, 1000) == pytest.approx((read + 1000) / FOUR.peak.bandwidth)
    whole = step_seconds(MODEL, FOUR, mesh, weights, 100, 1000)
    assert whole == pytest.approx((weights + 1000) / FOUR.peak.bandwidth)
    compute = 10**6 * forward_flops_per_token(MODEL) / FOUR.peak.bfloat16
    assert step_seconds(MODEL, FOUR, mesh, weights, 10**6, 0) == pytest.approx(compute)


def test_decoding_layouts_fit_and_are_sorted_by_speed() -> None:
    capacity = 64 * 2**20
    found = decoding_layouts(CONFIG, FOUR, capacity, "bfloat16")
    sizes = {tuple(dataclasses.asdict(layout.config.mesh).values()) for layout in found}
    assert {(4, 1, 1, 1, 1), (1, 1, 4, 1, 1), (1, 1, 1, 1, 4), (1, 1, 2, 1, 2), (2, 1, 1, 1, 2)} <= sizes
    speeds = [layout.tokens_per_second for layout in found]
    assert speeds == sorted(speeds, reverse=True)
    for layout in found:
        assert layout.memory <= capacity
        check_model_fit(layout.config.model, sketch(layout.config.mesh, FOUR))
    assert decoding_layouts(CONFIG, FOUR, 1000, "bfloat16") == []


def test_int8_weights_leave_room_for_more_sequences() -> None:
    best = {weights: _with(decoding_layouts(CONFIG, FOUR, 2**22, weights), data=4) for weights in ("bfloat16", "int8")}
    assert best["int8"].weight_bytes == best["bfloat16"].weight_bytes // 2
    assert best["int8"].batch > best["bfloat16"].batch


def _with(layouts: list[DecodingLayout], **sizes: int) -> DecodingLayout:
    return next(one for one in layouts if all(getattr(one.config.mesh, axis) == n for axis, n in sizes.items()))


@pytest.mark.parametrize("name", ["v5e:16x16", "v5p:4x4x4", "v6e:16x16"])
def test_gpt_oss_120b_fits_each_chip(name: str) -> None:
    """Generation, at the full context, is faster with expert parallelism than with the best layout without."""
    topology, config = parse_topology(name), gpt_oss("120b")
    assert topology.chip is not None
    capacity = FILLED * topology.chip.program_memory
    layouts = decoding_layouts(config, topology, capacity, "bfloat16")
    assert layouts[0].config.mesh.expert > 1
    assert layouts[0].tokens_per_second > 1.2 * _with(layouts, expert=1).tokens_per_second
    training = training_layout(config, topology, capacity)
    assert training is not None
    assert training.memory <= capacity
    check_fit(training.config, sketch(training.config.mesh, topology))
    assert 0.1 < training.estimate.mfu(training.estimate.serial) < 1


def test_contexts_are_shortened_only_with_rotary_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    monkeypatch.setattr(
        formula_plan, "candidates", lambda config, *_, **__: tried.append(config.model.context_length) or []
    )
    learned = dataclasses.replace(CONFIG, model=dataclasses.replace(MODEL, context_length=4096))
    assert training_layout(learned, FOUR, 1) is None
    assert tried == [4096]
    rotary = dataclasses.replace(learned, model=dataclasses.replace(learned.model, positions="rotary"))
    assert training_layout(rotary, FOUR, 1) is None
    assert tried[1:] == [4096, 2048, 1024]


def test_the_table_has_a_line_and_flags_for_each_layout() -> None:
    layout = decoding_layouts(CONFIG, FOUR, 2**26, "bfloat16")[0]
    plans = [FormulaPlan(Topology(FOUR.chip, (1, 1)), None, None), FormulaPlan(FOUR, None, layout)]
    text = formula_table(CONFIG, plans)
    assert "generation at a context of 64" in text
    assert "training" not in text  # none was planned
    assert any(line.split() == ["v5e:1x1", "does", "not", "fit"] for line in text.splitlines())
    line = next(line for line in text.splitlines() if line.startswith("generation on v5e:2x2: "))
    assert f"--config.mesh.expert={layout.config.mesh.expert}" in line or layout.config.mesh.expert == 1
    tree = formula_json(CONFIG, plans)
    assert tree["v5e:1x1"] == {"training": None, "generation": None}
    assert tree["v5e:2x2"]["generation"]["batch"] == layout.batch


def test_a_listed_mesh_that_cannot_be_mapped_is_a_user_error() -> None:
    with pytest.raises(UserError, match="must multiply to 4"):
        sketch(dataclasses.replace(CONFIG.mesh, data=3), FOUR)
