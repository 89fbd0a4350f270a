"""Text in every encoding and compression, as sources read it."""

import bz2
import codecs
import gzip
import hashlib
import json
import lzma

import pytest
import zstandard

from gptjax.config import UserError
from gptjax.data.sources import open_source


def read(spec: str, **options) -> list[str]:
    return list(open_source(spec, **options).documents())


ENCODINGS = ("utf-8", "utf-8-sig", "utf-16", "utf-32")  # Python writes a mark for the last three


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_byte_order_marks_are_dropped_and_tell_the_encoding(tmp_path, encoding):
    text = "===\nnaïve\r\n===\n\u2028zwei\ufeff 🙂\n" * 20_000
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode(encoding))
    assert read(f"text:{path}") == [text]
    assert read(f"text:{path}", document_separator="===")[:2] == ["naïve\r\n", "\u2028zwei\ufeff 🙂\n"]
    lines = tmp_path / "a.jsonl"
    lines.write_bytes('{"text": "ä"}\r\n\r\n{"text": "\u2028b"}\r\n'.encode(encoding))
    assert read(f"jsonl:{lines}") == ["ä", "\u2028b"]


def test_utf16_of_either_byte_order_and_what_is_not_utf16(tmp_path):
    path = tmp_path / "a.txt"
    for encoding, mark in [("utf-16-le", codecs.BOM_UTF16_LE), ("utf-16-be", codecs.BOM_UTF16_BE)]:
        path.write_bytes(mark + "ä🙂".encode(encoding))
        assert read(f"text:{path}") == ["ä🙂"]
        path.write_bytes(mark + "ab".encode(encoding) + b"c")
        with pytest.raises(UserError, match=rf"{path} begins as UTF-16, but is invalid at byte 6: convert it$"):
            read(f"text:{path}")


def test_the_place_of_an_invalid_byte_counts_the_mark(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(codecs.BOM_UTF8 + b'{"text": "good"}\n{"text": "\xff"}')
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not UTF-8 at byte 30"):
        read(f"jsonl:{tmp_path}/a.jsonl", invalid_utf8="error")
    (tmp_path / "a.txt").write_bytes(codecs.BOM_UTF8 + b"ab\xff")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 at byte 5"):
        read(f"text:{tmp_path}/a.txt", invalid_utf8="error")


@pytest.mark.parametrize(
    ("suffix", "compress"),
    [
        (".GZ", gzip.compress),
        (".Zst", zstandard.compress),
        (".bz2", bz2.compress),
        (".xz", lzma.compress),
    ],
)
def test_every_compression_is_known_in_any_case(tmp_path, suffix, compress):
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(compress("täle".encode("utf-8-sig")))
    source = open_source(f"text:{path}")
    assert list(source.documents()) == ["täle"]
    assert source.size_bytes is None
    path.write_bytes(path.read_bytes()[:-6])
    with pytest.raises(UserError, match=rf"cannot read {path}: ."):
        read(f"text:{path}")


@pytest.mark.parametrize("name", ["a.zip", "a.tar.gz", "a.TGZ"])
def test_archives_are_refused_by_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"anything")
    with pytest.raises(UserError, match=rf"{name} is a \.\w+ file, which is not supported: unpack it"):
        open_source(f"text:{tmp_path}/{name}")


def test_a_zstd_window_over_the_limit_is_refused_by_its_size(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(window_log=28, enable_ldm=True, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    (tmp_path / "a.zst").write_bytes(compressor.compress(b"text") + compressor.flush())
    with pytest.raises(UserError, match=r"a\.zst: its zstd window is larger than the limit of 128 MiB: compress"):
        read(f"text:{tmp_path}/a.zst")


def test_the_fingerprint_tells_what_older_versions_read_otherwise(tmp_path):
    """They took these files for plain UTF-8: what they prepared must not pass for what is read now."""
    for name, raw in [("a.txt", codecs.BOM_UTF8 + b"a"), ("a.bz2", bz2.compress(b"a")), ("plain", b"a")]:
        path = tmp_path / name
        path.write_bytes(raw)
        of_bytes = [["text", None], [name], [hashlib.sha256(raw).hexdigest()]]
        old = hashlib.sha256(json.dumps([of_bytes, "replace"]).encode()).hexdigest()
        assert (open_source(f"text:{path}").fingerprint() == old) == (name == "plain")
