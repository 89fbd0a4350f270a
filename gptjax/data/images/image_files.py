"""Reads and decodes the images that conversations name."""

import base64
import binascii
import dataclasses
import functools
import hashlib
import io
import os
import re
import threading
import urllib.parse
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from absl import logging

from gptjax.config import Config, DataConfig, UserError, VisionConfig
from gptjax.data.conversation_forms import Message
from gptjax.data.images import dataset_images, digits, tar_shards, videos
from gptjax.data.images.image_references import ImageReference
from gptjax.data.images.square_images import MAX_PIXELS, largest_shift, shifted, square
from gptjax.data.remote_files import is_url

# Formats whose decoders read nothing but the file: EPS, for example, would start another program.
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF", "PPM")
_LINE = re.compile(r"(.*):\d+(?::|$)")  # the file of a place such as "chats.jsonl:17: messages[0]"


class ImageFiles:
    """The images of a run, as a vision encoder reads them. Thread-safe.

    Args:
      vision: size and form of the images.
      data: where they are, and what happens to damaged ones.

    Attributes:
      skipped: number of images that could not be read so far with data.on_corrupt=skip.
    """

    def __init__(self, vision: VisionConfig, data: DataConfig) -> None:
        self.vision, self._data, self.skipped = vision, data, 0
        self._lock = threading.Lock()
        self._cached_video = functools.lru_cache(maxsize=4)(self._read_video)  # its frames are read one after another

    @classmethod
    def of_prompts(cls, config: Config, frames: int | None = None) -> "ImageFiles":
        """The images and videos that a user gives to a trained model, of whose run the settings of videos apply.

        Args:
          frames: number of frames of a video; None: data.video_frames.
        """
        count = config.data.video_frames if frames is None else frames
        data = DataConfig(video_frames=count, video_timestamps=config.data.video_timestamps)
        return cls(config.model.vision, data)

    def check(self, images: list[ImageReference]) -> None:
        """Raises UserError if an image is remote and may not be, or a file does not exist; decodes none."""
        for image in images:
            if self._is_remote(image) and not self._data.remote_images:
                raise UserError(
                    f"{image.place}: the image {_short(image.source)} is remote: set data.remote_images=true to read "
                    "such images, or download it"
                )
            if image.frame is not None:
                videos.check_package()
            path = self._path(image)
            if path is not None and self._data.on_corrupt == "error" and not path.is_file():
                raise UserError(f"{_before(image)}there is no image {path}")

    def read(self, image: ImageReference, seed: tuple[int, ...] | None = None) -> npt.NDArray[np.uint8] | None:
        """Decodes an image; returns uint8 (X,) as `square` does. None: it is damaged, and data.on_corrupt=skip.

        Args:
          seed: of the random shift by data.image_shift, ending in the number of the image in its row; the frames of a
            video are shifted together, as the first of them. None: the image is not shifted.

        Raises:
          UserError: the image does not exist, is damaged or too large, or is of none of FORMATS.
        """
        try:
            image_X, most = self._decoded(image), largest_shift(self.vision, self._data.image_shift)
        except UserError as error:
            if self._data.on_corrupt == "error":
                raise UserError(f"{_before(image)}{error}") from None
            with self._lock:
                self.skipped += 1
                if self.skipped == 1:
                    logging.warning("skipped a damaged image, and will skip others: %s%s", _before(image), error)
            return None
        if seed is None or most == 0:
            return image_X
        *others, number = seed
        first = number if image.frame is None else number - image.frame[0]
        generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([*others, first])))
        dx, dy = generator.integers(-most, most, size=2, endpoint=True).tolist()
        return shifted(image_X, self.vision.image_size, dx, dy)

    def read_all(self, images: Iterable[ImageReference]) -> list[npt.NDArray[np.uint8]]:
        """Decodes images, as `read` does, where data.on_corrupt=error: none is skipped."""
        assert self._data.on_corrupt == "error", "the places of images that are skipped would be lost"
        return [image_X for image in images if (image_X := self.read(image)) is not None]

    def with_frames(self, text: str, images: Sequence[ImageReference]) -> tuple[str, tuple[ImageReference, ...]]:
        """Replaces videos by their frames, as `videos.with_frames` does by data.video_frames and video_timestamps."""
        count = self._data.video_frames
        times = (lambda video: self.times(video, count)) if self._data.video_timestamps else None
        return videos.with_frames(text, images, count, times)

    def divided(self, message: Message) -> Message:
        """A message whose videos are replaced by their frames."""
        text, images = self.with_frames(message.content, message.images)
        return dataclasses.replace(message, content=text, images=images)

    def fingerprint(self, image: ImageReference) -> str:
        """A hash of the file of an image, or the source where it is no file; raises UserError if it does not exist."""
        is_file = self._path(image) is not None or tar_shards.parse_source(image.source) is not None
        return hashlib.sha256(self._bytes(image)).hexdigest() if is_file else image.source

    def _decoded(self, image: ImageReference) -> npt.NDArray[np.uint8]:
        from PIL import Image, ImageOps, UnidentifiedImageError

        if image.frame is not None:
            number, count = image.frame
            return self._cached_video(dataclasses.replace(image, frame=videos.WHOLE_VIDEO), count)[0][number]
        if image.source.startswith("digits:"):
            return square(Image.fromarray(digits.image(image.source)), self.vision)
        content, name = self._bytes(image), _short(image.source)
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is that of Pillow's error
        try:
            with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
                if opened.width * opened.height > MAX_PIXELS:
                    raise UserError(f"the image {name} has {opened.width} x {opened.height} pixels: too many to decode")
                turned = ImageOps.exif_transpose(opened)
                return square(turned.convert("RGB"), self.vision)
        except UserError:
            raise
        except UnidentifiedImageError:
            raise UserError(f"{name} is not an image: {', '.join(FORMATS)} are read") from None
        except Image.DecompressionBombError:
            raise UserError(f"the image {name} has too many pixels to decode") from None
        except Exception as error:  # on arbitrary bytes, decoders raise exceptions of many types
            raise UserError(f"the image {name} is damaged: {type(error).__name__}") from None

    def times(self, video: ImageReference, count: int) -> list[float]:
        """The seconds of `count` frames of a video; raises UserError as `read` if it is damaged."""
        try:
            return self._cached_video(video, count)[1]
        except UserError as error:
            raise UserError(f"{_before(video)}{error}") from None

    def _read_video(self, video: ImageReference, count: int) -> tuple[list[npt.NDArray[np.uint8]], list[float]]:
        path, name = self._path(video), _short(video.source)
        try:
            with io.BytesIO(self._bytes(video)) if path is None else path.open("rb") as file:
                frames = videos.read_frames(file, count)
            return [square(frame, self.vision) for frame in frames.images], frames.times
        except FileNotFoundError:
            raise UserError(f"there is no video {path}") from None
        except UserError as error:
            raise UserError(f"the video {name}: {error}") from None
        except Exception as error:  # on arbitrary bytes, decoders raise exceptions of many types
            raise UserError(f"the video {name} is damaged, or of another format: {type(error).__name__}") from None

    def _bytes(self, image: ImageReference) -> bytes:
        source = image.source
        if source.startswith("data:"):
            header, comma, text = source.partition(",")
            try:
                if comma and header.endswith(";base64"):
                    return base64.b64decode("".join(text.split()), validate=True)
                raise ValueError
            except (ValueError, binascii.Error):
                raise UserError(f"the image {_short(source)} is not a data: URL in base64") from None
        path, part = self._path(image), tar_shards.parse_source(source)
        try:
            if part is not None:
                return part.read()
            if source.startswith(dataset_images.SCHEME):
                return dataset_images.read_image(source)
            if path is not None:
                return path.read_bytes()
            import fsspec

            with fsspec.open(source, "rb") as file:
                return bytes(file.read())
        except FileNotFoundError:
            raise UserError(f"there is no image {path or source}") from None
        except UserError:
            raise
        except Exception as error:  # of a file system or a client
            raise UserError(f"cannot read the image {path or source}: {error}") from None

    def _is_remote(self, image: ImageReference) -> bool:
        if (part := tar_shards.parse_source(image.source)) is not None:
            return part.is_remote
        return not image.source.startswith(("data:", "digits:", "file:")) and is_url(image.source)

    def _path(self, image: ImageReference) -> Path | None:
        """The file of an image, relative to data.image_dir or else to the file that names it; None: it is no file."""
        source = image.source
        in_no_file = source.startswith(("data:", "digits:", dataset_images.SCHEME)) or tar_shards.parse_source(source)
        if in_no_file or self._is_remote(image):
            return None
        if source.startswith("file:"):
            source = urllib.parse.unquote(urllib.parse.urlparse(source).path)
        named_in = _LINE.match(image.place)
        folder = self._data.image_dir or (os.path.dirname(named_in[1]) if named_in else "")
        return Path(os.path.expanduser(folder), os.path.expanduser(source))


def _before(image: ImageReference) -> str:
    return f"{image.place}: " if image.place else ""


def _short(source: str) -> str:
    return source if len(source) <= 120 else f"{source[:40]}..."
