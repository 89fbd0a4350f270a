"""Invariants of the model: causality, and results that loops, rematerialisation and packing do not change."""

import dataclasses
import importlib.util
from functools import cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig, resolve
from gptjax.config.model import Attention, Experts, FeedForward, Normalisation, Output, Parametrization, Positions
from gptjax.models import gpt
from gptjax.models.dot_product import attention_mask, dot_product_attention
from gptjax.models.gpt import GPT, head_embedding, hidden_states, unembed
from gptjax.parallel.platforms import override_defaults
from gptjax.scaling.parameters import parameter_count

TINY = GPTConfig(
    vocab_size=61,
    context_length=16,
    num_layers=4,
    num_heads=2,
    embed_dim=16,
    attention_pattern=("dense", "banded"),
    band_width=4,
    dtype="float32",
)
CONFIGS = Path(__file__).parents[2] / "configs"


@partial(jax.jit, static_argnums=0)  # compiled whole: op by op, a tiny model takes longer
def init(config: GPTConfig):
    return nn.unbox(GPT(config).init(jax.random.key(0), jnp.zeros((1, config.context_length), jnp.int32)))["params"]


@partial(jax.jit, static_argnums=0, static_argnames="deterministic")
def logits(config: GPTConfig, params, tokens_BT, *args, **kwargs):
    return GPT(config).apply({"params": params}, tokens_BT, *args, **kwargs)


def tokens(shape, seed: int = 1):
    return jax.random.randint(jax.random.key(seed), shape, 0, TINY.vocab_size)


