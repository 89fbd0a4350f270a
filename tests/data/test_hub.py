"""Datasets on the Hugging Face Hub, from a server on loopback: splits, fixed revisions, exact resume, errors."""

import io
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptjax.config import Config, UserError, read_config, replace
from gptjax.data import hub
from gptjax.data.conversations import read_conversations
from gptjax.data.labelled import read_rows
from gptjax.data.sources import open_source
from gptjax.run import run
from gptjax.training.metrics_file import read_metrics
from tests.file_servers import FileServer

FIRST, SECOND, CONVERTED = "1" * 40, "2" * 40, "c" * 40


def table(*texts: str, **columns: list[Any]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts} if texts else columns), file)
    return file.getvalue()


def read(spec: str) -> list[str]:
    return list(open_source(spec).documents())


@pytest.fixture
def server(file_server: FileServer) -> FileServer:
    """A dataset with two splits, and one without Parquet files, which the Hub has converted."""
    file_server.revisions["o/plain"] = {
        FIRST: {
            ".gitattributes": b"",
            "data/train-00000-of-00002.parquet": table("one", "two"),
            "data/train-00001-of-00002.parquet": table("three"),
            "data/test-00000-of-00001.parquet": table("held out"),
        }
    }
    converted = {
        ".gitattributes": b"",
        "en/train/0000.parquet": table("English"),
        "en/test/0000.parquet": table("English test"),
        "fr/partial-train/0000.parquet": table("French"),
    }
    file_server.revisions["o/json"] = {CONVERTED: converted, FIRST: {"a.json": b"{}"}}
    file_server.branches["o/json"] = {"refs/convert/parquet": CONVERTED}
    return file_server


def test_splits_and_configurations(server: FileServer) -> None:
    assert read("hf:o/plain") == ["one", "two", "three"]
    assert read(f"hf:o/plain@:test?revision={FIRST}#text") == ["held out"]
    assert read("hf:o/json@en:") == ["English"]
    assert read("hf:o/json@en:test") == ["English test"]
    assert read("hf:o/json@fr:train") == ["French"]


def test_files_are_those_that_the_readme_declares(server: FileServer) -> None:
    readme = b"""---
configs:
- config_name: small
  default: true
  data_files:
  - {split: train, path: "raw/s-*.parquet"}
  - {split: dev, path: ["raw/d.parquet"]}
- {config_name: deep, data_files: "raw/**/*.parquet"}
---
"""
    names = ("raw/s-1.parquet", "raw/s-2.parquet", "raw/d.parquet", "raw/s-/x.parquet")
    files = {".gitattributes": b"", "README.md": readme, **{name: table(name) for name in names}}
    server.revisions["o/declared"] = {FIRST: files}
    assert read("hf:o/declared") == ["raw/s-1.parquet", "raw/s-2.parquet"]
    assert read("hf:o/declared@:dev") == ["raw/d.parquet"]
    assert sorted(read("hf:o/declared@deep:train")) == sorted(names)
    with pytest.raises(UserError, match=r"o/declared has no configuration 'x': choose one with .*: small, deep"):
        read("hf:o/declared@x:train")


def test_labelled_rows_and_conversations(server: FileServer) -> None:
    chats = [[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]]
    server.revisions["o/rows"] = {
        FIRST: {
            ".gitattributes": b"",
            "train.parquet": table(text=["Good.", "Bad."], label=["yes", "no"]),
            "test.parquet": table(messages=chats, system=[None]),
        }
    }
    assert [row.fields["label"] for row in read_rows("hf:o/rows", "classification")] == ["yes", "no"]
    (conversation,) = read_conversations("hf:o/rows@:test")
    assert [message.content for message in conversation.messages] == ["Hi", "Hello"]
    assert conversation.place.startswith("row 0 of ")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("hf:plain", "malformed source 'hf:plain': write hf:OWNER/NAME"),
        ("hf:o/plain?revision=main", "malformed source .*where COMMIT has 40 hex digits"),
        ("hf:o/none", "the Hub has no dataset o/none, or it is private: check the name, or set HF_TOKEN"),
        ("hf:o/plain@:dev", r"o/plain has no split 'dev': choose one with @CONFIG:SPLIT: test, train"),
        ("hf:o/plain@en:train", "o/plain has no configuration 'en': write @:train"),
        ("hf:o/json", "o/json has several configurations: choose one with @CONFIG:SPLIT: en, fr"),
        ("hf:o/text", "o/text has no Parquet files, and the Hub has made none"),
        (f"hf:o/plain?revision={SECOND}", f"the Hub no longer has the revision {SECOND} of o/plain: choose another"),
        ("hf:o/plain#body", r"train-00000-of-00002\.parquet has no column 'body': choose one with #FIELD: text"),
    ],
)
def test_bad_input_is_one_line(server: FileServer, spec: str, message: str) -> None:
    server.revisions["o/text"] = {FIRST: {"a.txt": b"text"}}
    with pytest.raises(UserError, match=message) as error:
        read(spec)
    assert "\n" not in str(error.value)


