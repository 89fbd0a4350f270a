"""Every ingredient since GPT-2 computes what its paper says, alone and together, in training and in decoding."""

import dataclasses
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import Config, GPTConfig, UserError, check, replace
from gptjax.models import decoding
from gptjax.models.attention_backends import splash_attention
from gptjax.models.dot_product import attention_mask, dot_product_attention
from gptjax.models.elementwise import Norm, activation
from gptjax.models.feed_forward import activate
from gptjax.models.gpt import GPT, init_params, unembed
from gptjax.models.positions import attention_factor, frequencies, rotate, rotation

PLAIN = GPTConfig(
    vocab_size=61, context_length=24, num_layers=2, num_heads=4, embed_dim=24, ffw_dim=32, dtype="float32"
)
INGREDIENTS = {
    "rotary": {"positions": "rotary"},
    "yarn": {"positions": "rotary", "yarn_factor": 4.0, "yarn_original_context": 8},
    "rms": {"norm": "rms"},
    "no_gain": {"norm": "rms", "norm_gain": False},
    "norm_embedding": {"norm_embedding": True},
    "qk_norm": {"qk_norm": True, "qk_norm_scale": 1.2},
    "grouped": {"num_kv_heads": 2},
    "head_width": {"head_width": 10, "num_kv_heads": 1},
    "sinks": {"attention_sinks": True},
    "no_biases": {"qkv_bias": False, "attention_out_bias": False, "ffw_bias": False},
    "swiglu": {"gated": True, "activation": "silu", "swish_beta": 1.7, "gate_limit": 0.3, "up_offset": 1.0},
    "relu_squared": {"activation": "relu_squared"},
    "untied": {"tied_head": False},
    "soft_cap": {"logit_soft_cap": 2.0},
    "value_embeddings": {"value_embeddings": "all"},
    "residual_scalars": {"residual_scalars": True},
    "experts": {"num_experts": 4, "router_bias": True, "balance_bias": True},
}
TOGETHER = {
    **{
        key: value
        for name in ("yarn", "rms", "qk_norm", "grouped", "sinks")
        for key, value in INGREDIENTS[name].items()
    },
    **{
        key: value
        for name in ("swiglu", "untied", "residual_scalars", "experts")
        for key, value in INGREDIENTS[name].items()
    },
    "attention_pattern": ("banded", "dense"),
    "band_width": 5,
    "value_embeddings": "alternate",
    "head_width": 10,
}


def with_noise(shapes):
    """Random parameters, of which none is neutral."""
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    return jax.tree.unflatten(tree, [0.3 * rng.standard_normal(x.shape, np.float32) for x in leaves])


def shapes_of(model):
    return jax.eval_shape(lambda: nn.unbox(init_params(model, jax.random.key(0))))


def model_of(changes):
    model = GPT(dataclasses.replace(PLAIN, **changes))
    return model, with_noise(shapes_of(model))


TOKENS_BT = np.random.default_rng(0).integers(0, 61, (2, 20))
ONE_LAYER = GPT(dataclasses.replace(PLAIN, num_layers=1))
plain_logits = jax.jit(ONE_LAYER.apply)


@pytest.mark.parametrize(
    "changes", [*({"num_layers": 1} | changes for changes in INGREDIENTS.values()), TOGETHER], ids=[*INGREDIENTS, "all"]
)
def test_each_ingredient_changes_the_logits_and_decodes_as_it_trains(changes):
    model, params = model_of(changes)
    lengths_B = np.array([3, 7])  # rows of different lengths: each token has a position of its own

    @jax.jit
    def logits_and_decoded(params):
        whole_BTV, layers = model.apply({"params": params}, TOKENS_BT), decoding.unstack(model.config, params)
        x_BD, cache = decoding.prefill(model, layers, TOKENS_BT[:, :7], lengths_B, 20)

        def step(carry, i):
            x_BD, cache = carry
            token_B = jnp.take_along_axis(jnp.asarray(TOKENS_BT), (lengths_B + i)[:, None], axis=1)[:, 0]
            x_BD, cache = decoding.decode(model, layers, cache, token_B, lengths_B + i)
            return (x_BD, cache), decoding.logits(model, layers, x_BD)

        first_BV = decoding.logits(model, layers, x_BD)
        return whole_BTV, first_BV, jax.lax.scan(step, (x_BD, cache), jnp.arange(12))[1]

    whole_BTV, first_BV, rest_NBV = logits_and_decoded(params)
    assert np.isfinite(whole_BTV).all()
    if shapes_of(ONE_LAYER) == shapes_of(model):
        assert np.abs(whole_BTV - plain_logits({"params": params}, TOKENS_BT)).max() > 1e-3
    for row, length in enumerate(lengths_B):
        np.testing.assert_allclose(first_BV[row], whole_BTV[row, length - 1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(rest_NBV[:, row], whole_BTV[row, length : length + 12], rtol=1e-4, atol=1e-4)


def test_scanned_unrolled_and_rematerialised_layers_agree():
    model, params = model_of(TOGETHER)

    def loss_and_gradient(**changes):
        other = GPT(dataclasses.replace(model.config, **changes))
        run = jax.jit(jax.value_and_grad(lambda p: jnp.sum(jnp.sin(other.apply({"params": p}, TOKENS_BT)))))
        return run(params)

    expected = loss_and_gradient(layer_loop="scan")
    for changes in ({"layer_loop": "unroll"}, {"layer_loop": "scan", "remat": "full"}):
        found = loss_and_gradient(**changes)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-3, atol=2e-3), found, expected)


