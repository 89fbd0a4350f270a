"""Videos as frames: each is an image of the conversation, evenly spaced from the first to the last.

Decoding is PyAV's, which the extra `video` installs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np

from gptjax.config import UserError
from gptjax.data.images.image_references import IMAGE, WHOLE_VIDEO, ImageReference
from gptjax.data.images.square_images import MAX_PIXELS
from gptjax.data.packages import require_package

if TYPE_CHECKING:
    from PIL.Image import Image

# Containers whose readers read nothing but the file: a playlist, for example, would name other files.
FORMATS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,gif,mpeg,mpegts,ogg,flv,asf"


class Frames(NamedTuple):
    """Frames of a video as RGB images, and their times in seconds from the first frame of the video."""

    images: list["Image"]
    times: list[float]


def check_package() -> None:
    """Raises UserError if PyAV is not installed."""
    require_package("av", "pip install 'gptjax[video]'", "a video")


def frame_numbers(total: int, count: int) -> list[int]:
    """The numbers of `count` frames of `total`, evenly spaced with both ends, as LLaVA-NeXT samples them.

    A video with fewer frames has some of them several times.
    """
    return np.linspace(0, total - 1, count, dtype=int).tolist()


def read_frames(file: BinaryIO, count: int) -> Frames:
    """Decodes `count` frames of a video, turned as its metadata say.

    Raises:
      UserError: the file has no video, or its frames are too large.
      av.FFmpegError: the file is damaged, or in none of FORMATS.
    """
    check_package()
    import av

    with av.open(file, container_options={"format_whitelist": FORMATS}) as container:
        if not container.streams.video:
            raise UserError("it has no video")
        stream = container.streams.video[0]
        if stream.width * stream.height > MAX_PIXELS:
            raise UserError(f"its frames have {stream.width} x {stream.height} pixels: too many to decode")
        # Counts in headers may be wrong or missing; reading the packets decodes none.
        times = sorted(packet.pts for packet in container.demux(stream) if packet.pts is not None)
        if not times:
            raise UserError("it has no frames")
        chosen = [times[number] for number in frame_numbers(len(times), count)]
        decoded: dict[int, Image] = {}
        for time in dict.fromkeys(chosen):
            container.seek(time, stream=stream)  # to the last key frame before
            # The last frame instead of a later one that cannot be decoded.
            for frame in container.decode(stream):
                if frame.pts is None:
                    continue
                decoded[time] = frame.to_image().rotate(frame.rotation, expand=True)
                if frame.pts >= time:
                    break
            if time not in decoded:
                raise UserError("a frame of it cannot be decoded")
        unit = float(stream.time_base or 0)
        return Frames([decoded[time] for time in chosen], [(time - times[0]) * unit for time in chosen])


def with_frames(
    text: str,
    images: Sequence[ImageReference],
    count: int,
    times: Callable[[ImageReference], list[float]] | None = None,
) -> tuple[str, tuple[ImageReference, ...]]:
    """Replaces videos by their frames.

    Args:
      text: has an `<image>` for each image and video.
      images: of the text, in its order.
      count: number of frames of a video.
      times: video -> seconds of its frames, which are then written before each; None: they are not.

    Returns:
      The text with an `<image>` for each image and frame, and the images and frames. Texts without videos, and those
      whose `<image>`s are not as many as their images, are returned as they are.
    """
    if not any(image.frame == WHOLE_VIDEO for image in images) or text.count(IMAGE) != len(images):
        return text, tuple(images)
    first, *others = text.split(IMAGE)
    parts, found = [first], list[ImageReference]()
    for image, other in zip(images, others, strict=True):
        if image.frame != WHOLE_VIDEO:
            parts.append(IMAGE)
            found.append(image)
        else:
            at = [""] * count if times is None else [f"{seconds:.1f} s: " for seconds in times(image)]
            parts += [f"{seconds}{IMAGE}" for seconds in at]
            found += [dataclasses.replace(image, frame=(number, count)) for number in range(count)]
        parts.append(other)
    return "".join(parts), tuple(found)