def test_a_hub_that_refuses(server: FileServer) -> None:
    server.refused = {"o/plain"}
    with pytest.raises(UserError, match=r"cannot read o/plain from the Hugging Face Hub: 403 .*set HF_TOKEN"):
        read("hf:o/plain")


def test_downloaded_files_are_read_without_the_hub(server: FileServer) -> None:
    spec = f"hf:o/plain?revision={FIRST}"
    documents = read(spec)
    server.refused = {"o/plain"}
    assert read(spec) == documents


def test_a_download_resumes_after_a_failed_connection(server: FileServer) -> None:
    texts = [f"{i} " * 1000 for i in range(300)]
    server.revisions["o/large"] = {FIRST: {".gitattributes": b"", "train.parquet": table(*texts)}}
    server.cut = ["train.parquet"]
    assert read("hf:o/large") == texts
    assert server.cut == []


def test_commits_are_named_once_and_kept(server: FileServer) -> None:
    specs = ["hf:o/plain#text", "hf:o/plain@:test", f"hf:o/json@en:train?revision={CONVERTED}"]
    config = Config()
    config = replace(config, {"data": {"source": specs[0], "validation_source": specs[1]}})
    config = replace(config, {"chat": {"pretraining_source": specs[2]}})
    assert hub.without_revision(config) == specs[:2]
    found = hub.revisions(specs[:2], None)
    assert found == {specs[0]: f"hf:o/plain?revision={FIRST}#text", specs[1]: f"hf:o/plain@:test?revision={FIRST}"}
    saved = hub.with_revisions(config, found)
    assert (saved.data.source, saved.chat.pretraining_source) == (found[specs[0]], specs[2])
    server.revisions["o/plain"][SECOND] = {}
    assert hub.revisions(specs[:2], saved) == found


@pytest.mark.slow
def test_a_run_resumes_on_the_revision_that_it_was_started_with(
    server: FileServer, original: tuple[Config, Path], tmp_path: Path
) -> None:
    def commit(word: str) -> dict[str, bytes]:
        texts = [f"{word} {i} says: " + f"{i} and {i + 1} are neighbours. " * 8 for i in range(40)]
        return {".gitattributes": b"", "train.parquet": table(*texts)}

    class Killed(Exception):
        pass

    def kill(record: dict[str, Any]) -> None:
        if record["step"] == 5:
            raise Killed

    server.revisions["o/run"] = {FIRST: commit("document")}
    changes = {"data": {"source": "hf:o/run", "cache_dir": str(tmp_path / "cache")}}
    config = replace(original[0], changes)
    run(config, tmp_path / "whole")
    with pytest.raises(Killed):
        run(config, tmp_path / "run", callbacks=[kill])
    server.revisions["o/run"][SECOND] = commit("other")
    shutil.rmtree(tmp_path / "cache/corpora")  # so that the data are read again
    run(config, tmp_path / "run")
    assert read_config(tmp_path / "run").data.source == f"hf:o/run?revision={FIRST}"

    def losses(workdir: Path) -> list[tuple[Any, ...]]:
        return sorted({(r["step"], r["split"], r["loss"]) for r in read_metrics(workdir)[1] if "loss" in r})

    assert losses(tmp_path / "run") == losses(tmp_path / "whole")
    # Once the corpus is prepared, the Hub is not needed.
    server.refused = {"o/run"}
    run(config, tmp_path / "run")
