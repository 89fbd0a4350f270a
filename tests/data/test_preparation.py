"""Preparation: round trips, held-out documents, and a cache that is either complete or absent."""

import errno
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter

import gptjax
from gptjax.config import UserError
from gptjax.data import preparation, prepared_directories
from gptjax.data.preparation import PreparedSplit, prepare, split_documents
from gptjax.data.prepared_directories import writing
from gptjax.data.sources import Source, open_source
from gptjax.data.tokenizers import BytesTokenizer, Tokenizer

DOCUMENTS = [f"document {i}: " + "words and words. " * (i % 7) for i in range(40)]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in DOCUMENTS))
    return open_source(f"jsonl:{path}")


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces that cut documents and shards that cut splits."""
    monkeypatch.setattr(preparation, "PIECE_TOKENS", 32)
    monkeypatch.setattr(preparation, "SHARD_BYTES", 512)
    monkeypatch.setattr(preparation, "BATCH_CHARACTERS", 100)


class WideTokenizer(BytesTokenizer):
    """Ids that do not fit into 16 bits."""

    vocab_size = 100_000
    end_of_text = 99_999

    def encode(self, text: str) -> np.ndarray:
        return super().encode(text) + 70_000


class FailingTokenizer(BytesTokenizer):
    """Fails at one document, in the middle of the corpus."""

    def encode(self, text: str) -> np.ndarray:
        if text == DOCUMENTS[30]:
            raise KeyboardInterrupt
        return super().encode(text)


def texts(split: PreparedSplit) -> list[str]:
    tokens = [split.read(i, 0, int(length)) for i, length in enumerate(split.lengths)]
    assert all(document[-1] == split.end_of_text for document in tokens)
    return [bytes(document[:-1].tolist()).decode() for document in tokens]


def corpora(cache: Path) -> list[str]:
    """The files in the cache except locks."""
    return sorted(path.name for path in (cache / "corpora").iterdir() if path.suffix != ".lock")


# --- content ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("small_files")
def test_documents_come_back_whole_and_held_out_ones_apart(source: Source, tmp_path: Path) -> None:
    train, validation = prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.25)
    assert texts(validation) == DOCUMENTS[3::4]
    assert texts(train) == [document for i, document in enumerate(DOCUMENTS) if i % 4 != 3]
    for split in (train, validation):
        text = "".join(texts(split))
        assert (split.num_documents, split.text_bytes) == (len(split.lengths), len(text))
        assert split.num_tokens == len(text) + split.num_documents
    assert len(list(tmp_path.glob("corpora/*/train-*.array_record"))) > 2


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize(("tokenizer", "dtype"), [(BytesTokenizer(), np.uint16), (WideTokenizer(), np.uint32)])
def test_part_of_a_document(source: Source, tmp_path: Path, tokenizer: Tokenizer, dtype: type) -> None:
    train, _ = prepare(source, tokenizer, tmp_path, validation_fraction=0.0)
    expected = np.append(tokenizer.encode(DOCUMENTS[6]), tokenizer.end_of_text)
    for start, stop in [(0, 1), (30, 34), (5, 100), (len(expected) - 1, len(expected))]:
        part = train.read(6, start, stop)
        assert part.dtype == dtype
        np.testing.assert_array_equal(part, expected[start:stop])


def test_bytes_are_those_of_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("größer 语言", encoding="utf-8")
    train, _ = prepare(open_source(f"text:{tmp_path}/a.txt"), BytesTokenizer(), tmp_path, validation_fraction=0.0)
    assert train.text_bytes == len("größer 语言".encode()) == train.num_tokens - 1


def test_replaced_bytes_are_reported_and_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.txt").write_bytes(b"good \xff\xfe bad")
    prepare(open_source(f"text:{tmp_path}/a.txt"), BytesTokenizer(), tmp_path, validation_fraction=0.0)
    assert "2 bytes in 1 documents are not valid UTF-8" in caplog.text
    metadata = json.loads(next(tmp_path.glob("corpora/*/metadata.json")).read_text())
    assert (metadata["replaced_bytes"], metadata["replaced_documents"]) == (2, 1)


# --- which documents are held out -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"),
    [
        (12, 0.25, [3, 7, 11]),
        (10, 0.25, [3, 7]),
        (4, 0.25, [3]),
        (5, 0.9, [1, 3]),  # never more than every second one
        (3, 0.01, [2]),
        (2, 0.01, [1]),
        (3, 0.0, []),
        (3, 1.0, [0, 1, 2]),
    ],
)
def test_held_out_documents(count: int, fraction: float, held_out: list[int]) -> None:
    split = list(split_documents(map(str, range(count)), fraction))
    assert [document for _, document in split] == [str(i) for i in range(count)]
    assert [int(document) for name, document in split if name == "validation"] == held_out


def test_tail_of_a_single_document_is_held_out(caplog: pytest.LogCaptureFixture) -> None:
    document = "one two three four five six seven eight nine ten"
    (train_name, train), (validation_name, validation) = split_documents([document], 0.2)
    assert (train_name, validation_name) == ("train", "validation")
    assert train + validation == document
    assert validation == "eight nine ten"
    assert "a single document" in caplog.text
    unbroken = dict(split_documents(["x" * 100], 0.1))
    assert len(unbroken["validation"]) == 10


# --- the cache --------------------------------------------------------------------------------------------------------


def test_second_run_only_reads(source: Source, tmp_path: Path) -> None:
    first, _ = prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.25)
    (lock,) = tmp_path.glob("corpora/*.lock")
    lock.unlink()
    again, _ = prepare(source, FailingTokenizer(), tmp_path, validation_fraction=0.25)
    assert texts(first) == texts(again)
    assert not lock.exists()  # so the cache may be one that this user cannot write


def test_all_that_decides_the_content_names_the_cache(source: Source, tmp_path: Path) -> None:
    (tmp_path / "other.txt").write_text("other")
    for chosen, fraction in [(source, 0.25), (source, 0.5), (open_source(f"text:{tmp_path}/other.txt"), 0.25)]:
        prepare(chosen, BytesTokenizer(), tmp_path, validation_fraction=fraction)
    assert len(corpora(tmp_path)) == 3


def test_interruption_leaves_nothing(source: Source, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        prepare(source, FailingTokenizer(), tmp_path, validation_fraction=0.0)
    assert corpora(tmp_path) == []
    train, _ = prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
    assert texts(train) == DOCUMENTS


@pytest.mark.parametrize("damage", ["truncate", "delete", "metadata"])
def test_damaged_cache_is_prepared_again(
    source: Source, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: str
) -> None:
    prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
    (shard,) = tmp_path.glob("corpora/*/train-00000.array_record")
    if damage == "truncate":
        shard.write_bytes(shard.read_bytes()[:-1])
    elif damage == "delete":
        shard.unlink()
    else:
        (shard.parent / "metadata.json").write_text('{"splits": ')
    train, _ = prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
    assert texts(train) == DOCUMENTS
    assert "damaged" in caplog.text


@pytest.mark.usefixtures("small_files")
def test_records_lost_in_silence_are_noticed(source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class LossyWriter(ArrayRecordWriter):
        def write(self, record: bytes) -> None:
            if b"3" not in record:
                super().write(record)

    monkeypatch.setattr(preparation, "ArrayRecordWriter", LossyWriter)
    with pytest.raises(UserError, match="cannot be read back"):
        prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
    assert corpora(tmp_path) == []


def test_changed_byte_is_noticed_when_read(source: Source, tmp_path: Path) -> None:
    prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
    (shard,) = tmp_path.glob("corpora/*/train-00000.array_record")
    content = bytearray(shard.read_bytes())
    content[len(content) // 50] ^= 1  # early: the end of so small a file is filled up with zeros
    shard.write_bytes(content)
    train, _ = prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
    with pytest.raises(UserError, match="damaged, delete"):
        texts(train)


# --- several processes, and those that die ----------------------------------------------------------------------------

CHILD = """
import os, resource, signal, sys, time
from pathlib import Path
from gptjax.config import UserError
from gptjax.data.preparation import prepare
from gptjax.data.sources import open_source
from gptjax.data.tokenizers import BytesTokenizer

