"""Invariants of images as input: what attends to an image, and that nothing else of a row changes what it sees."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig, UserError, VisionConfig
from gptjax.config.vision_checks import check_vision
from gptjax.models import decoding
from gptjax.models.gpt import GPT, hidden_states, init_params
from gptjax.scaling.flops import image_flops, image_step_flops
from gptjax.scaling.parameters import parameter_count

IMAGE = 60
VISION = VisionConfig(
    encoder="vit", image_size=6, patch_size=3, num_layers=2, num_heads=2, embed_dim=8, read_layer=-1, image_token=IMAGE
)
TINY = GPTConfig(
    vocab_size=61, context_length=16, num_layers=2, num_heads=2, embed_dim=16, dtype="float32", vision=VISION
)
PATCHES = dataclasses.replace(TINY, vision=dataclasses.replace(VISION, encoder="patches"))
P = VISION.tokens_per_image


@partial(jax.jit, static_argnums=0)
def init(config):
    return nn.unbox(init_params(GPT(config), jax.random.key(0)))


@partial(jax.jit, static_argnums=0)
def hidden(config, params, tokens_BT, segments_BT, positions_BT, images_BNX):
    return hidden_states(GPT(config), params, tokens_BT, segments_BT, positions_BT, images_BNX=images_BNX)


def image(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(256, size=VISION.values_per_image).astype(np.uint8)


# Two conversations in a row: text, image, text; image, text; then padding.
TOKENS = np.array([[1, *[IMAGE] * P, 2, 3, *[IMAGE] * P, 4, 0, 0, 0, 0]], np.int32)
SEGMENTS = np.array([[1] * (P + 3) + [2] * (P + 1) + [0] * 4], np.int32)
POSITIONS = np.array([[*range(P + 3), *range(P + 1), *range(4)]], np.int32)
FIRST, SECOND = slice(0, P + 3), slice(P + 3, 2 * P + 4)


def states(config, *images, tokens=TOKENS, params=None):
    images_BNX = np.stack(images)[None]
    return np.asarray(
        hidden(config, init(config) if params is None else params, tokens, SEGMENTS, POSITIONS, images_BNX)
    )


@pytest.mark.parametrize("config", [TINY, PATCHES])
def test_other_images_and_padding_change_nothing(config):
    base = states(config, image(1), image(2), image(3))
    other = states(config, image(1), image(9), image(3))
    np.testing.assert_array_equal(base[:, FIRST], other[:, FIRST])
    assert np.abs(base[:, SECOND] - other[:, SECOND]).min(axis=-1).max() > 1e-4
    unused = states(config, image(1), image(2), image(8))
    np.testing.assert_array_equal(base, unused)
    tokens = TOKENS.copy()
    tokens[:, 2 * P + 4 :] = 7
    np.testing.assert_array_equal(
        base[:, : 2 * P + 4], states(config, image(1), image(2), image(3), tokens=tokens)[:, : 2 * P + 4]
    )


@pytest.mark.parametrize("config", [TINY, PATCHES])
def test_a_text_sees_its_image_and_the_order_of_images(config):
    base = states(config, image(1), image(2), image(3))
    swapped = states(config, image(2), image(1), image(3))
    np.testing.assert_array_equal(base[:, 0], swapped[:, 0])  # the token before the image
    assert np.abs(base[:, P + 1 : P + 3] - swapped[:, P + 1 : P + 3]).max() > 1e-4
    packed_alone = hidden(
        config, init(config), TOKENS[:, SECOND], SEGMENTS[:, SECOND], POSITIONS[:, SECOND], image(2)[None, None]
    )
    np.testing.assert_allclose(base[:, SECOND], packed_alone, atol=2e-6)


def test_an_image_attends_causally_within_itself():
    """With patches and no encoder, an output depends on the pixels of earlier patches only."""
    size = VISION.image_size
    changed = image(1).reshape(size, size, 3).copy()
    changed[3:, 3:] = 255 - changed[3:, 3:]  # the last patch
    base, other = states(PATCHES, image(1), image(2)), states(PATCHES, changed.reshape(-1), image(2))
    np.testing.assert_array_equal(base[:, :P], other[:, :P])
    assert np.abs(base[:, P] - other[:, P]).max() > 1e-4


def test_a_text_without_images_is_computed_as_by_a_model_that_reads_none():
    text_model = dataclasses.replace(TINY, vision=VisionConfig())
    params = init(TINY)
    shared = init(text_model)
    assert params.keys() - shared.keys() == {"vision"}
    jax.tree.map(np.testing.assert_array_equal, {name: params[name] for name in shared}, shared)
    tokens = np.arange(16, dtype=np.int32)[None]
    expected = hidden_states(GPT(text_model), shared, tokens)
    np.testing.assert_array_equal(hidden_states(GPT(TINY), params, tokens), expected)


@pytest.mark.parametrize(
    "vision",
    [
        VISION,
        PATCHES.vision,
        dataclasses.replace(VISION, num_layers=3, read_layer=-2),
        dataclasses.replace(VISION, class_token=False, embedding_norm=False, patch_bias=True, projector="linear"),
    ],
)
def test_the_formula_counts_the_parameters(vision):
    config = dataclasses.replace(TINY, vision=vision)
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(GPT(config), jax.random.key(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == parameter_count(config)


@pytest.mark.parametrize("config", [TINY, PATCHES])
def test_the_formula_counts_the_operations_of_an_image(config):
    """Counted from the products in the traced program, which unrolls the layers."""
    unrolled = dataclasses.replace(config, layer_loop="unroll")
    params = jax.eval_shape(lambda: nn.unbox(init_params(GPT(config), jax.random.key(0))))
    images = jax.ShapeDtypeStruct((1, 1, VISION.values_per_image), np.uint8)

    def tokens(params, images_BNX):
        return GPT(unrolled).apply({"params": params}, images_BNX, method="image_tokens")

    counted = jax.jit(tokens).lower(params, images).cost_analysis()["flops"]
    assert image_flops(config) < counted < 1.5 * image_flops(config)


def test_prefill_of_a_prompt_with_images_is_the_full_forward_pass():
    params, length = init(TINY), P + 3
    images_BNX, model = np.stack([image(1), image(2)])[None], GPT(TINY)
    prefilled = jax.jit(decoding.prefill, static_argnums=(0, 4))
    last_BD, cache = prefilled(
        model, decoding.unstack(TINY, params), TOKENS[:, :8], np.array([length], np.int32), 16, images_BNX
    )
    whole = states(TINY, image(1), image(2), params=params)
    state_BD = model.apply({"params": params}, last_BD, method="normalise")
    np.testing.assert_allclose(state_BD, whole[:, length - 1], atol=1e-5)
    assert len(cache) == TINY.num_layers


CHANGES = {
    "patch_size": 2,
    "activation": "gelu_tanh",
    "norm_eps": 0.1,
    "patch_bias": True,
    "class_token": False,
    "embedding_norm": False,
    "read_layer": -2,
    "final_norm": True,
    "keep_class_token": True,
    "projector": "linear",
    "pixel_mean": (0.0, 0.0, 0.0),
    "pixel_std": (1.0, 1.0, 1.0),
    "num_layers": 3,
    "num_heads": 4,
    "embed_dim": 12,
    "ffw_dim": 12,
}
# These change the image itself (tests/data), or are changed by the other tests of this file.
OTHER_FIELDS = {"encoder", "image_size", "resize", "image_token"}


def test_every_field_is_tested():
    assert CHANGES.keys() | OTHER_FIELDS == {field.name for field in dataclasses.fields(VisionConfig)}


@pytest.mark.slow
@pytest.mark.parametrize("field", CHANGES)
def test_every_field_changes_the_tokens_of_an_image(field):
    @partial(jax.jit, static_argnums=0)
    def tokens(config):
        model = GPT(config)
        params = nn.unbox(init_params(model, jax.random.key(0)))
        # At first, biases are 0 and gains 1.
        params = jax.tree.map(lambda p: p + 0.1 * jnp.sin(jnp.arange(p.size, dtype=p.dtype)).reshape(p.shape), params)
        return model.apply({"params": params}, image(1)[None, None], method="image_tokens")

    changed = dataclasses.replace(TINY, vision=dataclasses.replace(VISION, **{field: CHANGES[field]}))
    check_vision(changed)
    base, other = tokens(TINY), tokens(changed)
    assert base.shape[1] == P
    assert other.shape[1] == changed.vision.tokens_per_image
    assert base.shape != other.shape or np.abs(base - other).max() > 1e-6


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder": "none"}, "model.vision.image_size has no effect"),
        ({"patch_size": 7}, "patch_size=7 is above"),
        ({"num_heads": 3}, "num_heads=3 does not divide"),
        ({"read_layer": -3}, "read_layer=-3 must be between"),
        ({"read_layer": 0}, "read_layer=0 must be between"),
        ({"pixel_mean": (0.5,)}, "pixel_mean=.* needs three"),
        ({"patch_size": 1}, "36 tokens, which leave no room"),
        ({"class_token": False, "keep_class_token": True}, "needs model.vision.class_token"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        check_vision(dataclasses.replace(TINY, vision=dataclasses.replace(VISION, **changes)))


@pytest.mark.parametrize("projector", ["linear", "mlp"])
def test_operations_of_a_step_depend_on_the_trained_part(projector):
    """The gradient of a layer's input and of its weights cost as much as its forward pass each."""
    config = dataclasses.replace(TINY, vision=dataclasses.replace(VISION, projector=projector))
    linear = dataclasses.replace(TINY, vision=dataclasses.replace(VISION, projector="linear"))
    W, D, tokens = VISION.embed_dim, TINY.embed_dim, config.vision.tokens_per_image
    first, second = 2 * tokens * W * D, 2 * tokens * D * D * (projector == "mlp")
    forward = image_flops(config)
    assert forward - image_flops(linear) == second
    assert image_step_flops(config, "all") == 3 * forward
    assert image_step_flops(config, "none") == forward
    assert image_step_flops(config, "projector") == forward + first + 2 * second
    assert image_step_flops(PATCHES, "projector") == image_flops(PATCHES)
