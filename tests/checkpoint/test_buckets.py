"""Runs whose workdir and caches are in a bucket, against an emulator of Google Cloud Storage on loopback."""

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gcsfs")

from gptjax.checkpoint import lock
from gptjax.checkpoint.lock import LOCK_FILE, locked
from gptjax.config import CheckpointConfig, Config, LoggingConfig, UserError
from gptjax.config.saved import to_json
from gptjax.data import preparation
from gptjax.data.sources import open_source
from gptjax.data.tokenizers import BytesTokenizer, get_tokenizer
from gptjax.files import expand, upload
from gptjax.run import run
from gptjax.training.metrics_file import read_metrics
from tests import commands
from tests.gcs_emulator import Emulator, emulated
from tests.tiny_runs import tiny_config

BUCKET = "test-bucket"
LIMIT = 1000  # seconds, in which what hangs is found out


@pytest.fixture(scope="module")
def bucket() -> Iterator[Emulator]:
    with emulated(BUCKET) as emulator:
        yield emulator


@pytest.fixture
def faults(bucket: Emulator) -> Iterator[Emulator]:
    """The bucket, which has no faults after the test."""
    yield bucket
    bucket.fault = lambda method, name: None


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    config = tiny_config(tmp_path_factory.mktemp("tiny"))
    return dataclasses.replace(
        config,
        checkpoint=CheckpointConfig(config.checkpoint.every_tokens, keep_last=3),
        logging=LoggingConfig(every_steps=1, tensorboard=True),
    )


