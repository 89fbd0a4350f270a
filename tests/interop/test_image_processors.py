"""Image processors of Hugging Face directories: what is read, written, and refused by name."""

import dataclasses
import json

import pytest

from gptjax.config import UserError, VisionConfig
from gptjax.interop.huggingface import load_pretrained, save_pretrained
from gptjax.interop.image_processors import FILE, WHOLE_FILE, with_processor, write_processor
from tests.interop.test_llava import CLIP, SIGLIP, TEXT, random_params

CLIP_FILE = {  # of LLaVA-1.5, for a smaller tower
    "crop_size": {"height": 8, "width": 8},
    "do_center_crop": True,
    "do_convert_rgb": True,
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.1, 0.2, 0.3],
    "image_processor_type": "CLIPImageProcessor",
    "image_std": [0.4, 0.5, 0.6],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 0.00392156862745098,
    "size": {"shortest_edge": 8},
}


def read(directory, settings, vision=CLIP, name=FILE):
    (directory / name).write_text(json.dumps(settings))
    return with_processor(directory, vision)


def test_the_settings_of_a_file(tmp_path):
    found = read(tmp_path, CLIP_FILE)
    assert found == dataclasses.replace(CLIP, resize="crop", pixel_mean=(0.1, 0.2, 0.3), pixel_std=(0.4, 0.5, 0.6))
    assert with_processor(tmp_path / "none", CLIP) == CLIP


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"size": 8, "crop_size": 8}, {"resize": "crop"}),
        ({"image_processor_type": None, "feature_extractor_type": "CLIPFeatureExtractor"}, {"resize": "crop"}),
        ({"image_processor_type": "CLIPImageProcessorFast", "do_pad": None}, {"resize": "crop"}),
        ({"image_processor_type": "LlavaImageProcessor", "do_pad": True}, {"resize": "pad"}),
        ({"size": {"height": 8, "width": 8}}, {"resize": "stretch"}),
        ({"do_normalize": False}, {"pixel_mean": (0.0,) * 3, "pixel_std": (1.0,) * 3}),
        (
            {"image_processor_type": "SiglipImageProcessor", "size": 8, "crop_size": None, "do_center_crop": None},
            {"resize": "stretch"},
        ),
        ({"image_mean": None}, {"pixel_mean": VisionConfig().pixel_mean}),
        ({"data_format": "channels_first", "device": None}, {}),
    ],
)
def test_other_forms(changes, expected, tmp_path):
    found = read(tmp_path, CLIP_FILE | changes)
    for name, value in expected.items():
        assert getattr(found, name) == value


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"do_resize": False}, "do_resize=False is not supported"),
        ({"do_rescale": False}, "do_rescale=False is not supported"),
        ({"rescale_factor": 1 / 127.5}, "rescale_factor=0.0078"),
        ({"do_convert_rgb": False}, "do_convert_rgb=False is not supported"),
        ({"resample": 2}, "resample=2 is not supported"),
        ({"do_pad": True}, "do_pad=True is not supported"),
        ({"do_center_crop": False}, "size={'shortest_edge': 8}, do_center_crop=False"),
        ({"size": {"shortest_edge": 9}}, r"size={'shortest_edge': 9}, .* by a vision tower for 8 pixels"),
        ({"crop_size": {"height": 8, "width": 7}}, "size=.*crop_size={'height': 8, 'width': 7}"),
        ({"image_grid_pinpoints": [[8, 16]]}, r"image_grid_pinpoints=\[\[8, 16\]\] is not supported"),
        ({"image_processor_type": "ViltImageProcessor"}, "image_processor_type='ViltImageProcessor' is not supported"),
        ({"image_std": [0.4, 0, 0.6]}, "image_std=.* is not three numbers above 0"),
        ({"image_mean": [0.4, 0.5]}, "image_mean=.* is not three numbers"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(changes, message, tmp_path):
    with pytest.raises(UserError, match=rf"{FILE}: {message}"):
        read(tmp_path, CLIP_FILE | changes)


def test_damaged_files(tmp_path):
    (tmp_path / FILE).write_text("{")
    with pytest.raises(UserError, match=f"cannot read .*{FILE}"):
        with_processor(tmp_path, CLIP)
    with pytest.raises(UserError, match=rf"{FILE} has no settings of an image processor: it is '\[\]'"):
        read(tmp_path, [])


def test_a_part_of_the_processor_comes_first(tmp_path):
    read(tmp_path, CLIP_FILE)
    whole = {"image_token": "<image>", "image_processor": CLIP_FILE | {"image_mean": [0.7, 0.8, 0.9]}}
    assert read(tmp_path, whole, name=WHOLE_FILE).pixel_mean == (0.7, 0.8, 0.9)
    assert read(tmp_path, {"image_token": "<image>"}, name=WHOLE_FILE).pixel_mean == (0.1, 0.2, 0.3)


@pytest.mark.parametrize("resize", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("vision", [CLIP, SIGLIP])
def test_what_is_written_is_read_back(vision, resize, tmp_path):
    vision = dataclasses.replace(vision, resize=resize, pixel_mean=(0.25, 0.5, 0.75))
    write_processor(vision, tmp_path)
    other = dataclasses.replace(vision, resize="crop", pixel_mean=(0.0,) * 3, pixel_std=(1.0,) * 3)
    assert with_processor(tmp_path, other) == vision


def test_a_checkpoint_keeps_its_processor(tmp_path):
    model = dataclasses.replace(TEXT, vision=dataclasses.replace(CLIP, resize="pad", pixel_std=(0.3, 0.4, 0.5)))
    save_pretrained(model, random_params(model), tmp_path / "out")
    assert load_pretrained(tmp_path / "out")[0].config.vision == model.vision
    (tmp_path / "out" / FILE).write_text(json.dumps(CLIP_FILE | {"resample": 0}))
    with pytest.raises(UserError, match=f"{FILE}: resample=0 is not supported"):
        load_pretrained(tmp_path / "out")
