"""Files on web servers, in buckets and on the Hub, from a server on loopback; what is refused, cut off or changed."""

import gzip
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptjax.bucket_client import client
from gptjax.config import DataConfig, UserError
from gptjax.corpus.executors import Executor
from gptjax.corpus.recipe import Recipe
from gptjax.corpus.run_preparation import prepare_corpus
from gptjax.data import preparation, remote_files
from gptjax.data.labelled import read_rows
from gptjax.data.pipeline import open_corpus
from gptjax.data.preparation import prepare
from gptjax.data.prepared_corpora import PreparedCorpus
from gptjax.data.sources import open_source
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.files import expand
from tests.file_servers import FileServer

PACKAGES = {"web": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}


def read(spec: str) -> list[str]:
    return list(open_source(spec).documents())


def parquet(*texts: str) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts}), file)
    return file.getvalue()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small blocks, and short pauses before another attempt."""
    monkeypatch.setattr(remote_files, "_BLOCK_BYTES", 2**16)
    monkeypatch.setattr(remote_files, "_FIRST_PAUSE", 1e-3)


@pytest.fixture(params=PACKAGES)
def base(request: pytest.FixtureRequest, file_server: FileServer) -> str:
    """The URL of a folder with files of each kind, by each protocol."""
    pytest.importorskip(PACKAGES[request.param])
    file_server.files = {
        "b/a.txt": b"first",
        "b/deep/c.txt.gz": gzip.compress(b"second"),
        "b/x.jsonl": b'{"body": "j1"}\n{"body": "j2"}\n',
        "b/p.parquet": parquet("p1", "p2"),
        "b/t.bin": np.array([256, 104, 105, 256, 33], "<u2").tobytes(),
        "b/rows.csv": b"text,label\nGood.,yes\nBad.,no\n",
        "b/odd.bin": b"\0\0\0",
        "b/cut.parquet": parquet("p1")[:-9],
    }
    return {"web": f"{file_server.url}/web/b", "s3": "s3://b", "gs": "gs://b"}[request.param]


def test_every_kind_of_file(base: str) -> None:
    assert read(f"text:{base}/a.txt") == ["first"]
    assert read(f"text:{base}/**/*.txt*") == ["first", "second"]
    assert read(f"jsonl:{base}/*.jsonl#body") == ["j1", "j2"]
    assert read(f"parquet:{base}/p.parquet#text") == ["p1", "p2"]
    tokens = open_source(f"tokens:{base}/t.bin@uint16").documents_for(BytesTokenizer())
    assert [ids.tolist() for ids in tokens if not isinstance(ids, str)] == [[104, 105], [33]]
    rows = read_rows(f"csv:{base}/rows.csv", "classification")
    assert [(row.fields["text"], row.fields["label"]) for row in rows] == [("Good.", "yes"), ("Bad.", "no")]
    assert rows[0].place == f"{base}/rows.csv:2"


def test_the_fingerprint_changes_with_the_content_and_reads_no_file(base: str, file_server: FileServer) -> None:
    first = open_source(f"text:{base}/*.txt").fingerprint()
    gets = [target for method, target in file_server.requests if method == "GET" and "a.txt" in target]
    assert [target for target in gets if "alt=media" in target or "/storage/v1/" not in target] == []
    assert open_source(f"text:{base}/*.txt").fingerprint() == first
    file_server.files["b/a.txt"] = b"other"
    assert open_source(f"text:{base}/*.txt").fingerprint() != first


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("text:BASE/none.txt", "cannot read BASE/none.txt: there is no such file"),
        ("text:BASEles/a.txt", "cannot read BASEles/a.txt: there is no such file"),  # no such bucket
        ("text:BASE/*.none", "no file matches 'BASE/*.none'"),
        ("parquet:BASE/p.parquet#body", "BASE/p.parquet has no column 'body': choose one with #FIELD: text"),
        ("parquet:BASE/cut.parquet", "cannot read BASE/cut.parquet: it is not a whole Parquet file: "),
        ("text:BASE/p.parquet", "BASE/p.parquet is a .parquet file, not text: write parquet:BASE/p.parquet"),
        ("tokens:BASE/odd.bin@uint16", "BASE/odd.bin does not have a whole number of tokens of uint16"),
        ("text:ftp://b/a.txt", "unknown protocol of ftp://b/a.txt: known are gs://, s3://"),
    ],
)
def test_bad_input_is_one_line(base: str, spec: str, message: str) -> None:
    with pytest.raises(UserError) as error:
        read(spec.replace("BASE", base))
    assert str(error.value).startswith(message.replace("BASE", base))
    assert "\n" not in str(error.value)


def test_a_server_that_refuses_is_named_with_what_gives_access(base: str, file_server: FileServer) -> None:
    file_server.refused = {"/b"}
    fix = {"http": "a URL that needs no login", "s3:/": "AWS_ACCESS_KEY_ID", "gs:/": "GOOGLE_APPLICATION_CREDENTIALS"}
    for spec in (f"text:{base}/a.txt", f"text:{base}/*.txt"):
        with pytest.raises(UserError, match="access was refused") as error:
            read(spec)
        assert fix[base[:4]] in str(error.value)
        assert base in str(error.value)
        assert "\n" not in str(error.value)


def test_missing_credentials_are_named(base: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not base.startswith("s3:"):
        pytest.skip("only S3 needs credentials before it asks the server")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    with pytest.raises(UserError, match=r"s3://b/a.txt: .*redentials.*AWS_ACCESS_KEY_ID"):
        read(f"text:{base}/a.txt")


def test_an_unknown_profile_is_named(file_server: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    with pytest.raises(UserError, match=r"s3://b/a.txt: .*profile \(nobody\) could not be found.*or AWS_PROFILE"):
        read("text:s3://b/a.txt")


@pytest.mark.parametrize(("content", "message"), [(None, "No such file"), ("{", "is no JSON"), ("[]", "is no JSON")])
@pytest.mark.parametrize("url", ["text:gs://b/a.txt", "gs://b/run"])
def test_a_file_of_credentials_is_checked(
    url: str, content: str | None, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """gcsfs would ask without credentials."""
    pytest.importorskip("gcsfs")
    monkeypatch.delenv("STORAGE_EMULATOR_HOST", raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "key.json"))
    client.cache_clear()
    if content is not None:
        (tmp_path / "key.json").write_text(content)
    with pytest.raises(UserError, match=rf"GOOGLE_APPLICATION_CREDENTIALS=.*/key.json\b.*{message}"):
        read(url) if url.startswith("text:") else expand(url)


def test_prepared_corpora_are_on_disks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("gcsfs")
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"prepared:gs://b/a is in a bucket: copy it to a disk"):
        PreparedCorpus("prepared:gs://b/a")
    with pytest.raises(UserError, match=r"--output=gs://b/a is in a bucket: name a directory"):
        prepare_corpus(Recipe("sotu", "bytes"), expand("gs://b/a"), tmp_path, Executor())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(remote_files._PROTOCOLS, "s3", ("no_such_package", ""))
    with pytest.raises(UserError, match=r"s3://b/a.txt needs the package no_such_package: pip install -e '\.\[remote"):
        read("text:s3://b/a.txt")


def test_reading_resumes_after_failed_connections(base: str, file_server: FileServer, quick: None) -> None:
    content = "".join(chr(97 + i % 26) for i in range(400_000))
    file_server.files["b/big.txt"] = content.encode()
    file_server.cut = ["big.txt"] * 2
    assert read(f"text:{base}/big.txt") == [content]
    assert file_server.cut == []


def test_a_web_server_that_sends_no_parts(file_server: FileServer, quick: None) -> None:
    pytest.importorskip("aiohttp")
    file_server.has_ranges = False
    content = "abc" * 100_000
    file_server.files = {"b/a.txt": content.encode(), "b/p.parquet": parquet("p1")}
    file_server.cut = ["a.txt"]
    assert read(f"text:{file_server.url}/web/b/a.txt") == [content]
    with pytest.raises(UserError, match=r"p\.parquet: its server does not send parts of files: download it"):
        read(f"parquet:{file_server.url}/web/b/p.parquet")


def test_a_failed_preparation_leaves_nothing_and_another_attempt_succeeds(
    base: str, file_server: FileServer, tmp_path: Path
) -> None:
    whole = gzip.compress(b"many words " * 20_000)
    file_server.files |= {"b/s/0.txt.gz": whole, "b/s/1.txt.gz": whole, "b/s/2.txt.gz": whole[:-20]}

    def prepared() -> list[int]:
        splits = prepare(open_source(f"text:{base}/s/*"), BytesTokenizer(), tmp_path, validation_fraction=0.1)
        return [split.num_tokens for split in splits]

    with pytest.raises(UserError, match=r"cannot read .*s/2\.txt\.gz"):
        prepared()
    assert [path.suffix for path in (tmp_path / "corpora").iterdir()] == [".lock"]
    file_server.files["b/s/2.txt.gz"] = whole
    assert prepared() == [440_002, 220_001]


def test_every_kind_of_file_gives_the_same_batches_after_an_interrupted_preparation(
    base: str, file_server: FileServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"document {i} says: naïve " * 3 + "\n" for i in range(30)]
    local = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "a.jsonl").write_text(local)
    ids = np.concatenate([[*BytesTokenizer().encode(text).tolist(), 256] for text in texts])
    file_server.files |= {
        "b/all/a.jsonl": local.encode(),
        "b/all/a.txt": "---\n".join(texts).encode(),
        "b/all/a.parquet": parquet(*texts),
        "b/all/a.bin": ids.astype("<u2").tobytes(),
    }

    def examples(source: str, cache: str) -> list[np.ndarray]:
        data = DataConfig(
            source=source,
            validation_fraction=0.1,
            tokenizer="bytes",
            cache_dir=str(tmp_path / cache),
            document_separator="---",
        )
        corpus = open_corpus(data, context_length=32, seed=3)
        return [split[i]["tokens"] for split in (corpus.train, corpus.validation) for i in range(6)]

    def interrupted(*arguments: Any, **options: Any) -> None:
        raise KeyboardInterrupt

    wanted = examples(f"jsonl:{tmp_path}/a.jsonl", "local")
    for spec in ("jsonl:BASE/a.jsonl", "text:BASE/a.txt", "parquet:BASE/a.parquet", "tokens:BASE/a.bin@uint16"):
        source = spec.replace("BASE", f"{base}/all")
        with monkeypatch.context() as patch:
            patch.setattr(preparation, "publish", interrupted)
            with pytest.raises(KeyboardInterrupt):
                examples(source, source[:4])
        np.testing.assert_array_equal(examples(source, source[:4]), wanted)


def test_a_file_that_changes_while_it_is_read(base: str, file_server: FileServer) -> None:
    source = open_source(f"text:{base}/a.txt")
    source.fingerprint()
    documents = source.documents()
    next(documents)
    file_server.files["b/a.txt"] = b"other"
    with pytest.raises(UserError, match=r"a\.txt was changed while it was read"):
        next(documents)


def test_files_on_the_hub(file_server: FileServer) -> None:
    file_server.revisions["o/n"] = {"a" * 40: {"data/a.txt": b"one", "data/b.parquet": parquet("two")}}
    assert read("text:hf://datasets/o/n/data/*.txt") == ["one"]
    assert read("parquet:hf://datasets/o/n/data/b.parquet") == ["two"]
    with pytest.raises(UserError, match=r"o/none/a.txt: there is no such file or dataset, .*set HF_TOKEN"):
        read("text:hf://datasets/o/none/a.txt")


def test_an_unreachable_bucket_is_one_line(
    file_server: FileServer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    gcsfs_retry = pytest.importorskip("gcsfs.retry")
    monkeypatch.setattr(gcsfs_retry.asyncio, "sleep", _no_pause)
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot read gs://b/a.txt: .*Cannot connect to host 127.0.0.1:9"):
        read("text:gs://b/a.txt")
    assert caplog.text == ""


async def _no_pause(seconds: float) -> None:
    pass