spec, cache, mode = sys.argv[1], Path(sys.argv[2]), sys.argv[3]

class Tokenizer(BytesTokenizer):
    def encode(self, text):
        if mode == "killed" and text.startswith("document 30:"):
            os.kill(os.getpid(), signal.SIGKILL)
        if mode == "slow" and text.startswith("document 0:"):
            print("tokenises")
            time.sleep(1)
        return super().encode(text)

if mode == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
try:
    prepare(open_source(spec), Tokenizer(), cache, validation_fraction=0.0)
    print("prepared")
except UserError as error:
    print(f"UserError: {error}")
"""


def start(source: Source, cache: Path, mode: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, source.spec, str(cache), mode]
    root = Path(gptjax.__file__).parents[1]
    return subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_process_leaves_nothing_that_looks_whole(source: Source, tmp_path: Path) -> None:
    process = start(source, tmp_path, "killed")
    process.communicate()
    assert process.returncode == -9
    (left,) = corpora(tmp_path)
    assert left.endswith(".partial")
    prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.5)  # another corpus clears up, too
    assert len(corpora(tmp_path)) == 1
    assert left not in corpora(tmp_path)
    train, _ = prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
    assert texts(train) == DOCUMENTS


@pytest.mark.slow
def test_of_two_processes_one_tokenises(source: Source, tmp_path: Path) -> None:
    outputs = [process.communicate()[0].split() for process in [start(source, tmp_path, "slow") for _ in range(2)]]
    assert sorted(outputs) == [["prepared"], ["tokenises", "prepared"]]
    assert len(corpora(tmp_path)) == 1
    train, _ = prepare(source, FailingTokenizer(), tmp_path, validation_fraction=0.0)
    assert texts(train) == DOCUMENTS


class NestedTokenizer(BytesTokenizer):
    """Calls a function once, in the middle of the corpus."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.call: Callable[[], object] | None = call

    def encode(self, text: str) -> np.ndarray:
        if text == DOCUMENTS[30] and self.call is not None:
            call, self.call = self.call, None
            call()
        return super().encode(text)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_a_file_system_without_locks(source, tmp_path, monkeypatch, error):
    def flock(*_: object) -> None:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(prepared_directories.fcntl, "flock", flock)
    (tmp_path / "corpora").mkdir()
    (left := tmp_path / "corpora" / f"{'0' * 24}.{prepared_directories._machine()}-0.partial").mkdir()

    def prepare_too() -> None:
        train, _ = prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
        assert texts(train) == DOCUMENTS

    train, _ = prepare(source, NestedTokenizer(prepare_too), tmp_path, validation_fraction=0.0)
    assert texts(train) == DOCUMENTS
    assert left.exists()  # without a lock it is not known whether somebody writes into it


