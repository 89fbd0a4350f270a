"""Comparison of images with transformers, where it is installed: processors, towers and whole LLaVAs."""

import dataclasses

import jax
import numpy as np
import pytest
from PIL import Image, ImageOps

from gptjax.config import VisionConfig
from gptjax.data.images.square_images import square
from gptjax.interop.huggingface import load_pretrained, save_pretrained
from gptjax.interop.image_processors import with_processor, write_processor
from gptjax.models.gpt import GPT
from gptjax.models.vision import ImageEncoder, normalised_patches
from tests.interop.test_llava import CLIP, SIGLIP, TEXT

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's and transformers' own

SIZES = [(1, 1000), (1000, 1), (1, 1), (3, 5), (7, 640), (31, 29), (32, 32), (33, 31), (640, 480), (481, 639)]
MODES = ["RGB", "L", "RGBA", "P", "1", "RGB", "LA", "RGB", "L", "RGB"]


def images():
    """20 images of odd sizes: grey, transparent, with a palette, and rotated by their EXIF data."""
    rng = np.random.default_rng(0)
    for number, ((width, height), mode) in enumerate(zip(SIZES * 2, [*MODES, *MODES[::-1]], strict=True)):
        pixels = rng.integers(256, size=(height, width, 4)).astype(np.uint8)
        image = Image.fromarray(pixels[..., 0], "P") if mode == "P" else Image.fromarray(pixels, "RGBA").convert(mode)
        image.getexif()[0x0112] = 1 + number % 8
        yield image


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_pixel_values_are_those_of_the_processor(kind):
    vision, size = (CLIP if kind == "clip" else SIGLIP), 30
    vision = dataclasses.replace(vision, image_size=size, patch_size=5)
    if kind == "clip":
        processor = transformers.CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=size)
    else:
        processor = transformers.SiglipImageProcessorPil(size={"height": size, "width": size}, resample=3)
    model = dataclasses.replace(TEXT, vision=vision)
    number = 0
    for image in images():
        rgb = ImageOps.exif_transpose(image).convert("RGB")  # as transformers' load_image does
        expected = processor(rgb, return_tensors="np")["pixel_values"][0]
        patches = np.asarray(normalised_patches(model, square(rgb, vision)[None]))[0]
        side = size // vision.patch_size
        whole = patches.reshape(side, side, vision.patch_size, vision.patch_size, 3).swapaxes(1, 2)
        np.testing.assert_allclose(whole.reshape(size, size, 3).transpose(2, 0, 1), expected, atol=1e-3)
        number += 1
    assert number == 20


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
def test_pixel_values_are_those_of_the_processor_that_is_written(resize, tmp_path):
    vision = dataclasses.replace(CLIP, image_size=30, patch_size=5, resize=resize, pixel_mean=(0.2, 0.5, 0.7))
    write_processor(vision, tmp_path)
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path, backend="pil")
    for image in images():
        rgb = ImageOps.exif_transpose(image).convert("RGB")
        expected = processor(rgb, return_tensors="np")["pixel_values"][0]
        pixels = square(rgb, vision).reshape(30, 30, 3).astype(np.float32) / 255
        values = (pixels - np.array(vision.pixel_mean)) / np.array(vision.pixel_std)
        np.testing.assert_allclose(values.transpose(2, 0, 1), expected, atol=1e-3)
    processor.save_pretrained(tmp_path / "theirs")
    assert with_processor(tmp_path / "theirs", dataclasses.replace(CLIP, image_size=30, patch_size=5)) == vision


def tower(vision: VisionConfig):
    kind = "CLIP" if vision.class_token else "Siglip"
    fields = {
        "hidden_size": vision.embed_dim,
        "intermediate_size": vision.ffw_dim,
        "num_hidden_layers": vision.num_layers,
        "num_attention_heads": vision.num_heads,
        "image_size": vision.image_size,
        "patch_size": vision.patch_size,
    }
    return getattr(transformers, f"{kind}VisionConfig")(
        **fields, **({} if vision.class_token else {"vision_use_head": False})
    )


TEXTS = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=64, n_embd=16, n_layer=2, n_head=2, n_positions=32, tie_word_embeddings=False
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=64,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        max_position_embeddings=32,
        attention_types=[[["global", "local"], 1]],
        window_size=4,
        tie_word_embeddings=False,
    ),
    "llama": lambda: transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=32,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=5,
        max_position_embeddings=32,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 8,
        },
        attn_implementation="eager",
    ),
}


@pytest.mark.parametrize(
    ("text", "vision", "strategy"),
    [
        ("gpt2", CLIP, "default"),
        ("gpt_neo", CLIP, "full"),
        ("llama", SIGLIP, "full"),
        ("llama", CLIP, "default"),
        ("gpt_oss", SIGLIP, "full"),
    ],
)
def test_same_logits_and_the_same_weights_back(text, vision, strategy, tmp_path):
    keep = vision.class_token and strategy == "full"
    tokens = (vision.image_size // vision.patch_size) ** 2 + keep
    torch.manual_seed(0)
    theirs = transformers.LlavaForConditionalGeneration(
        transformers.LlavaConfig(
            vision_config=tower(vision),
            text_config=TEXTS[text](),
            image_token_index=60,
            image_seq_length=tokens,
            vision_feature_select_strategy=strategy,
        )
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0, 0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    model, params = load_pretrained(tmp_path / "theirs")
    assert isinstance(model, GPT)
    rng = np.random.default_rng(1)
    pixels = rng.integers(256, size=(2, vision.values_per_image)).astype(np.uint8)
    ids = np.array([[1, 2, *[60] * tokens, 3, *[60] * tokens, 4]], np.int32)
    mean, std = (np.array(v, np.float32) for v in (model.config.vision.pixel_mean, model.config.vision.pixel_std))
    values = (pixels.reshape(2, 8, 8, 3).astype(np.float32) / 255 - mean) / std
    with torch.no_grad():
        pixel_values = torch.tensor(values.transpose(0, 3, 1, 2))
        expected = theirs(input_ids=torch.tensor(ids.astype(np.int64)), pixel_values=pixel_values).logits.numpy()
        features = theirs.get_image_features(pixel_values=pixel_values, return_dict=True)
    got = jax.jit(lambda p, t, i: model.apply({"params": p}, t, images_BNX=i))(params, ids, pixels[None])
    np.testing.assert_allclose(got, expected, atol=1e-4, rtol=1e-5)
    pooled = getattr(features, "pooler_output", features)
    wanted = np.concatenate([np.asarray(part) for part in pooled])
    encoded = ImageEncoder(model.config).apply({"params": params["vision"]}, pixels[None])[0]
    np.testing.assert_allclose(encoded, wanted.reshape(-1, wanted.shape[-1]), atol=1e-4, rtol=1e-5)

    save_pretrained(model.config, params, tmp_path / "ours")
    back, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info.values()), info
    state = theirs.state_dict()
    assert back.state_dict().keys() == state.keys()
    for name, tensor in back.state_dict().items():
        assert torch.equal(tensor, state[name]), name