def close(actual, expected, tolerance=2e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


def sensitivity(config: GPTConfig, **inputs):
    """(T, S): how much the output at t depends on the embedding at s, by gradients through one row."""
    params, length = init(config), config.context_length
    tokens_1T = tokens((1, length))

    def output(offset_SD):
        embedding_VD = head_embedding(params)
        # Each position gets a vocabulary row of its own, so that its embedding can be moved alone.
        rows_SD = embedding_VD[tokens_1T[0]] + offset_SD
        own = {**params, "token_embedding": {"embedding": rows_SD}}
        own_config = dataclasses.replace(config, vocab_size=length)
        return hidden_states(GPT(own_config), own, jnp.arange(length)[None], **inputs)[0]

    jacobian_TDSD = jax.jit(jax.jacobian(output))(jnp.zeros((length, config.embed_dim)))
    return np.abs(jacobian_TDSD).sum(axis=(1, 3))


@pytest.mark.parametrize("norm_position", ["pre", "post"])
def test_no_position_sees_a_later_one(norm_position):
    config = dataclasses.replace(TINY, norm_position=norm_position, context_length=8)
    depends_TS = sensitivity(config)
    assert np.all(depends_TS[np.triu_indices(8, 1)] == 0)
    assert np.all(depends_TS[np.tril_indices(8)] > 0)


def test_a_banded_layer_sees_its_band_and_no_further():
    config = dataclasses.replace(TINY, num_layers=1, attention_pattern=("banded",), band_width=3, context_length=8)
    t, s = np.indices((8, 8))
    np.testing.assert_array_equal(sensitivity(config) > 0, (s <= t) & (s > t - 3))


def test_attention_stays_within_a_segment():
    config = dataclasses.replace(TINY, context_length=8, attention_pattern=("dense",))
    segments = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    t, s = np.indices((8, 8))
    expected = (s <= t) & (segments[t] == segments[s])
    np.testing.assert_array_equal(sensitivity(config, segments_BT=jnp.array(segments)[None]) > 0, expected)


def test_packed_documents_give_the_logits_they_give_alone():
    params, lengths = init(TINY), (5, 4, 7)
    documents = [tokens((1, length), seed) for seed, length in enumerate(lengths)]
    segments = np.repeat(np.arange(3), lengths)[None]
    positions = np.concatenate([np.arange(length) for length in lengths])[None]
    packed = logits(TINY, params, jnp.concatenate(documents, axis=1), jnp.array(segments), jnp.array(positions))
    alone = jnp.concatenate([logits(TINY, params, document) for document in documents], axis=1)
    close(packed, alone)


@cache
def loss_and_gradients(config: GPTConfig):
    def loss(params):
        rngs = {"dropout": jax.random.key(5)}
        return jnp.mean(logits(config, params, tokens((2, 16)), deterministic=False, rngs=rngs) ** 2)

    return jax.jit(jax.value_and_grad(loss))(init(config))


@pytest.mark.parametrize(
    "change",
    [{"layer_loop": "unroll"}, {"remat": "cheap"}, {"remat": "dots"}, {"remat": "full", "layer_loop": "unroll"}],
)
def test_loops_and_recomputation_change_no_number(change):
    config = dataclasses.replace(TINY, residual_dropout=0.2, attention_dropout=0.2)
    changed = dataclasses.replace(config, **change)
    close(init(changed), init(config), tolerance=0)
    close(loss_and_gradients(changed), loss_and_gradients(config))


def test_recomputation_saves_memory():
    """The comparison above would hold for a `remat` that does nothing."""

    def temporaries(remat: str) -> int:
        config = dataclasses.replace(TINY, remat=remat, num_layers=8, context_length=128, embed_dim=32)
        shapes = jax.eval_shape(lambda: init(config))

        def loss(params):
            return jnp.mean(hidden_states(GPT(config), params, jnp.zeros((4, 128), jnp.int32)) ** 2)

        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    none, dots, full = (temporaries(remat) for remat in ("none", "dots", "full"))
    assert full < 0.8 * dots < 0.8 * none


@pytest.mark.slow
def test_recomputing_activations_changes_no_number_and_saves_memory():
    """Softmax and activation, with dropout."""
    config = dataclasses.replace(TINY, residual_dropout=0.2, attention_dropout=0.2)

    def temporaries() -> int:
        large = dataclasses.replace(config, num_layers=8, context_length=128, embed_dim=32)
        shapes, rngs = jax.eval_shape(lambda: init(large)), {"dropout": jax.random.key(0)}

        def loss(params):
            tokens_BT = jnp.zeros((4, 128), jnp.int32)
            return jnp.mean(hidden_states(GPT(large), params, tokens_BT, deterministic=False, rngs=rngs) ** 2)

        return jax.jit(jax.grad(loss)).lower(shapes).compile().memory_analysis().temp_size_in_bytes

    def with_recomputation(chosen: bool) -> tuple[Any, int]:
        loss_and_gradients.cache_clear()
        jax.clear_caches()
        with override_defaults("cpu", recompute_activations=chosen):
            return loss_and_gradients(config), temporaries()

    (kept, kept_bytes), (again, again_bytes) = with_recomputation(False), with_recomputation(True)
    close(again, kept)
    assert again_bytes < 0.8 * kept_bytes


def test_scanned_programs_do_not_grow_with_depth():
    def size(layer_loop: str, num_layers: int) -> int:
        config = dataclasses.replace(TINY, num_layers=num_layers, layer_loop=layer_loop)
        shapes = jax.eval_shape(lambda: init(config))
        return len(jax.jit(jax.grad(lambda p: logits(config, p, tokens((1, 16))).sum())).lower(shapes).as_text())

    assert size("scan", 48) < 1.05 * size("scan", 12)
    assert size("unroll", 48) > 2 * size("unroll", 12)


def test_layers_unroll_where_the_device_gains_by_it():
    """And only in programs that train, up to a depth."""
    assert not gpt.is_unrolled(TINY, deterministic=False)
    before = loss_and_gradients(TINY)
    loss_and_gradients.cache_clear()
    jax.clear_caches()
    with override_defaults("cpu", max_unrolled_layers=TINY.num_layers):
        assert gpt.is_unrolled(TINY, deterministic=False)
        assert not gpt.is_unrolled(TINY, deterministic=True)
        assert not gpt.is_unrolled(dataclasses.replace(TINY, layer_loop="scan"), deterministic=False)
        assert not gpt.is_unrolled(dataclasses.replace(TINY, num_layers=2 * TINY.num_layers), deterministic=False)
        close(loss_and_gradients(TINY), before)


CHANGES = {
    "num_layers": 2,
    "num_heads": 4,
    "ffw_dim": 48,
    "norm_position": "post",
    "norm_eps": 0.1,
    "activation": "gelu_exact",
    "scale_attention": False,
    "attention_pattern": ("dense",),
    "band_width": 2,
    "embedding_dropout": 0.5,
    "attention_dropout": 0.5,
    "residual_dropout": 0.5,
    "token_init_std": 0.2,
    "position_init_std": 0.2,
    "kernel_init_std": 0.2,
    "scale_residual_init": False,
    "adapter_dim": 4,
    "zero_residual_init": True,
    "dtype": "bfloat16",
    "param_dtype": "bfloat16",
}
# These change shapes of parameters or of inputs, or only how the same numbers are computed (tested above), or need
# another field and are tested in test_modern_blocks.py, test_experts.py, test_cross_entropy.py, test_vision.py and
# test_parametrization.py.
OTHER_FIELDS = {"vocab_size", "context_length", "embed_dim", "qkv_bias", "layer_loop", "remat", "attention_backend"}
OTHER_FIELDS |= {"logits_dtype", "matmul_dtype", "expert_backend", "head_init_std", "z_loss", "balance_bias_rate"}
OTHER_FIELDS |= {"router_balance_loss", "router_z_loss", "rope_theta", "vision"}
OTHER_FIELDS |= {
    field.name
    for group in (Positions, Normalisation, Attention, FeedForward, Experts, Output, Parametrization)
    for field in dataclasses.fields(group)
    if field.name not in CHANGES
}


def test_every_field_is_tested():
    assert CHANGES.keys() | OTHER_FIELDS == {field.name for field in dataclasses.fields(GPTConfig)}


@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_output(field):
    def output(config):
        rngs = {"dropout": jax.random.key(3)}
        return np.asarray(logits(config, init(config), tokens((1, 16)), deterministic=False, rngs=rngs))

    assert np.abs(output(TINY) - output(dataclasses.replace(TINY, **{field: CHANGES[field]}))).max() > 1e-7


def test_initialisation_follows_the_papers():
    config = dataclasses.replace(TINY, vocab_size=2000, embed_dim=128, context_length=500)
    params = init(config)
    block = params["layers"]["block_0"]
    expected = {
        "token": (params["token_embedding"]["embedding"], 0.02),
        "position": (params["position_embedding"]["embedding"], 0.01),
        "qkv": (block["attention"]["qkv"]["kernel"], 0.02),
        "out": (block["attention"]["out"]["kernel"], 0.02 / np.sqrt(8)),
        "up": (block["mlp"]["up"]["kernel"], 0.02),
        "down": (block["mlp"]["down"]["kernel"], 0.02 / np.sqrt(8)),
    }
    for name, (array, std) in expected.items():
        assert np.std(array) == pytest.approx(std, rel=0.03), name
    assert not np.array_equal(block["mlp"]["up"]["kernel"][0], block["mlp"]["up"]["kernel"][1])  # layers differ


def test_bfloat16_keeps_float32_logits_parameters_and_softmax():
    config = dataclasses.replace(TINY, dtype="bfloat16")
    params = init(config)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(params))
    assert logits(config, params, tokens((1, 16))).dtype == jnp.float32
    close(logits(config, params, tokens((1, 16))), logits(TINY, params, tokens((1, 16))), tolerance=0.02)
    # 512 equal scores: a softmax summed in bfloat16 would stop adding at 256.
    q_BTHK = jnp.zeros((1, 512, 1, 4), jnp.bfloat16)
    v_BTHK = jnp.ones((1, 512, 1, 4), jnp.bfloat16)
    out = dot_product_attention(q_BTHK, q_BTHK, v_BTHK, attention_mask("dense", 0, 512, None))
    np.testing.assert_allclose(np.asarray(out, np.float32), 1.0, atol=0.01)


def test_the_head_is_tied():
    params = init(TINY)
    x_BTD = hidden_states(GPT(TINY), params, tokens((2, 16)))
    expected = np.asarray(x_BTD) @ np.asarray(params["token_embedding"]["embedding"]).T
    np.testing.assert_allclose(unembed(x_BTD, head_embedding(params)), expected, atol=1e-5)
    np.testing.assert_allclose(logits(TINY, params, tokens((2, 16))), expected, atol=1e-5)


PUBLISHED = {
    "gpt1": [""],
    "gpt2": ["124m", "355m", "774m", "1558m"],
    "gpt3": ["small", "medium", "large", "xl", "2.7b", "6.7b", "13b", "175b"],
}


@pytest.mark.parametrize(("name", "size"), [(name, size) for name, sizes in PUBLISHED.items() for size in sizes])
def test_the_formula_counts_the_parameters_of_every_published_size(name, size):
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = resolve(module.get_config(f"size={size}" if size else None)).model
    config = dataclasses.replace(config, vocab_size=40478 if name == "gpt1" else 50257)
    shapes = jax.eval_shape(lambda: init(config))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameter_count(config)
