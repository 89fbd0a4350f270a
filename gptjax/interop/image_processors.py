"""The image processor of a Hugging Face directory: preprocessor_config.json, or a part of processor_config.json.

Processors of CLIP, SigLIP and LLaVA differ in how an image becomes a square (`model.vision.resize`) and in the mean and
the standard deviation of its pixels. Whatever else changes the pixels is refused by name.
"""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from gptjax.config import UserError, VisionConfig
from gptjax.files import read_json
from gptjax.interop.family import Json

FILE, WHOLE_FILE = "preprocessor_config.json", "processor_config.json"
_CLIP_MEAN, _CLIP_STD = VisionConfig().pixel_mean, VisionConfig().pixel_std
_BICUBIC = 3  # of Pillow
_COMMON: Json = {
    "do_resize": True,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "do_convert_rgb": True,
    "resample": _BICUBIC,
    "do_pad": False,
}
_CLIP: Json = {
    **_COMMON,
    "size": {"shortest_edge": 224},
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "image_mean": _CLIP_MEAN,
    "image_std": _CLIP_STD,
}
# Defaults of transformers where the file lacks a key, by the name of the class without Fast, Pil and the like.
_DEFAULTS: dict[str, Json] = {
    "CLIPImageProcessor": _CLIP,
    "LlavaImageProcessor": _CLIP,
    "SiglipImageProcessor": {
        **_COMMON,
        "size": {"height": 224, "width": 224},
        "do_center_crop": False,
        "crop_size": None,
        "image_mean": (0.5,) * 3,
        "image_std": (0.5,) * 3,
    },
}
# Keys that change no pixel.
_WITHOUT_EFFECT = {
    *("image_processor_type", "feature_extractor_type", "processor_class", "auto_map", "_valid_processor_keys"),
    *("return_tensors", "data_format", "input_data_format", "device", "disable_grouping", "default_to_square"),
    *("image_token", "patch_size", "num_additional_image_tokens", "vision_feature_select_strategy", "image_seq_length"),
}


def with_processor(directory: Path, vision: VisionConfig) -> VisionConfig:
    """Returns `vision` with the settings of the image processor in `directory`; unchanged if there is none.

    Raises:
      UserError: a file is damaged, or a setting is not supported or contradicts the vision tower.
    """
    for name in (WHOLE_FILE, FILE):
        path = directory / name
        if not path.exists():
            continue
        try:
            found = read_json(path)
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path}: {error}") from None
        given = found.get("image_processor") if isinstance(found, dict) and name == WHOLE_FILE else found
        if given is None:
            continue
        if not isinstance(given, dict):
            raise UserError(f"{path} has no settings of an image processor: it is {str(given)[:40]!r}")
        try:
            return dataclasses.replace(vision, **_fields(given, vision))
        except UserError as error:
            raise UserError(f"{path}: {error}") from None
    return vision


