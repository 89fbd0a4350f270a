"""Conversion of an image to the square that a vision encoder reads, exactly as CLIP's and SigLIP's processors do."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError, VisionConfig

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 178_956_970  # of a decoded or resized image: 512 MiB of colours, where Pillow refuses a file


def square(image: "Image", vision: VisionConfig) -> npt.NDArray[np.uint8]:
    """Resizes and crops an RGB image; returns uint8 (X,), its rows, columns and channels flattened.

    Pixels are normalised later, on the device. Resizing is bicubic, by Pillow, whose results the published processors
    have; other libraries round differently.

    Raises:
      UserError: the image is so narrow that resizing its shorter edge would exceed MAX_PIXELS.
    """
    from PIL import Image as images

    size = vision.image_size
    match vision.resize:
        case "stretch":
            image = image.resize((size, size), images.Resampling.BICUBIC)
        case "pad":
            longest = max(image.size)
            colour = tuple(int(255 * mean) for mean in vision.pixel_mean)
            whole = images.new("RGB", (longest, longest), colour)
            whole.paste(image, ((longest - image.width) // 2, (longest - image.height) // 2))
            image = whole.resize((size, size), images.Resampling.BICUBIC)
        case "crop":
            image = _cropped(image, size)
    return np.asarray(image, np.uint8).reshape(-1)


def _cropped(image: "Image", size: int) -> "Image":
    """Resizes the shorter edge to `size`, and returns the centre."""
    from PIL import Image as images

    shorter, longer = min(image.size), max(image.size)
    length = int(size * longer / shorter)
    if size * length > MAX_PIXELS:
        raise UserError(
            f"an image of {image.width} x {image.height} pixels is too narrow to be cropped: set "
            "model.vision.resize=pad, or crop it"
        )
    width, height = (size, length) if image.width <= image.height else (length, size)
    image = image.resize((width, height), images.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return image.crop((left, top, left + size, top + size))


def padded(
    images: Sequence[Sequence[npt.NDArray[np.uint8]]], count: int, vision: VisionConfig
) -> npt.NDArray[np.uint8]:
    """The images of several rows as one array, uint8 (rows, count, X); zeros follow those of a row."""
    images_BNX = np.zeros((len(images), count, vision.values_per_image), np.uint8)
    for row_NX, row in zip(images_BNX, images, strict=True):
        for number, image_X in enumerate(row):
            row_NX[number] = image_X
    return images_BNX


def shifted(image_X: npt.NDArray[np.uint8], size: int, dx: int, dy: int) -> npt.NDArray[np.uint8]:
    """Moves an image of `square` by whole pixels to the right and down; the pixels at its edges are repeated."""
    rows, columns = (np.clip(np.arange(size) - move, 0, size - 1) for move in (dy, dx))
    return image_X.reshape(size, size, 3)[rows][:, columns].reshape(-1)


def largest_shift(vision: VisionConfig, fraction: float) -> int:
    """The most pixels that `data.image_shift` moves an image by."""
    return math.floor(fraction * vision.image_size)