def test_packed_documents_do_not_see_each_other():
    model, params = model_of(TOGETHER)
    segments_BT, positions_BT = np.repeat([[1, 2]], 10, axis=1), np.tile(np.arange(10), 2)[None]
    apply = jax.jit(model.apply)
    packed_BTV = apply({"params": params}, TOKENS_BT[:1], segments_BT, positions_BT)
    alone_BTV = apply({"params": params}, TOKENS_BT[:1, 10:])
    np.testing.assert_allclose(packed_BTV[:, 10:], alone_BTV, rtol=1e-4, atol=1e-4)


# --- positions --------------------------------------------------------------------------------------------------------


def test_rotated_products_depend_on_distances_only():
    config = dataclasses.replace(PLAIN, positions="rotary", head_width=8)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def product(query_position, key_position):
        turned = [rotate(x, rotation(config, np.array([[p]]))) for x, p in ((q, query_position), (k, key_position))]
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(9, 4) == pytest.approx(product(15, 10), abs=1e-5)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)
    assert product(7, 7) == pytest.approx(float(jnp.sum(q * k)), abs=1e-5)


def test_yarn_has_the_limits_and_the_factor_of_gpt_oss():
    gpt_oss = dataclasses.replace(
        *(PLAIN,),
        positions="rotary",
        head_width=64,
        rope_theta=150_000.0,
        yarn_factor=32.0,
        yarn_truncate=False,
    )
    assert attention_factor(gpt_oss) == pytest.approx(1.346574, abs=1e-6)
    plain = 150_000.0 ** -(np.arange(32) / 32)
    share = (plain - frequencies(gpt_oss)) / (
        plain - plain / 32
    )  # that is interpolated: 0 below 8.0928, 1 above 17.3980
    np.testing.assert_allclose(share, np.clip((np.arange(32) - 8.0928) / (17.3980 - 8.0928), 0, 1), atol=1e-4)
    rounded = frequencies(dataclasses.replace(gpt_oss, yarn_truncate=True))
    share = (plain - rounded) / (plain - plain / 32)
    np.testing.assert_allclose(share, np.clip((np.arange(32) - 8) / (18 - 8), 0, 1), atol=1e-4)


def test_llama3_has_the_ramp_of_its_definition():
    config = dataclasses.replace(PLAIN, positions="rotary", head_width=64, rope_theta=500_000.0, llama3_factor=8.0)
    plain = 500_000.0 ** -(np.arange(32) / 32)
    rotations = 8192 * plain / (2 * np.pi)
    share = np.clip((rotations - 1) / (4 - 1), 0, 1)  # that is kept
    assert 0 < np.sum((share > 0) & (share < 1)) < np.sum(share == 1) < 32
    np.testing.assert_allclose(frequencies(config), plain * (share + (1 - share) / 8), rtol=1e-5)
    assert attention_factor(config) == 1


# --- attention --------------------------------------------------------------------------------------------------------


def heads(count, length=128, width=16):
    return jax.random.normal(jax.random.key(count), (2, length, count, width))