def _fields(given: Json, vision: VisionConfig) -> dict[str, Any]:
    name = given.get("image_processor_type") or given.get("feature_extractor_type") or "CLIPImageProcessor"
    kind = str(name).replace("FeatureExtractor", "ImageProcessor").removesuffix("Fast").removesuffix("Pil")
    if kind not in _DEFAULTS:
        raise UserError(f"image_processor_type={name!r} is not supported: one of {', '.join(_DEFAULTS)}")
    defaults = _DEFAULTS[kind]
    # null stands for the default, but do_convert_rgb=null of SigLIP for images that are RGB already.
    settings = defaults | {key: value for key, value in given.items() if value is not None}
    if unknown := [key for key in settings if key not in defaults and key not in _WITHOUT_EFFECT]:
        raise UserError(f"{unknown[0]}={settings[unknown[0]]!r} is not supported: remove it if it changes no pixel")
    factor = settings["rescale_factor"]
    required = {
        "do_resize": settings["do_resize"] is True,
        "do_rescale": settings["do_rescale"] is True,
        "do_convert_rgb": settings["do_convert_rgb"] is True,
        "rescale_factor": isinstance(factor, int | float) and math.isclose(factor, 1 / 255, rel_tol=1e-6),
        "resample": settings["resample"] == _BICUBIC,
        "do_pad": settings["do_pad"] is False or (kind == "LlavaImageProcessor" and settings["do_normalize"]),
    }
    resize = _resize(settings, vision.image_size)
    required["size"] = resize is not None
    if wrong := [key for key, is_supported in required.items() if not is_supported]:
        size = {name: settings[name] for name in ("size", "do_center_crop", "crop_size")}
        shown = ", ".join(f"{key}={value!r}" for key, value in size.items())
        if wrong[0] != "size":
            raise UserError(f"{wrong[0]}={settings[wrong[0]]!r} is not supported")
        raise UserError(f"{shown} is not supported by a vision tower for {vision.image_size} pixels")
    if not settings["do_normalize"]:
        return {"resize": resize, "pixel_mean": (0.0,) * 3, "pixel_std": (1.0,) * 3}
    return {
        "resize": resize,
        "pixel_mean": _three_numbers(settings, "image_mean", -math.inf),
        "pixel_std": _three_numbers(settings, "image_std", 0.0),
    }


def _three_numbers(settings: Json, key: str, above: float) -> tuple[float, ...]:
    value = settings[key]
    are_numbers = isinstance(value, list | tuple) and all(isinstance(each, int | float) for each in value)
    if not are_numbers or len(value) != 3 or min(value) <= above:
        raise UserError(f"{key}={value!r} is not three numbers{' above 0' if above == 0 else ''}")
    return tuple(map(float, value))


def _resize(settings: Json, image_size: int) -> str | None:
    """The form of `VisionConfig.resize` that size, do_center_crop and crop_size describe; None: there is none."""
    size, crop, square = settings["size"], settings["crop_size"], {"height": image_size, "width": image_size}
    if isinstance(size, int):  # of older files
        size = square if size == image_size and settings["crop_size"] is None else {"shortest_edge": size}
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    crops = settings["do_center_crop"] is True
    if crops and crop != square:
        return None
    if size == {"shortest_edge": image_size} and (crops or settings["do_pad"]):
        return "pad" if settings["do_pad"] else "crop"
    if size == square:  # cropping a square to itself changes nothing
        return "pad" if settings["do_pad"] else "stretch"
    return None


def write_processor(vision: VisionConfig, directory: Path) -> None:
    """Writes the files of the image processor and of LLaVA's processor, which also has the tokenizer.

    Pixels of the processor are those of `gptjax.data.images.square_images.square`, normalised.
    """
    size = vision.image_size
    square = {"height": size, "width": size}
    kinds = {"crop": "CLIPImageProcessor", "pad": "LlavaImageProcessor", "stretch": "SiglipImageProcessor"}
    settings: Json = {
        "image_processor_type": kinds[vision.resize],
        "processor_class": "LlavaProcessor",
        **_COMMON,
        "size": square if vision.resize == "stretch" else {"shortest_edge": size},
        "image_mean": list(vision.pixel_mean),
        "image_std": list(vision.pixel_std),
    }
    del settings["do_pad"]
    if vision.resize != "stretch":
        settings |= {"do_center_crop": True, "crop_size": square}
    if vision.resize == "pad":
        settings["do_pad"] = True
    whole = {
        "processor_class": "LlavaProcessor",
        "image_token": "<image>",
        "patch_size": vision.patch_size,
        "num_additional_image_tokens": int(vision.class_token),
        "vision_feature_select_strategy": "default" if vision.class_token and not vision.keep_class_token else "full",
    }
    (directory / FILE).write_text(json.dumps(settings, indent=2) + "\n")
    (directory / WHOLE_FILE).write_text(json.dumps(whole, indent=2) + "\n")