@pytest.fixture(scope="module")
def local(config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workdir of the same run on a disk."""
    workdir = tmp_path_factory.mktemp("local") / "run"
    run(config, workdir)
    return workdir


@pytest.fixture(scope="module")
def workdir(bucket: Emulator, config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that was killed in the middle of saving step 4, and resumed by its workdir alone."""
    file = tmp_path_factory.mktemp("config") / "config.json"
    file.write_text(to_json(config))
    saving, killed = threading.Event(), threading.Event()

    def hold(method: str, name: str) -> int | None:
        if method != "POST" or "/checkpoints/4/params/" not in name:
            return None
        saving.set()
        killed.wait(LIMIT)
        return 503

    bucket.fault = hold
    process = commands.start_command("gptjax.main", f"--config={file}", f"--workdir=gs://{BUCKET}/runs/tiny")
    assert saving.wait(LIMIT), process.result(1).stderr
    process.close()
    killed.set()
    bucket.fault = lambda method, name: None
    assert LOCK_FILE in bucket.names(f"{BUCKET}/runs/tiny/")
    assert "checkpoints/4/commit_success.txt" not in bucket.names(f"{BUCKET}/runs/tiny/")
    resumed = commands.run_command("gptjax.main", f"--workdir=gs://{BUCKET}/runs/tiny")
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from step 2" in resumed.stdout + resumed.stderr
    return expand(f"gs://{BUCKET}/runs/tiny")


def records_of(workdir: Path) -> list[dict[str, Any]]:
    clocks = ("seconds", "tokens_per_second", "mfu")
    _, records = read_metrics(workdir)
    return [{name: value for name, value in record.items() if name not in clocks} for record in records]


def test_a_run_that_is_killed_and_resumed_has_the_records_of_a_local_one(workdir: Path, local: Path) -> None:
    assert records_of(workdir) == records_of(local)


def test_a_workdir_has_the_files_of_a_local_one(workdir: Path, local: Path, bucket: Emulator) -> None:
    def kept(names: list[str]) -> list[str]:
        return sorted(name for name in names if not name.startswith(("checkpoints/", "tensorboard/")))

    found = kept(bucket.names(f"{BUCKET}/runs/tiny/"))
    assert found == kept([str(path.relative_to(local)) for path in local.rglob("*") if path.is_file()])
    assert bucket.read(f"{BUCKET}/runs/tiny/loss.png").startswith(b"\x89PNG")
    *_, events = bucket.names(f"{BUCKET}/runs/tiny/tensorboard/")
    assert b"validation/loss" in bucket.read(f"{BUCKET}/runs/tiny/tensorboard/{events}")


def copied(bucket: Emulator, name: str) -> Path:
    for other in bucket.names(f"{BUCKET}/runs/tiny/"):
        bucket.write(f"{BUCKET}/runs/{name}/{other}", bucket.read(f"{BUCKET}/runs/tiny/{other}"))
    return expand(f"gs://{BUCKET}/runs/{name}")


def test_a_damaged_checkpoint_is_moved_away_and_the_one_before_is_used(
    workdir: Path, local: Path, config: Config, bucket: Emulator, capsys: pytest.CaptureFixture[str]
) -> None:
    place = copied(bucket, "damaged")
    newest = f"{BUCKET}/runs/damaged/checkpoints/6/"
    largest = max(bucket.names(newest), key=lambda name: len(bucket.read(newest + name)))
    content = bytearray(bucket.read(newest + largest))
    content[len(content) // 2] ^= 1
    bucket.write(newest + largest, bytes(content))
    run(config, place)
    assert "checkpoint 6 in gs://" in (said := capsys.readouterr().err)
    assert "is damaged" in said
    moved = bucket.names(f"{BUCKET}/runs/damaged/damaged/")
    assert {name.partition("/")[0] for name in moved} == {"6.0"}
    assert f"6.0/{largest}" in moved
    assert records_of(place) == records_of(local)


def test_a_workdir_is_copied_between_a_disk_and_a_bucket(
    workdir: Path, local: Path, config: Config, bucket: Emulator, tmp_path: Path
) -> None:
    upload(local, expand(f"gs://{BUCKET}/runs/uploaded"))
    for name in bucket.names(f"{BUCKET}/runs/tiny/"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(bucket.read(f"{BUCKET}/runs/tiny/{name}"))
    for place in (expand(f"gs://{BUCKET}/runs/uploaded"), tmp_path):
        assert run(config, place).step == 6
        assert sorted(path.name for path in (place / "checkpoints").iterdir()) == ["2", "4", "6"]
        assert records_of(place) == records_of(local)


def test_what_reads_a_workdir_reads_it_in_a_bucket(workdir: Path, local: Path, tmp_path: Path) -> None:
    def output(module: str, place: Path, *flags: str) -> str:
        result = commands.run_command(f"gptjax.{module}", f"--workdir={place}", *flags)
        assert result.returncode == 0, result.stderr
        return str(result.stdout)

    flags = ("--prompt=document 1", "--max_new_tokens=5", "--seed=1")
    assert output("generate", workdir, *flags) == output("generate", local, *flags)
    examples = tmp_path / "choices.jsonl"
    examples.write_text('{"context": "doc", "choices": ["ument", "tor"], "answer": 0}\n' * 3)
    output("evaluate", local, f"--tasks={examples}")
    output("evaluate", workdir, f"--tasks={examples}")
    reports = {path.name for path in (workdir / "evaluation").glob("*.json")}
    assert reports
    assert reports == {path.name for path in (local / "evaluation").glob("*.json")}
    output("convert", workdir, f"--to_hf={tmp_path / 'bucket'}")
    output("convert", local, f"--to_hf={tmp_path / 'local'}")
    name = "model.safetensors"
    assert (tmp_path / "bucket" / name).read_bytes() == (tmp_path / "local" / name).read_bytes()


# --- the lock ---------------------------------------------------------------------------------------------------------


def left_by(workdir: Path, **changes: object) -> None:
    (workdir / LOCK_FILE).write_text(json.dumps(lock._describe() | {"id": "other"} | changes))


def test_one_of_two_runs_gets_the_lock(bucket: Emulator) -> None:
    place = expand(f"gs://{BUCKET}/locked")
    with locked(place):
        with pytest.raises(UserError, match="is in use by another run"), locked(place):
            pass
        assert bucket.names(f"{BUCKET}/locked/") == [LOCK_FILE]
    assert bucket.names(f"{BUCKET}/locked/") == []


def test_of_many_that_find_a_stale_lock_one_gets_it(bucket: Emulator, capsys: pytest.CaptureFixture[str]) -> None:
    place, found, ended = expand(f"gs://{BUCKET}/stale"), list[str](), threading.Event()
    left_by(place, started="1")

    def take() -> None:
        try:
            with locked(place):
                found.append("held")
                ended.wait(LIMIT)
        except UserError:
            found.append("refused")
            if found.count("refused") == 3:
                ended.set()

    threads = [threading.Thread(target=take) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert sorted(found) == ["held", "refused", "refused", "refused"]


def test_heartbeats_of_another_machine_hold_the_lock(bucket: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT", 0.1)
    monkeypatch.setattr(lock, "DEAD", LIMIT)  # on a busy machine a heartbeat may be late
    place, ended = expand(f"gs://{BUCKET}/remote"), threading.Event()
    left_by(place, machine="another kernel", host="other")
    owner = json.loads((place / LOCK_FILE).read_text())
    beating = threading.Thread(target=lock._keep, args=(lock._ObjectLock(place / LOCK_FILE), owner, ended))
    beating.start()
    with pytest.raises(UserError, match="in use by another run"), locked(place):
        pass
    ended.set()
    beating.join()
    monkeypatch.setattr(lock, "DEAD", 0.5)
    with locked(place):  # no heartbeat any more
        pass


# --- faults -----------------------------------------------------------------------------------------------------------


def test_a_run_survives_bursts_of_refused_requests(
    workdir: Path, local: Path, config: Config, faults: Emulator
) -> None:
    """Also those of TensorStore, which reads and writes the arrays."""
    seen: set[tuple[str, str]] = set()

    def first_of_each(method: str, name: str) -> int | None:
        first = (method, name) not in seen and len(seen) % 8 == 0
        seen.add((method, name))
        return (429, 503)[len(seen) % 2] if first else None

    place = expand(f"gs://{BUCKET}/runs/bursts")
    faults.fault = first_of_each
    run(config, place)
    assert records_of(place) == records_of(local)


@pytest.mark.parametrize("part", ["", "/checkpoints/4/params/"])
def test_a_bucket_that_refuses_is_one_line(part: str, workdir: Path, config: Config, faults: Emulator) -> None:
    name = f"refused{len(part)}"
    faults.fault = lambda method, path: 403 if method == "POST" and f"runs/{name}{part}" in path else None
    place = expand(f"gs://{BUCKET}/runs/{name}")
    with pytest.raises(UserError, match=r"cannot (write|save) in .*gs://test-bucket/runs/refused") as caught:
        run(config, place)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    assert not [path for path in faults.names(f"{BUCKET}/runs/{name}/") if path.startswith("checkpoints/4/commit")]


def test_a_refused_read_is_one_line_and_changes_nothing(workdir: Path, config: Config, faults: Emulator) -> None:
    place = copied(faults, "unreadable")

    def content() -> dict[str, bytes]:
        start = f"{BUCKET}/runs/unreadable/"
        return {name: faults.read(start + name) for name in faults.names(start)}

    before = content()
    faults.fault = lambda method, name: 403 if method == "GET" and "/checkpoints/6/params/" in name else None
    with pytest.raises(UserError, match="cannot read checkpoint 6"):
        run(config, place)
    faults.fault = lambda method, name: None
    assert content() == before


def test_a_missing_bucket_is_one_line(bucket: Emulator, config: Config) -> None:
    with pytest.raises(UserError, match="there is no bucket no-such-bucket"):
        run(config, expand("gs://no-such-bucket/run"))


# --- the cache --------------------------------------------------------------------------------------------------------


def test_a_prepared_corpus_is_shared_through_a_bucket(
    bucket: Emulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another machine, which has another home directory, downloads it; a damaged one is prepared again."""
    (tmp_path / "corpus.jsonl").write_text("".join(json.dumps({"text": f"document {i}"}) + "\n" for i in range(40)))
    prepared, write = [], preparation._write_corpus
    monkeypatch.setattr(preparation, "_write_corpus", lambda *args: (prepared.append(args), write(*args))[1])

    def tokens(machine: str) -> list[int]:
        monkeypatch.setenv("HOME", str(tmp_path / machine))
        source = open_source(f"jsonl:{tmp_path / 'corpus.jsonl'}")
        train, _ = preparation.prepare(
            source, BytesTokenizer(), expand(f"gs://{BUCKET}/cache"), validation_fraction=0.1
        )
        return [token for document in range(5) for token in train.read(document, 0, 5).tolist()]

    first = tokens("one")
    assert tokens("two") == first
    assert len(prepared) == 1
    (shard,) = [name for name in bucket.names(f"{BUCKET}/") if name.startswith("cache/") and "train-" in name]
    bucket.write(f"{BUCKET}/{shard}", b"damaged")
    assert tokens("three") == first
    assert len(prepared) == 2
    assert "is damaged" in capsys.readouterr().err
    assert tokens("four") == first
    assert len(prepared) == 2


def test_a_trained_tokenizer_is_shared_through_a_bucket(bucket: Emulator) -> None:
    trained = []

    def documents() -> Iterator[str]:
        trained.append(1)
        return iter(["some words and some more words"] * 20)

    for _ in range(2):
        tokenizer = get_tokenizer(
            "bpe:300",
            train_documents=documents,
            corpus_fingerprint="x",
            cache_dir=expand(f"gs://{BUCKET}/tokenizers"),
        )
        assert tokenizer.decode(tokenizer.encode("some words")) == "some words"
    assert trained == [1]