def test_sinks_and_shared_heads_follow_the_definition():
    """p_j = exp(z_j) / (exp(s) + sum_k exp(z_k)); query heads 0 and 1 read key-value head 0, the others head 1."""
    q, k, v, sinks_H = heads(4, 9), heads(2, 9), heads(2, 9), jnp.array([0.5, -1.0, 2.0, 0.0])
    mask = attention_mask("dense", 0, 9, None)
    found = dot_product_attention(q, k, v, mask, scale=0.25, sinks_H=sinks_H)
    for head in range(4):
        scores = 0.25 * np.einsum("btk,bsk->bts", q[:, :, head], k[:, :, head // 2])
        powers = np.exp(scores) * np.tril(np.ones((9, 9)))
        probs = powers / (powers.sum(-1, keepdims=True) + math.exp(sinks_H[head]))
        expected = np.einsum("bts,bsk->btk", probs, v[:, :, head // 2])
        np.testing.assert_allclose(found[:, :, head], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("band_width", [None, 40])
def test_splash_has_sinks_and_shared_heads(band_width):
    q, k, v, sinks_H = heads(4), heads(2), heads(2), jnp.array([0.5, -1.0, 2.0, 0.0])
    mask = attention_mask("dense" if band_width is None else "banded", band_width or 0, 128, None)

    def gradients(function):
        return jax.jit(jax.grad(lambda *a: jnp.sum(jnp.sin(function(*a))), (0, 1, 2, 3)))(q, k, v, sinks_H)

    kernel = gradients(lambda q, k, v, s: splash_attention(q, k, v, None, band_width, 0.25, s))
    plain = gradients(lambda q, k, v, s: dot_product_attention(q, k, v, mask, scale=0.25, sinks_H=s))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), kernel, plain)


# --- norms, feed-forward layers, the head -----------------------------------------------------------------------------


def test_rms_norm_and_its_gradient_follow_the_definition():
    config = dataclasses.replace(PLAIN, norm="rms", norm_eps=0.1)
    x, scale = jax.random.normal(jax.random.key(1), (3, 7)), jnp.arange(1.0, 8.0)

    def plain(x, scale):
        return jnp.sum(jnp.sin(x / jnp.sqrt(jnp.mean(x**2, -1, keepdims=True) + 0.1) * scale[None]))

    def ours(x, scale):
        return jnp.sum(jnp.sin(Norm(config).apply({"params": {"scale": scale}}, x)))

    found, expected = (jax.value_and_grad(f, (0, 1))(x, scale) for f in (ours, plain))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, expected)


def test_a_clamped_gate_is_that_of_gpt_oss():
    config = dataclasses.replace(PLAIN, gated=True, activation="silu", swish_beta=1.702, gate_limit=7.0, up_offset=1.0)
    gate, up = jnp.array([-9.0, 0.5, 9.0, 3.0]), jnp.array([9.0, -9.0, 2.0, -2.0])
    clamped, clipped = np.array([-9.0, 0.5, 7.0, 3.0]), np.array([7.0, -7.0, 2.0, -2.0])
    expected = clamped / (1 + np.exp(-1.702 * clamped)) * (clipped + 1)
    np.testing.assert_allclose(activate(config, up, gate), expected, rtol=1e-6)
    relu_squared = activation(dataclasses.replace(PLAIN, activation="relu_squared"))
    np.testing.assert_allclose(relu_squared(jnp.array([-2.0, 3.0])), [0, 9])


def test_soft_cap_limits_logits():
    x_BTD, head_VD = 100 * jax.random.normal(jax.random.key(0), (1, 2, 4)), jax.random.normal(jax.random.key(1), (5, 4))
    raw, capped = unembed(x_BTD, head_VD), unembed(x_BTD, head_VD, soft_cap=15.0)
    np.testing.assert_allclose(capped, 15 * np.tanh(np.asarray(raw) / 15), rtol=1e-5)
    assert np.abs(raw).max() > 15


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"yarn_factor": 4.0}, "model.positions=rotary"),
        ({"llama3_factor": 4.0}, "model.positions=rotary"),
        ({"positions": "rotary", "llama3_factor": 4.0, "yarn_factor": 4.0}, "unset one of them"),
        ({"positions": "rotary", "head_width": 5}, "model.positions=rotary"),
        ({"num_kv_heads": 3}, "model.num_kv_heads=3"),
        ({"gate_limit": 7.0}, "model.gated=true"),
        ({"swish_beta": 1.7}, "model.swish_beta=1.7"),
        ({"qk_norm_scale": 1.2}, "model.qk_norm=true"),
        ({"value_embeddings": "alternate"}, "model.attention_pattern"),
        ({"router_bias": True}, "model.num_experts"),
        ({"num_experts": 2, "experts_per_token": 3}, "model.experts_per_token=3"),
        ({"num_experts": 2, "matmul_dtype": "int8"}, "model.matmul_dtype=int8"),
    ],
)
def test_fields_without_effect_and_impossible_values_are_named(changes, named):
    with pytest.raises(UserError, match=named.replace(".", r"\.")):
        check(replace(Config(model=PLAIN), {"model": changes, "batch": {"epochs": 1.0, "tokens_per_batch": 24}}))
