"""Prefill and decoding give, position by position, the results of the whole forward pass."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig
from gptjax.models.decoding import decode, logits, prefill, unstack
from gptjax.models.gpt import GPT

BANDED = GPTConfig(
    vocab_size=61,
    context_length=24,
    num_layers=4,
    num_heads=2,
    embed_dim=16,
    attention_pattern=("dense", "banded"),
    band_width=5,
    kernel_init_std=0.3,  # so that attention is far from uniform
    dtype="float32",
)
MODELS = {
    "dense": dataclasses.replace(BANDED, num_layers=2, attention_pattern=("dense",)),
    "banded": BANDED,
    "post": dataclasses.replace(BANDED, num_layers=2, norm_position="post"),
    "gpt_neo": dataclasses.replace(BANDED, num_layers=2, scale_attention=False, qkv_bias=False, kernel_init_std=0.1),
}
LENGTHS = (1, 9, 4)  # of the prompts: shorter than the band, longer, in between


@partial(jax.jit, static_argnums=0)
def init(config: GPTConfig):
    return nn.unbox(GPT(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32)))["params"]


@pytest.mark.parametrize(("name", "padding"), [*((name, 7) for name in MODELS), ("banded", 0)])
def test_prefill_and_decode_are_the_whole_forward_pass_at_every_position(name, padding):
    config = MODELS[name]
    model, params, context = GPT(config), init(config), config.context_length
    tokens_BT = jax.random.randint(jax.random.key(1), (len(LENGTHS), context), 0, config.vocab_size)
    whole_BTV = np.asarray(jax.jit(lambda tokens_BT: model.apply({"params": params}, tokens_BT))(tokens_BT))

    layers, lengths_B = unstack(config, params), jnp.array(LENGTHS)
    prompt = max(LENGTHS) + padding
    x_BD, cache = jax.jit(partial(prefill, model, slots=context))(layers, tokens_BT[:, :prompt], lengths_B)
    step, head = jax.jit(partial(decode, model)), jax.jit(partial(logits, model))
    rows_B = np.arange(len(LENGTHS))
    for position_B in (lengths_B + i for i in range(context)):
        np.testing.assert_allclose(head(layers, x_BD), whole_BTV[rows_B, position_B - 1], atol=2e-5)
        if position_B.max() == context:  # the longest row is full
            break
        x_BD, cache = step(layers, cache, tokens_BT[rows_B, position_B], position_B)


def test_a_banded_layer_keeps_only_its_band():
    layers = unstack(BANDED, init(BANDED))
    _, cache = prefill(GPT(BANDED), layers, jnp.zeros((2, 8), jnp.int32), jnp.array([8, 3]), slots=20)
    assert [key_values.slots for key_values in cache] == [20, 5, 20, 5]
