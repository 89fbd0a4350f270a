"""Videos as frames: which are read, their times, references in conversations, and damaged files."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.conversations import read_conversations
from gptjax.data.images import videos
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import IMAGE, WHOLE_VIDEO, ImageReference
from gptjax.data.images.videos import frame_numbers, read_frames, with_frames

VISION = c.VisionConfig(encoder="patches", image_size=4, patch_size=2)
FILM, CAT = ImageReference("film.mkv", "a:1", WHOLE_VIDEO), ImageReference("cat.png", "a:1")


def test_frames_are_evenly_spaced_with_both_ends():
    assert frame_numbers(10, 4) == [0, 3, 6, 9]
    assert frame_numbers(10, 1) == [0]
    assert frame_numbers(2, 4) == [0, 0, 0, 1]
    assert frame_numbers(1, 3) == [0, 0, 0]


def test_a_video_is_replaced_by_its_frames():
    text, images = with_frames(f"{IMAGE}and{IMAGE}.", (CAT, FILM), 2)
    assert text == f"{IMAGE}and{IMAGE}{IMAGE}."
    assert images == (CAT, *(ImageReference("film.mkv", "a:1", (number, 2)) for number in range(2)))
    text, _ = with_frames(f"{IMAGE}?", (FILM,), 2, lambda video: [0.0, 1.25])
    assert text == f"0.0 s: {IMAGE}1.2 s: {IMAGE}?"
    assert with_frames(IMAGE, (CAT,), 2) == (IMAGE, (CAT,))
    assert with_frames("none", (FILM,), 2) == ("none", (FILM,))  # whose error the format raises


@pytest.mark.parametrize(
    "part",
    [
        {"type": "video_url", "video_url": {"url": "a.mp4"}},
        {"type": "video", "video": "a.mp4"},
        {"type": "video", "path": "a.mp4"},
    ],
)
def test_content_parts(part, tmp_path):
    user = {"role": "user", "content": [part, {"type": "text", "text": "q"}]}
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": [user, {"role": "assistant", "content": "a"}]}) + "\n")
    (item,) = read_conversations(f"jsonl:{path}")
    assert item.messages[0].content == f"{IMAGE}q"
    assert item.messages[0].images == (ImageReference("a.mp4", f"{path}:1: messages[0]", WHOLE_VIDEO),)


def test_fields_of_records(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"video": "a.mp4", "question": "q", "answer": "a"}) + "\n")
    (item,) = read_conversations(f"jsonl:{path}")
    assert item.messages[0].images == (ImageReference("a.mp4", f"{path}:1: video", WHOLE_VIDEO),)
    path.write_text(json.dumps({"video": "a.mp4", "image": "b.png", "question": "q", "answer": "a"}) + "\n")
    with pytest.raises(UserError, match=r"chats.jsonl:1 has image and video: keep one"):
        read_conversations(f"jsonl:{path}")


def test_without_the_package_the_error_says_how_to_install_it(monkeypatch):
    def missing(package, install, what):
        raise UserError(f"{what} needs the package {package}: {install}")

    monkeypatch.setattr(videos, "require_package", missing)
    with pytest.raises(UserError, match=r"^a video needs the package av: pip install 'gptjax\[video\]'$"):
        ImageFiles(VISION, c.DataConfig()).check([FILM])


# --- decoding, with PyAV ---


def write_video(path: Path, values, codec: str = "ffv1", pixels: str = "bgr0", size=(8, 6)) -> Path:
    """Writes four frames a second, each of one grey value, or given as arrays."""
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=4)
        stream.width, stream.height, stream.pix_fmt = *size, pixels
        for value in values:
            frame_YX3 = np.broadcast_to(value, (size[1], size[0], 3)).astype(np.uint8)
            for packet in stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame_YX3), format="rgb24")):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


def test_the_frames_and_their_times(tmp_path):
    path = write_video(tmp_path / "a.mkv", range(0, 200, 20))
    with path.open("rb") as file:
        found = read_frames(file, 4)
    assert [frame.getpixel((3, 3)) for frame in found.images] == [(value,) * 3 for value in (0, 60, 120, 180)]
    assert found.times == pytest.approx([0, 0.75, 1.5, 2.25])


def test_the_frames_of_an_interframe_codec(tmp_path):
    """Frames that are coded as differences are those that a decoder of the whole video finds."""
    av = pytest.importorskip("av")
    values = [40 + 15 * (number % 11) for number in range(40)]
    path = write_video(tmp_path / "a.mp4", values, "mpeg4", "yuv420p", (32, 32))
    with av.open(str(path)) as container:
        every = [frame.to_image() for frame in container.decode(video=0)]
    with path.open("rb") as file:
        found = read_frames(file, 7)
    for image, number in zip(found.images, frame_numbers(40, 7), strict=True):
        np.testing.assert_array_equal(np.asarray(image), np.asarray(every[number]))


def test_a_video_is_decoded_once_for_all_its_frames(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mkv", (10, 20, 30))
    files, calls = ImageFiles(VISION, c.DataConfig()), []
    read = videos.read_frames
    monkeypatch.setattr(videos, "read_frames", lambda *args: calls.append(args) or read(*args))
    found = [files.read(ImageReference(str(path), "", (number, 3))) for number in range(3)]
    assert [int(image_X[0]) for image_X in found] == [10, 20, 30]
    assert files.times(ImageReference(str(path), "", WHOLE_VIDEO), 3) == pytest.approx([0, 0.25, 0.5])
    assert len(calls) == 1


def test_the_frames_of_a_video_are_shifted_together(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (6, 8, 3))
    path = write_video(tmp_path / "a.mkv", [noise] * 6)
    files = ImageFiles(VISION, c.DataConfig(image_shift=0.5))
    frames = [ImageReference(str(path), "", (number, 6)) for number in range(6)]
    (shifted,) = {files.read(frame, (0, 2 + number)).tobytes() for number, frame in enumerate(frames)}
    assert shifted != files.read(frames[0]).tobytes()


def test_a_video_is_turned_as_its_metadata_say(tmp_path):
    """A phone writes an upright video lying on its side, with a matrix in the header of its track."""
    left = np.zeros((32, 64, 3), np.uint8)
    left[:, :32] = 200
    path = write_video(tmp_path / "a.mp4", [left], "mpeg4", "yuv420p", (64, 32))
    content = bytearray(path.read_bytes())
    matrix = content.index(b"tkhd") + 4 + 40
    turned = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # of ISO 14496-12, section 8.3.2
    content[matrix : matrix + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in turned)
    path.write_bytes(bytes(content))
    with path.open("rb") as file:
        (frame,) = read_frames(file, 1).images
    assert frame.size == (32, 64)
    grey = np.asarray(frame.convert("L"))
    assert grey[:24].mean() > 150  # the matrix turns by 90 degrees clockwise: left is above
    assert grey[40:].mean() < 50


def test_animated_images_are_videos(tmp_path):
    pytest.importorskip("av")
    frames = [Image.new("P", (8, 6), value) for value in (0, 1, 2)]
    for frame in frames:
        frame.putpalette([0, 0, 0, 100, 100, 100, 200, 200, 200])
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:], duration=500)
    with (tmp_path / "a.gif").open("rb") as file:
        found = read_frames(file, 2)
    assert [image.getpixel((0, 0))[0] for image in found.images] == pytest.approx([0, 200], abs=2)


def test_damaged_videos_are_refused_or_counted(tmp_path):
    path = write_video(tmp_path / "a.mkv", (10, 20, 30))
    content = path.read_bytes()
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n"
    for damaged in (content[:200], b"text", playlist):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"^a:1: the video .*a.mkv(: it has no | is damaged)"):
            ImageFiles(VISION, c.DataConfig()).read(ImageReference(str(path), "a:1", (0, 2)))
    files = ImageFiles(VISION, c.DataConfig(on_corrupt="skip"))
    assert files.read(ImageReference(str(path), "a:1", (0, 2))) is None
    assert files.skipped == 1
    with pytest.raises(UserError, match=r"there is no image .*gone.mkv"):
        ImageFiles(VISION, c.DataConfig()).check([ImageReference(str(tmp_path / "gone.mkv"), "", WHOLE_VIDEO)])


def test_too_large_frames_and_sound_alone(tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mkv", (10,))
    monkeypatch.setattr(videos, "MAX_PIXELS", 47)
    with path.open("rb") as file, pytest.raises(UserError, match="its frames have 8 x 6 pixels: too many to decode"):
        read_frames(file, 1)
    av = pytest.importorskip("av")
    sound = io.BytesIO()
    with av.open(sound, "w", format="matroska") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        frame.rate = 8000
        for packet in (*stream.encode(frame), *stream.encode()):
            container.mux(packet)
    sound.seek(0)
    with pytest.raises(UserError, match="it has no video"):
        read_frames(sound, 1)
