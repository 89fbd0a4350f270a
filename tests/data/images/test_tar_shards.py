"""Image-text pairs in tar files: their records, images read in any order, and damaged members and shards."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data.conversations import read_conversations
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import ImageReference
from gptjax.data.images.tar_shards import parse_source, read_shards
from gptjax.data.records import read_records

VISION = c.VisionConfig(encoder="patches", image_size=2, patch_size=1)


def png(value: int) -> bytes:
    content = io.BytesIO()
    Image.new("RGB", (3, 2), (value,) * 3).save(content, "PNG")
    return content.getvalue()


def write_tar(path: Path, members: dict[str, bytes], **settings) -> Path:
    with tarfile.open(path, "w", **settings) as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def records(path: Path, **settings) -> list:
    return [record for record, _ in read_shards([path], **settings)]


def value_of(source: str) -> int:
    image_X = ImageFiles(VISION, c.DataConfig()).read(ImageReference(source))
    assert image_X is not None
    return int(image_X[0])


def question(text: str) -> bytes:
    return json.dumps({"question": text, "answer": "a", "image": "elsewhere.png"}).encode()


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_members_of_one_key_are_a_sample_and_images_are_read_in_any_order(form, tmp_path):
    long = "folder/" * 20  # names of more than 100 characters have headers of their own
    members = {
        "./0.png": png(10),
        "1.png": png(20),
        "0.txt": b"ten",
        "1.json": question("what?"),
        "2.a.png": png(30),
        "2.b.png": png(40),
        "2.json": json.dumps({"question": "<image> or <image>?", "answer": "b"}).encode(),
        "notes.cls": b"7",
        f"{long}3.webp": png(50),
        f"{long}3.txt": "fünfzig".encode(),
    }
    shard = write_tar(tmp_path / "a.tar", members, format=form)
    found = list(read_records(f"webdataset:{tmp_path}/*.tar", "error"))
    assert [place for _, place in found] == [f"{shard}: {key}" for key in ("0", "1", "2", f"{long}3")]
    zero, one, two, three = (record for record, _ in found)
    assert zero.keys() == {"images", "caption"}
    assert (zero["caption"], three["caption"]) == ("ten", "fünfzig")
    assert (one["question"], one["answer"]) == ("what?", "a")
    sources = [source for record in (three, two, one, zero) for source in record["images"]]
    assert [value_of(source) for source in sources] == [50, 30, 40, 20, 10]


def test_shards_are_conversations_in_the_order_of_their_names(tmp_path):
    for name, value in (("b", 2), ("a", 1)):
        write_tar(tmp_path / f"{name}.tar", {f"{name}.png": png(value), f"{name}.txt": name.encode()})
    found = read_conversations(f"webdataset:{tmp_path}/*.tar")
    assert [item.messages[1].content for item in found] == ["a", "b"]
    assert [value_of(item.messages[0].images[0].source) for item in found] == [1, 2]
    assert [item.messages[0].content for item in found] == ["<image>"] * 2


def test_a_caption_does_not_replace_a_conversation(tmp_path):
    members = {"0.png": png(1), "0.json": question("q"), "0.txt": b"caption"}
    assert "caption" not in records(write_tar(tmp_path / "a.tar", members))[0]
    members["0.json"] = json.dumps({"caption": "of json", "width": 3}).encode()
    assert records(write_tar(tmp_path / "b.tar", members))[0]["caption"] == "caption"
    members["0.json"] = json.dumps({"text": "of json"}).encode()
    assert records(write_tar(tmp_path / "c.tar", members))[0].keys() == {"caption", "images"}


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.json": b"{", "0.png": png(1)}, r"a.tar: 0: 0.json is damaged"),
        ({"0.json": b"[]", "0.png": png(1)}, r"a.tar: 0: 0.json is not a JSON object"),
        ({"0.txt": b"\xff\xfe\xfa", "0.png": png(1)}, r"a.tar: 0: 0.txt is damaged: it is not UTF-8"),
    ],
)
def test_damaged_texts_are_refused_or_skipped_and_counted(members, message, tmp_path, caplog):
    shard = write_tar(tmp_path / "a.tar", members | {"1.png": png(2), "1.txt": b"one"})
    with pytest.raises(UserError, match=message):
        records(shard)
    caplog.clear()
    assert [record["caption"] for record in records(shard, skip_damaged=True)] == ["one"]
    assert "skipped 1 damaged samples" in caplog.text


def test_a_cut_shard_is_refused_or_read_as_far_as_it_goes(tmp_path, caplog):
    whole = write_tar(tmp_path / "a.tar", {"0.png": png(1), "0.txt": b"zero", "1.txt": b"one", "1.png": png(2) * 9})
    first_byte = parse_source(records(whole)[1]["images"][0]).first_byte
    content = whole.read_bytes()
    for cut in (first_byte + 100, first_byte - 100):
        whole.write_bytes(content[:cut])
        with pytest.raises(UserError, match=r"a\.tar is damaged"):
            records(whole)
        assert [record["caption"] for record in records(whole, skip_damaged=True)] == ["zero"]
    whole.write_bytes(content[: first_byte + 100])
    with pytest.raises(UserError, match=r"a\.tar is damaged: it ends within 1\.png"):
        records(whole)
    changed = bytearray(content)
    changed[first_byte - 500] ^= 0xFF  # within the header of the last member
    whole.write_bytes(bytes(changed))
    with pytest.raises(UserError, match=rf"a\.tar is damaged: no header of a file is at byte {first_byte - 512}"):
        records(whole)
    whole.write_bytes(content[: first_byte + 512 * (len(png(2) * 9) // 512 + 1)])  # without the zeros at the end
    assert len(records(whole)) == 2


def test_a_damaged_image_is_refused_or_counted(tmp_path):
    source = records(write_tar(tmp_path / "a.tar", {"0.png": b"\x89PNG", "0.txt": b"a"}))[0]["images"][0]
    image = ImageReference(source, "a.tar: 0")
    with pytest.raises(UserError, match=r"^a\.tar: 0: tar:.* is not an image"):
        ImageFiles(VISION, c.DataConfig()).read(image)
    files = ImageFiles(VISION, c.DataConfig(on_corrupt="skip"))
    assert files.read(image) is None
    assert files.skipped == 1


def test_the_fingerprint_is_that_of_the_content(tmp_path):
    files, prints = ImageFiles(VISION, c.DataConfig()), []
    for value in (1, 2, 1):
        source = records(write_tar(tmp_path / "a.tar", {"0.png": png(value), "0.txt": b"a"}))[0]["images"][0]
        prints.append(files.fingerprint(ImageReference(source)))
    assert prints[0] == prints[2] != prints[1]


def test_user_errors(tmp_path):
    with tarfile.open(tmp_path / "a.tar.gz", "w:gz") as tar:
        tar.add(write_tar(tmp_path / "whole.tar", {"0.txt": b"a"}))
    with pytest.raises(UserError, match=r"a\.tar\.gz is compressed"):
        records(tmp_path / "a.tar.gz")
    (tmp_path / "text.tar").write_text("no tar file" * 100)
    with pytest.raises(UserError, match=r"text\.tar is damaged"):
        records(tmp_path / "text.tar")
    with pytest.raises(UserError, match="no file matches"):
        read_conversations(f"webdataset:{tmp_path}/none*.tar")
    with pytest.raises(UserError, match=r"other\.tar has no conversations"):
        read_conversations(f"webdataset:{write_tar(tmp_path / 'other.tar', {'0.cls': b'a'})}")
    with pytest.raises(UserError, match=r"other\.tar: 0 has neither messages nor conversations"):
        read_conversations(f"webdataset:{write_tar(tmp_path / 'other.tar', {'0.png': png(1)})}")
    remote = ImageReference("tar:https://example.com/a.tar#512+10", "here")
    with pytest.raises(UserError, match=r"here: the image tar:https://example.com/a.tar#512\+10 is remote"):
        ImageFiles(VISION, c.DataConfig()).check([remote])


def test_the_same_conversations_from_a_shard_and_from_files(tmp_path):
    """One record in both forms has the same pixels and texts."""
    (tmp_path / "0.png").write_bytes(png(9))
    (tmp_path / "all.jsonl").write_text(json.dumps({"image": "0.png", "question": "q", "answer": "a"}) + "\n")
    shard = write_tar(tmp_path / "a.tar", {"0.png": png(9), "0.json": question("q")})
    (given,), (packed,) = read_conversations(f"jsonl:{tmp_path}/all.jsonl"), read_conversations(f"webdataset:{shard}")
    assert [m.content for m in given.messages] == [m.content for m in packed.messages]
    files = ImageFiles(VISION, c.DataConfig())
    np.testing.assert_array_equal(*(files.read(item.messages[0].images[0]) for item in (given, packed)))