def test_a_lock_that_does_not_reach_another_machine(source, tmp_path, monkeypatch):
    """Both machines tokenise; neither removes what the other writes."""
    monkeypatch.setattr(prepared_directories.fcntl, "flock", lambda *_: None)

    def prepare_elsewhere() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(prepared_directories, "_machine", lambda: "elsewhere")
            train, _ = prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
        assert texts(train) == DOCUMENTS

    train, _ = prepare(source, NestedTokenizer(prepare_elsewhere), tmp_path, validation_fraction=0.0)
    assert texts(train) == DOCUMENTS
    assert len(corpora(tmp_path)) == 1


def test_what_another_machine_left_is_removed_after_a_day(source, tmp_path):
    (tmp_path / "corpora").mkdir()
    old, new = (tmp_path / "corpora" / f"{'0' * 24}.elsewhere-{name}.partial" for name in ("old", "new"))
    for partial in (old, new):
        partial.mkdir()
    os.utime(old, (time.time() - 2 * prepared_directories.STALE,) * 2)
    prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
    assert (old.exists(), new.exists()) == (False, True)


@pytest.mark.parametrize("change", ["append", "replace", "same size"])
def test_a_source_that_changes_after_its_digest_is_not_cached(source, tmp_path, change):
    path = tmp_path / "corpus.jsonl"
    content = path.read_bytes()
    changed = {
        "append": content + b'{"text": "more"}\n',
        "replace": b'{"text": "another"}\n',
        "same size": content.replace(b"document 1:", b"document X:"),
    }
    source.fingerprint()
    path.write_bytes(changed[change])
    with pytest.raises(UserError, match=r"corpus.jsonl was changed while it was read: run the same command again"):
        prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
    assert corpora(tmp_path) == []


def test_a_source_that_is_only_touched_is_cached(source, tmp_path):
    source.fingerprint()
    os.utime(tmp_path / "corpus.jsonl", (0, 0))
    train, _ = prepare(source, BytesTokenizer(), tmp_path, validation_fraction=0.0)
    assert texts(train) == DOCUMENTS


def test_full_disk_is_a_user_error(source: Source, tmp_path: Path) -> None:
    output, _ = start(source, tmp_path, "full").communicate()
    assert output.startswith("UserError: cannot write ")
    assert "data.cache_dir" in output
    assert output.count("\n") == 1
    assert corpora(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (OSError(errno.ENOSPC, "No space left"), "free some space there or set data.cache_dir"),
        (OSError(errno.ENOENT, "there is no bucket b"), "b: set data.cache_dir to another directory"),
    ],
)
def test_a_failed_write_names_its_fix(error: OSError, fix: str) -> None:
    with pytest.raises(UserError, match=f"cannot write .*{fix}"), writing(Path("b")):
        raise error
