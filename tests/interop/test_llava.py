"""LLaVA directories without transformers: what is written is read back, and a bad directory is refused."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from gptjax.config import GPTConfig, UserError, VisionConfig
from gptjax.interop.huggingface import load_pretrained, save_pretrained
from gptjax.models.gpt import GPT, init_params
from gptjax.models.peft import flatten

CLIP = VisionConfig(
    encoder="vit", image_size=8, patch_size=4, num_layers=3, num_heads=2, embed_dim=16, ffw_dim=24, image_token=60
)
SIGLIP = dataclasses.replace(
    CLIP,
    class_token=False,
    embedding_norm=False,
    patch_bias=True,
    activation="gelu_tanh",
    norm_eps=1e-6,
    pixel_mean=(0.5,) * 3,
    pixel_std=(0.5,) * 3,
    resize="stretch",
)
TEXT = GPTConfig(
    vocab_size=64, context_length=32, num_layers=2, num_heads=2, embed_dim=16, tied_head=False, dtype="float32"
)


def random_params(model):
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(GPT(model), jax.random.key(0))))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(leaf.dtype), shapes)


@pytest.mark.parametrize("vision", [CLIP, SIGLIP])
def test_a_directory_is_read_back_whole(vision, tmp_path):
    model = dataclasses.replace(TEXT, vision=vision)
    params = random_params(model)
    save_pretrained(model, params, tmp_path / "out", max_file_bytes=5000)
    found, back = load_pretrained(tmp_path / "out")
    assert found.config.vision == vision
    given, read = flatten(params), flatten(back)
    assert given.keys() == read.keys()
    assert any(path.startswith("vision/unread_encoder/") for path in given)
    for path, leaf in given.items():
        np.testing.assert_array_equal(leaf, read[path], err_msg=path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("vision_feature_layer", [-2, -1], r"config.json: vision_feature_layer=\[-2, -1\] is not supported"),
        ("vision_feature_select_strategy", "cls", "vision_feature_select_strategy='cls' is not supported"),
        ("projector_hidden_act", "relu", "projector_hidden_act='relu' is not supported"),
        ("image_token_index", None, "image_token_index=None is not an integer"),
        ("vision_config", {"model_type": "pixtral"}, "model_type='pixtral' is not supported"),
        ("text_config", {"model_type": "t5"}, "model_type='t5' is not supported"),
        ("vision_feature_layer", -7, "read_layer=-7 must be between"),
    ],
)
def test_what_the_config_cannot_express_is_refused(key, value, message, tmp_path):
    model = dataclasses.replace(TEXT, vision=CLIP)
    save_pretrained(model, random_params(model), tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=message):
        load_pretrained(tmp_path / "out")


def test_a_model_that_llava_cannot_express_is_not_written(tmp_path):
    model = dataclasses.replace(TEXT, vision=dataclasses.replace(CLIP, projector="linear"))
    with pytest.raises(UserError, match=r"LLaVA of transformers has no model.vision.projector='linear'"):
        save_pretrained(model, random_params(model), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_is_written_as_one_of_its_own(tmp_path):
    model = dataclasses.replace(TEXT, vision=CLIP, tied_head=True)
    params = random_params(model)
    save_pretrained(model, params, tmp_path / "out")
    found, back = load_pretrained(tmp_path / "out")
    assert not found.config.tied_head
    np.testing.assert_array_equal(back["head_embedding"]["embedding"], params["token_embedding"]["embedding"])
