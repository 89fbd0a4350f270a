"""Decoding of images: exact sizes and forms, and damaged, missing, remote and huge ones."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from gptjax.config import DataConfig, UserError, VisionConfig
from gptjax.data.chat_batches import PackedConversations
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import ImageReference
from gptjax.data.images.square_images import MAX_PIXELS, shifted
from gptjax.data.templates import EncodedConversation

VISION = VisionConfig(encoder="patches", image_size=8, patch_size=4)


def files(vision=VISION, **data) -> ImageFiles:
    return ImageFiles(vision, DataConfig(**data))


def png(image: Image.Image, kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    image.save(content, kind)
    return content.getvalue()


def random_image(width: int, height: int, mode: str = "RGB", seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(256, size=(height, width, 4)).astype(np.uint8)
    return Image.fromarray(pixels, "RGBA").convert(mode) if mode != "P" else Image.fromarray(pixels[..., 0], "P")


def test_a_path_is_relative_to_the_file_that_names_it(tmp_path, monkeypatch):
    image = random_image(8, 8)
    (tmp_path / "a b.png").write_bytes(png(image))
    expected = np.asarray(image).reshape(-1)
    named = ImageReference("a b.png", f"{tmp_path}/chats.jsonl:3: messages[0]")
    np.testing.assert_array_equal(files().read(named), expected)
    np.testing.assert_array_equal(files(image_dir=str(tmp_path)).read(ImageReference("a b.png", "x:1")), expected)
    monkeypatch.chdir(tmp_path)
    data_url = f"data:image/png;base64,{base64.b64encode(png(image)).decode()}"
    for source in ("a b.png", f"{tmp_path}/a b.png", f"file://{tmp_path}/a%20b.png", data_url):
        np.testing.assert_array_equal(files().read(ImageReference(source)), expected)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "LA", "CMYK"])
def test_all_kinds_of_colours_become_rgb(mode, tmp_path):
    image = random_image(8, 8, mode)
    path = tmp_path / "image"
    path.write_bytes(png(image, "TIFF" if mode == "CMYK" else "PNG"))
    expected = np.asarray(Image.open(path).convert("RGB")).reshape(-1)
    np.testing.assert_array_equal(files().read(ImageReference(str(path))), expected)


def test_a_rotated_photograph_is_turned(tmp_path):
    image = random_image(8, 8)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(
        files().read(ImageReference(f"{tmp_path}/a.png")), np.rot90(np.asarray(image), -1).reshape(-1)
    )


@pytest.mark.parametrize(("resize", "left"), [("crop", False), ("pad", True), ("stretch", False)])
def test_an_image_becomes_a_square(resize, left, tmp_path):
    """A picture of 24 x 8 whose left third is red: cropping loses it, padding and stretching do not."""
    pixels = np.zeros((8, 24, 3), np.uint8)
    pixels[:, :8, 0] = 255
    (tmp_path / "a.png").write_bytes(png(Image.fromarray(pixels)))
    vision = VisionConfig(encoder="patches", image_size=8, patch_size=4, resize=resize)
    square = files(vision).read(ImageReference(f"{tmp_path}/a.png")).reshape(8, 8, 3)
    assert (square[4, 0, 0] > 128) == (resize != "crop")
    assert (square[0, 0].tolist() == [122, 116, 104]) == left  # the mean colour


def test_a_shift_moves_whole_pixels_and_depends_on_its_seed_alone(tmp_path):
    image = random_image(8, 8)
    (tmp_path / "a.png").write_bytes(png(image))
    reader, reference = files(image_shift=0.25), ImageReference(f"{tmp_path}/a.png")
    base = np.asarray(image).reshape(-1)
    possible = {shifted(base, 8, dx, dy).tobytes() for dx in range(-2, 3) for dy in range(-2, 3)}
    found = [reader.read(reference, (0, i)).tobytes() for i in range(60)]
    assert set(found) <= possible
    assert len(set(found)) > 15
    assert found == [reader.read(reference, (0, i)).tobytes() for i in range(60)]
    np.testing.assert_array_equal(reader.read(reference), base)  # held-out images stay


def bomb() -> bytes:
    """A PNG whose header declares 20,000 x 20,000 pixels."""
    content = bytearray(png(Image.new("L", (1, 1))))
    import struct
    import zlib

    content[16:24] = struct.pack(">II", 20_000, 20_000)
    content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
    return bytes(content)


DAMAGED = {
    "empty": (b"", "is not an image: PNG, JPEG"),
    "text": (b"not an image", "is not an image: PNG, JPEG"),
    "cut": (png(random_image(64, 64))[:2000], "is damaged: OSError"),
    "postscript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "is not an image"),
    "bomb": (bomb(), "has too many pixels|pixels: too many to decode"),
    "narrow": (png(Image.new("L", (1, MAX_PIXELS // 64 + 9))), "too narrow to be cropped: set model.vision.resize=pad"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_image_is_refused_or_counted(name, tmp_path):
    content, message = DAMAGED[name]
    (tmp_path / "a.png").write_bytes(content)
    reference = ImageReference("a.png", f"{tmp_path}/chats.jsonl:7: messages[0]")
    with pytest.raises(UserError, match=message) as error:
        files().read(reference)
    assert str(error.value).startswith(f"{tmp_path}/chats.jsonl:7: messages[0]: ")
    skipping = files(on_corrupt="skip")
    assert skipping.read(reference) is None
    assert skipping.skipped == 1


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("https://example.com/a.png", "is remote: set data.remote_images=true"),
        ("gone.png", "there is no image .*gone.png"),
        (".", "there is no image"),
    ],
)
def test_images_that_cannot_be_read_are_found_before_training(source, message):
    with pytest.raises(UserError, match=f"x.jsonl:1: .*{message}"):
        files().check([ImageReference(source, "x.jsonl:1")])


@pytest.mark.parametrize("source", ["data:image/png,abc", "data:;base64,a", "data:"])
def test_a_malformed_data_url_is_refused(source):
    with pytest.raises(UserError, match=re.escape(f"the image {source} is not a data: URL in base64")):
        files().read(ImageReference(source))


def test_an_allowed_remote_image_is_read():
    import fsspec

    fsspec.filesystem("memory").pipe("/a.png", png(random_image(8, 8)))
    reader = files(remote_images=True)
    reader.check([ImageReference("memory://a.png")])
    np.testing.assert_array_equal(reader.read(ImageReference("memory://a.png")), np.asarray(random_image(8, 8)).ravel())


def test_a_row_has_the_images_of_its_conversations_and_loses_damaged_ones(tmp_path):
    for name, seed in (("a", 1), ("b", 2)):
        (tmp_path / f"{name}.png").write_bytes(png(random_image(8, 8, seed=seed)))
    (tmp_path / "c.png").write_bytes(b"damaged")

    def conversation(*names):
        images = tuple(ImageReference(f"{tmp_path}/{name}.png") for name in names)
        return EncodedConversation(np.arange(1, 5, dtype=np.int32), np.ones(4, bool), images)

    made = [conversation("a", "c"), conversation("b"), conversation()]
    rows = PackedConversations(made, 12, pack=True, seed=None, images=files(on_corrupt="skip"))
    example = rows[0]
    assert example["images"].shape == (3, 192)
    pixels = [np.asarray(random_image(8, 8, seed=seed)).ravel() for seed in (1, 2)]
    np.testing.assert_array_equal(example["images"], [pixels[0], np.zeros(192), pixels[1]])
    weights = [example["weights"][example["segments"] == segment].sum() for segment in (1, 2, 3)]
    assert weights == [0, 3, 3]
    with pytest.raises(UserError, match="is not an image"):
        _ = PackedConversations(made, 12, pack=True, seed=None, images=files())[0]
