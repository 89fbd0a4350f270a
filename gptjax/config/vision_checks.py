"""Validates the settings of images as input."""

import dataclasses

from gptjax.config.errors import require
from gptjax.config.model import GPTConfig, VisionConfig


def check_vision(model: GPTConfig) -> None:
    """Raises UserError if values of `model.vision` are out of range, contradict each other or have no effect."""
    vision = model.vision
    if vision.encoder == "none":
        changed = [f.name for f in dataclasses.fields(vision) if getattr(vision, f.name) != f.default]
        require(
            not changed, f"model.vision.{''.join(changed[:1])} has no effect: set model.vision.encoder, or unset it"
        )
        return
    sizes = ["image_size", "patch_size", "num_layers", "num_heads", "embed_dim", "ffw_dim", "norm_eps"]
    for name in sizes:
        value = getattr(vision, name)
        require(value is None or value > 0, f"model.vision.{name}={value} must be positive")
    require(
        vision.patch_size <= vision.image_size,
        f"model.vision.patch_size={vision.patch_size} is above model.vision.image_size={vision.image_size}: lower it",
    )
    for name in ("pixel_mean", "pixel_std"):
        value = getattr(vision, name)
        require(len(value) == 3, f"model.vision.{name}={value} needs three numbers, of red, green and blue")
    require(min(vision.pixel_std) > 0, f"model.vision.pixel_std={vision.pixel_std} must be positive")
    require(
        vision.tokens_per_image < model.context_length,
        f"an image has {vision.tokens_per_image} tokens, which leave no room in model.context_length="
        f"{model.context_length}: raise model.context_length or model.vision.patch_size",
    )
    if vision.encoder == "vit":
        _check_encoder(vision)


def _check_encoder(vision: VisionConfig) -> None:
    require(
        vision.embed_dim % vision.num_heads == 0,
        f"model.vision.num_heads={vision.num_heads} does not divide model.vision.embed_dim={vision.embed_dim}",
    )
    require(
        1 <= vision.layers_read <= vision.num_layers,
        f"model.vision.read_layer={vision.read_layer} must be between -1, the last, and -{vision.num_layers}",
    )
    require(
        vision.class_token or not vision.keep_class_token,
        "model.vision.keep_class_token=true needs model.vision.class_token=true: set it, or unset the first",
    )
