"""Every attention backend equals the definition; the choice of a backend, and its user errors."""

import dataclasses
import re
from functools import partial
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig, UserError
from gptjax.models import attention_backends
from gptjax.models.attention_backends import (
    check_backend,
    choose_backend,
    compute_capability,
    cudnn_attention,
    splash_attention,
    splash_kernel,
)
from gptjax.models.dot_product import attention_mask, dot_product_attention
from gptjax.models.gpt import GPT

GPU, OLD_GPU = 9.0, 7.5  # compute capabilities: Hopper, Turing
CONFIG = GPTConfig(
    vocab_size=61,
    context_length=256,
    num_layers=2,
    num_heads=2,
    embed_dim=128,
    attention_pattern=("dense", "banded"),
    band_width=70,
)


def reference(q_BTHK, k_BTHK, v_BTHK, segments_BT, band_width, scale):
    kind = "dense" if band_width is None else "banded"
    mask_BHTS = attention_mask(kind, band_width or 0, q_BTHK.shape[1], segments_BT)
    return dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask_BHTS, precision="highest", scale=scale)


def value_and_gradients(function, *arrays):
    """The output, and the gradients of a sum that weighs each of its numbers differently."""
    out, pull_back = jax.vjp(jax.jit(function), *arrays)
    return out, *pull_back(jax.random.normal(jax.random.key(9), out.shape, out.dtype))


