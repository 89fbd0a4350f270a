"""Images in conversations: where they are named, and the `<image>` that stands in the text for each."""

import base64
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config import UserError

IMAGE = "<image>"
FORMS = "a path, a URL or a data: URL"
_VIDEO_PARTS = ("video_url", "video")
# Of OpenAI's two APIs, and of Hugging Face's chat templates.
_PART_TYPES = ("image_url", "input_image", "image", *_VIDEO_PARTS)
_VIDEO_FIELDS = ("videos", "video")  # of records
FIELDS = ("images", "image", "file_name", *_VIDEO_FIELDS)
WHOLE_VIDEO = (0, 0)  # the frame of a video that `gptjax.data.images.videos.with_frames` has not divided yet


@dataclasses.dataclass(frozen=True)
class ImageReference:
    """An image that a conversation names.

    Attributes:
      source: path, URL, data: URL, "digits:NUMBER" for one of scikit-learn's digits, a part of a tar file, or
        an image of tensorflow-datasets, as in `gptjax.data.images.tar_shards` and `dataset_images`.
      place: the record that names it, for error messages: "chats.jsonl:17".
      frame: which frame of a video it is, from 0, and of how many; WHOLE_VIDEO: all; None: it is an image.
    """

    source: str
    place: str = ""
    frame: tuple[int, int] | None = None


FROM_RECORD = ImageReference("")  # a content part whose image is one of the record's


def parse_parts(value: Any, place: str) -> tuple[Any, tuple[ImageReference, ...]]:
    """Replaces the images of a list of content parts by `<image>`.

    The parts are OpenAI's {"type": "image_url", "image_url": {"url": ...}}, {"type": "input_image", "image_url": ...},
    or {"type": "image"}, whose image is one of the record if the part names none (FROM_RECORD); the same with video_url
    and video.

    Returns:
      The text with an `<image>` for each image, and the images; or `value` itself if it has no parts with images.

    Raises:
      UserError: a part names no image, or a text next to images has an `<image>` of its own.
    """
    is_list = isinstance(value, list) and all(isinstance(part, Mapping) for part in value)
    if not is_list or not any(part.get("type") in _PART_TYPES for part in value):
        return value, ()
    texts: list[str] = []
    images: list[ImageReference] = []
    for part in value:
        if part.get("type") in _PART_TYPES:
            texts.append(IMAGE)
            images.append(_image_of(part, place))
        elif part.get("type") in ("text", "input_text") and isinstance(part.get("text"), str):
            if IMAGE in part["text"]:
                raise UserError(f"{place}: a text next to images contains {IMAGE}, which stands for one: remove it")
            texts.append(part["text"])
        else:
            raise UserError(f"{place}: the content has a part of type {str(part.get('type'))[:40]!r}: text or image")
    return "".join(texts), tuple(images)


def written_parts(text: str, images: Sequence[ImageReference]) -> list[dict[str, str]]:
    """Content parts that `parse_parts` reads as this text and these images and whole videos."""
    first, *others = text.split(IMAGE)
    parts = [{"type": "text", "text": first}]
    for image, other in zip(images, others, strict=True):
        kind = "image" if image.frame is None else "video"
        parts += [{"type": kind, kind: image.source}, {"type": "text", "text": other}]
    return [part for part in parts if part.get("text") != ""]


def _image_of(part: Mapping[str, Any], place: str) -> ImageReference:
    kind, is_video = part["type"], part["type"] in _VIDEO_PARTS
    names = _VIDEO_PARTS if is_video else ("image_url", "image")
    found = next((part[name] for name in (*names, "url", "path") if part.get(name) is not None), None)
    if found is None and kind in ("image", "video"):
        return FROM_RECORD
    found = found.get("url") if kind in ("image_url", "video_url") and isinstance(found, Mapping) else found
    return _reference(found, place, is_video)


def _reference(value: Any, place: str, is_video: bool = False) -> ImageReference:
    """Parses an image or a video: text, or the bytes or path of such a feature of a Hugging Face dataset."""
    if isinstance(value, Mapping):
        value = value["bytes"] if value.get("bytes") is not None else value.get("path")
    if isinstance(value, bytes):
        value = f"data:;base64,{base64.b64encode(value).decode()}"
    if not isinstance(value, str) or not value.strip():
        what = "a video" if is_video else "an image"
        raise UserError(f"{place}: {what} is {str(value)[:40]!r}, where {FORMS} is expected")
    return ImageReference(value, place, WHOLE_VIDEO if is_video else None)


def record_images(record: Mapping[str, Any], place: str) -> list[ImageReference] | None:
    """Parses the images that a field of a record names: `images`, `image` or `file_name`, `videos` or `video`.

    Returns:
      The images or videos; None: the record has no such field.

    Raises:
      UserError: two of the fields, or a value that is no image.
    """
    found = [name for name in FIELDS if record.get(name) is not None and record.get(name) != ""]
    if not found:
        return None
    if len(found) > 1:
        raise UserError(f"{place} has {' and '.join(found)}: keep one")
    value, is_video = record[found[0]], found[0] in _VIDEO_FIELDS
    values = value if isinstance(value, list) else [value]
    return [_reference(each, f"{place}: {found[0]}", is_video) for each in values]


def placed(
    texts: Sequence[str],
    named: Sequence[Sequence[ImageReference]],
    images: Sequence[ImageReference] | None,
    place: str,
) -> list[tuple[ImageReference, ...]]:
    """The images of each text, in the order of the `<image>`s in it.

    Args:
      texts: of all messages of a record.
      named: the images of their content parts, FROM_RECORD for those of `images`; empty: the text has no such parts.
      images: those of the record, in the order of the `<image>`s that have none; None: it has none.

    Raises:
      UserError: an `<image>` too many, or too few.
    """
    if images is None and not any(named):
        return [()] * len(texts)  # plain text, in which <image> means nothing
    rest = list(images or [])
    found = []
    for text, parts in zip(texts, named, strict=True):
        places = parts or (FROM_RECORD,) * (text.count(IMAGE) if images is not None else 0)
        missing = sum(part == FROM_RECORD for part in places)
        if missing > len(rest):
            have, given = sum(text.count(IMAGE) for text in texts), len(images or [])
            raise UserError(f"{place} has {have} {IMAGE}, but names {given} images: they must be equally many")
        found.append(tuple(rest.pop(0) if part == FROM_RECORD else part for part in places))
    if rest:
        raise UserError(
            f"{place} names {len(images or [])} images, but has {len(images or []) - len(rest)} {IMAGE}: they must be "
            "equally many"
        )
    return found