def check_close(actual, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


def random_heads(head_dim, rows=2, length=256, heads=2):
    return [jax.random.normal(jax.random.key(i), (rows, length, heads, head_dim)) for i in range(3)]


SEGMENTS_BT = np.stack([np.arange(256) // 50, np.arange(256) // 77])


@pytest.mark.parametrize(
    ("head_dim", "band_width", "segments_BT"),
    [(64, None, None), (80, 70, None), (80, None, SEGMENTS_BT), (64, 200, SEGMENTS_BT)],
    ids=["dense", "banded", "dense, packed", "banded, packed"],
)
def test_splash_is_the_definition_in_values_and_gradients(head_dim, band_width, segments_BT):
    rest = (None if segments_BT is None else jnp.array(segments_BT), band_width, 0.3)
    splash, definition = (lambda *qkv: splash_attention(*qkv, *rest)), (lambda *qkv: reference(*qkv, *rest))
    qkv = random_heads(head_dim)
    check_close(value_and_gradients(splash, *qkv), value_and_gradients(definition, *qkv))


@pytest.mark.parametrize("band_width", [None, 70])
def test_what_cudnn_is_told_is_the_definition_in_values_and_gradients(band_width, monkeypatch):
    """JAX has the same function in array code, so that the arguments can be tried without a GPU."""
    in_array_code = partial(jax.nn.dot_product_attention, implementation="xla")
    monkeypatch.setattr(jax.nn, "dot_product_attention", lambda *qkv, implementation, **kw: in_array_code(*qkv, **kw))
    qkv = random_heads(64)
    actual = value_and_gradients(lambda *qkv: cudnn_attention(*qkv, band_width, 0.3), *qkv)
    check_close(actual, value_and_gradients(lambda *qkv: reference(*qkv, None, band_width, 0.3), *qkv))


@pytest.mark.parametrize(("band_width", "window"), [(None, "0"), (70, "70")])
def test_cudnn_gets_its_forward_and_its_backward_pass(band_width, window, monkeypatch):
    # Lowering queries the installed version of cuDNN, which a CPU does not have.
    monkeypatch.setattr("jax._src.cudnn.fused_attention_stablehlo.check_cudnn_version", lambda: 91000)
    x_BTHK = jax.ShapeDtypeStruct((2, 256, 2, 64), jnp.bfloat16)

    def loss(*qkv):
        return jnp.sum(cudnn_attention(*qkv, band_width, 0.3))

    traced = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).trace(x_BTHK, x_BTHK, x_BTHK)
    program = traced.lower(lowering_platforms=("cuda",)).as_text().replace(r"\22", '"')
    assert re.findall(r"__cudnn\$\w+", program) == ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]
    settings = {name: re.findall(rf"{name}\W+(\w+)", program) for name in ("mask_type", "sliding_window_length")}
    assert settings == {"mask_type": ["CAUSAL"] * 2, "sliding_window_length": [window] * 2}


@pytest.mark.slow
def test_a_gpt_on_splash_is_the_gpt_on_xla(monkeypatch):
    config = dataclasses.replace(CONFIG, dtype="float32", remat="attention")
    tokens_BT = jax.random.randint(jax.random.key(1), (2, 256), 0, 61)
    segments_BT = jnp.array(SEGMENTS_BT)
    params = nn.unbox(GPT(config).init(jax.random.key(0), tokens_BT[:, :1]))["params"]

    def loss_and_gradients(backend):
        def loss(params):
            return jnp.mean(GPT(config).apply({"params": params}, tokens_BT, segments_BT) ** 2)

        monkeypatch.setattr(attention_backends, "choose_backend", lambda *args: backend)
        assert ("pallas_call" in str(jax.make_jaxpr(loss)(params))) == (backend == "splash")
        return jax.jit(jax.value_and_grad(loss))(params)

    check_close(loss_and_gradients("splash"), loss_and_gradients("xla"), tolerance=3e-5)


def test_splash_visits_only_the_blocks_that_are_seen():
    def visited(length, band_width):
        """Blocks of 512 x 512 or less that the forward pass computes, and the steps it takes, for one head."""
        blocks = np.asarray(splash_kernel(length, 2, band_width, interpret=True).fwd_mask_info.block_mask)
        return int(np.sum(blocks > 0)), blocks.size

    assert visited(4096, None) == (8 * 9 // 2, 64)
    assert visited(4096, 256) == (1 + 7 * 2, 16)  # each block of queries sees its own block and the one before
    assert visited(4096, 1024) == (1 + 2 + 6 * 3, 24)
    assert visited(384, 64) == (1 + 2 * 2, 6)  # blocks of 128


# --- the choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("platform", "changes", "expected"),
    [
        ("cpu", {}, "xla"),
        ("tpu", {}, "splash"),
        ("tpu", {"has_segments": True}, "splash"),
        ("tpu", {"dtype": "float32"}, "xla"),
        ("tpu", {"has_dropout": True}, "xla"),
        ("tpu", {"length": 192}, "xla"),
        ("tpu", {"embed_dim": 160}, "splash"),
        ("tpu", {"embed_dim": 2 * 12}, "splash"),
        ("tpu", {"attention_backend": "xla"}, "xla"),
        ("tpu", {"attention_backend": "splash"}, "splash"),
        ("tpu", {"attention_backend": "splash", "length": 1}, "xla"),
        ("cpu", {"attention_backend": "splash", "length": 16}, "xla"),
        ("gpu", {}, "cudnn"),
        ("gpu", {"capability": OLD_GPU}, "xla"),
        ("gpu", {"capability": 0.0}, "xla"),
        ("gpu", {"has_segments": True}, "xla"),
        ("gpu", {"dtype": "float32"}, "xla"),
        ("gpu", {"has_dropout": True}, "xla"),
        ("gpu", {"length": 32}, "xla"),
        ("gpu", {"embed_dim": 160}, "cudnn"),
        ("gpu", {"embed_dim": 2 * 12}, "xla"),
        ("gpu", {"embed_dim": 2 * 256}, "cudnn"),
        ("gpu", {"embed_dim": 2 * 256, "capability": 8.0}, "xla"),
        ("gpu", {"embed_dim": 2 * 264}, "xla"),
        ("gpu", {"attention_backend": "xla"}, "xla"),
        ("gpu", {"attention_backend": "cudnn"}, "cudnn"),
        ("gpu", {"attention_backend": "cudnn", "length": 16}, "xla"),
    ],
)
def test_the_choice_of_a_backend(platform, changes, expected):
    assert choose(platform, **changes) == expected


def choose(platform, length=256, has_segments=False, has_dropout=False, capability=GPU, **fields):
    config = dataclasses.replace(CONFIG, **fields)
    return choose_backend(config, platform, length, has_segments, has_dropout, capability)


@pytest.mark.parametrize(
    ("backend", "platform", "changes", "culprit", "mend"),
    [
        ("splash", "cpu", {}, "this is a cpu", "leave it at auto"),
        ("splash", "gpu", {}, "needs a TPU", "leave it at auto"),
        ("splash", "tpu", {"dtype": "float32"}, "computes in bfloat16", "model.dtype=bfloat16"),
        ("splash", "tpu", {"has_dropout": True}, "model.attention_dropout", "to 0"),
        ("cudnn", "tpu", {}, "needs an NVIDIA GPU", "leave it at auto"),
        ("cudnn", "gpu", {"capability": OLD_GPU}, "compute capability 8.0", "leave it at auto"),
        ("cudnn", "gpu", {"dtype": "float32"}, "computes in bfloat16", "model.dtype=bfloat16"),
        ("cudnn", "gpu", {"has_dropout": True}, "model.attention_dropout", "to 0"),
        ("cudnn", "gpu", {"has_segments": True}, "data.packing=segment", "data.packing=concatenate"),
        ("cudnn", "gpu", {"embed_dim": 2 * 12}, "not 12", "leave it at auto"),
    ],
)
def test_a_backend_that_was_named_and_cannot_is_an_error(backend, platform, changes, culprit, mend):
    with pytest.raises(UserError, match=f"model.attention_backend={backend} .*{culprit}.*{mend}"):
        choose(platform, attention_backend=backend, **changes)


def test_a_named_backend_is_checked_before_training():
    def check(platform, has_segments=False, **fields):
        check_backend(dataclasses.replace(CONFIG, **fields), platform, has_segments)

    check("cpu")
    check("tpu", attention_backend="splash", has_segments=True)
    check("tpu", attention_dropout=0.1, context_length=100)
    with pytest.raises(UserError, match="needs a TPU"):
        check("cpu", attention_backend="splash", context_length=100)
    with pytest.raises(UserError, match=r"model\.attention_dropout=0\.1 to 0"):
        check("tpu", attention_backend="splash", attention_dropout=0.1)
    with pytest.raises(UserError, match=r"model\.context_length=200 to 256"):
        check("tpu", attention_backend="splash", context_length=200)


def test_a_backend_that_cannot_here_still_initialises_and_reads_short_prompts():
    config = dataclasses.replace(CONFIG, attention_backend="splash")
    params = nn.unbox(GPT(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))
    GPT(config).apply(params, jnp.zeros((1, 16), jnp.int32))
    with pytest.raises(UserError, match=r"model\.attention_backend=splash needs a TPU"):
        GPT(config).apply(params, jnp.zeros((1, 128), jnp.int32))


@pytest.mark.parametrize(("reported", "expected"), [("8.0", 8.0), ("12.1", 12.1), ("gfx942", 0.0)])
def test_only_nvidias_gpus_have_a_compute_capability(reported, expected, monkeypatch):
    assert compute_capability() == 0.0  # of a CPU
    monkeypatch.setattr(jax, "local_devices", lambda: [SimpleNamespace(compute_capability=reported)])
    assert compute_capability() == expected
