"""Paths in buckets, and the files that are written there, against an emulator on loopback."""

import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("gcsfs")

from gptjax import bucket_client, object_store
from gptjax.bucket_client import BucketError
from gptjax.config import UserError
from gptjax.files import (
    append_to,
    expand,
    read_arrays,
    read_json,
    remove_tree,
    write_arrays,
    write_whole,
    written_locally,
)
from tests.gcs_emulator import Emulator, emulated


@pytest.fixture(scope="module")
def bucket() -> Iterator[Emulator]:
    with emulated("test-bucket") as emulator:
        yield emulator


@pytest.fixture
def place(bucket: Emulator, request: pytest.FixtureRequest) -> Iterator[Path]:
    yield expand(f"gs://test-bucket/{request.node.name}")
    bucket.fault = lambda method, name: None


def test_paths_are_read_and_listed_as_on_a_disk(place: Path) -> None:
    write_whole(place / "a.json", '{"b": 1}')
    (place / "sub").mkdir()
    (place / "sub" / "c.txt").write_text("text\n")
    assert read_json(place / "a.json") == {"b": 1}
    assert [place.is_dir(), (place / "a.json").is_file(), (place / "no").exists()] == [True, True, False]
    assert sorted(path.name for path in place.iterdir()) == ["a.json", "sub"]
    assert [str(path) for path in (place / "sub").glob("*.txt")] == [f"{place}/sub/c.txt"]
    assert (place / "sub").parent == place
    assert f"{place / 'sub'}".startswith("gs://test-bucket/")
    with (place / "sub" / "c.txt").open() as file:
        assert list(file) == ["text\n"]
    with pytest.raises(FileNotFoundError):
        (place / "no").read_bytes()
    remove_tree(place)
    assert not place.exists()


def test_a_write_that_fails_leaves_the_object_unchanged(place: Path) -> None:
    write_whole(place / "a", "old")

    def write_half() -> None:
        with (place / "a").open("w") as file:
            file.write("ne")
            raise KeyError

    with pytest.raises(KeyError):
        write_half()
    assert (place / "a").read_text() == "old"
    with (place / "a").open("w") as file:
        file.write("new")
    assert (place / "a").read_text() == "new"


def test_marks_of_completeness_are_moved_last(place: Path, bucket: Emulator) -> None:
    for name in ("1/commit_success.txt", "1/params/commit_success.txt", "1/params/x", "1/a"):
        (place / name).write_text(name)
    bucket.requests.clear()
    (place / "1").rename(place / "2")
    written = [name.rpartition(f"{place.name}/2/")[2] for method, name in bucket.requests if "rewriteTo" in name]
    assert sorted(written[:2]) == ["a", "params/x"]
    assert written[2:] == ["params/commit_success.txt", "commit_success.txt"]
    removed = [name.rpartition(f"{place.name}/1/")[2] for method, name in bucket.requests if method == "DELETE"]
    assert removed[0] == "commit_success.txt"
    assert len(removed) == 4
    assert not (place / "1").exists()


def test_conditional_writes_need_the_generation(place: Path) -> None:
    one = object_store.BucketPath(place) / "lock"
    generation = one.create(b"a")
    assert generation is not None
    assert one.create(b"b") is None
    assert one.overwrite(b"c", generation + 100) is None
    assert one.read_generation() == (b"a", generation)
    following = one.overwrite(b"c", generation)
    assert one.read_generation() == (b"c", following)
    one.unlink_generation(generation)
    assert one.exists()
    one.unlink_generation(following or 0)
    assert one.read_generation() == (b"", 0)


def test_arrays_and_directories_of_libraries_are_stored(place: Path) -> None:
    write_arrays(place / "a.npz", {"x": np.arange(3)})
    assert read_arrays(place / "a.npz")["x"].tolist() == [0, 1, 2]
    with written_locally(place / "profile") as directory:
        (directory / "plugins").mkdir()
        (directory / "plugins" / "trace").write_text("trace")
    assert (place / "profile" / "plugins" / "trace").read_text() == "trace"


def test_what_is_appended_is_uploaded_in_time_and_at_the_end(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = append_to(place / "log")
    file.write("1\n")
    assert not (place / "log").exists()
    file.sync()
    assert (place / "log").read_text() == "1\n"
    monkeypatch.setattr(object_store, "UPLOAD_SECONDS", 0.0)
    file.write("2\n")
    assert isinstance(file, object_store.AppendedObject)
    assert file._pending is not None
    file._pending.result()
    assert (place / "log").read_text() == "1\n2\n"
    monkeypatch.setattr(object_store, "UPLOAD_SECONDS", 60.0)
    file.write("3\n")
    file.close()
    with_more = append_to(place / "log")
    with_more.write("4\n")
    with_more.close()
    assert (place / "log").read_text() == "1\n2\n3\n4\n"


def test_an_upload_in_the_background_that_fails_is_repeated(
    place: Path, bucket: Emulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(object_store, "UPLOAD_SECONDS", 0.0)
    file = append_to(place / "log")
    bucket.fault = lambda method, name: 403 if method == "POST" else None
    file.write("1\n")
    with pytest.raises(BucketError, match="refuses access"):
        file.sync()
    bucket.fault = lambda method, name: None
    file.close()
    assert (place / "log").read_text() == "1\n"


@pytest.mark.parametrize("status", [403, 401])
def test_a_failed_request_is_not_a_missing_object(status: int, place: Path, bucket: Emulator) -> None:
    write_whole(place / "a", "x")
    bucket.fault = lambda method, name: status
    questions = (place.exists, place.is_dir, (place / "a").is_file, (place / "a").read_bytes)
    for ask in (*questions, lambda: list(place.iterdir())):
        with pytest.raises(BucketError) as caught:
            ask()
        assert "\n" not in str(caught.value)
        assert (caught.value.strerror or "").startswith(("the bucket", "no valid"))


def test_refusals_for_the_moment_are_repeated(place: Path, bucket: Emulator) -> None:
    statuses = iter([429, 503])
    bucket.fault = lambda method, name: next(statuses, None)
    write_whole(place / "a", "x")
    assert bucket.read(f"test-bucket/{place.name}/a") == b"x"
    assert list(statuses) == []


def test_simultaneous_users_share_the_client(place: Path) -> None:
    def write(number: int) -> None:
        (place / str(number)).write_text(str(number))

    threads = [threading.Thread(target=write, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path.name for path in place.iterdir()) == [str(number) for number in range(8)]


@pytest.mark.parametrize(
    ("url", "why"),
    [("s3://bucket/run", "s3:// is not supported"), ("az://b", "az:// is not supported"), ("gs://", "names no bucket")],
)
def test_other_stores_are_refused_in_one_line(url: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        expand(url)


def test_without_gcsfs_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    bucket_client.client.cache_clear()
    monkeypatch.setitem(sys.modules, "gcsfs.core", None)
    with pytest.raises(UserError, match=r"pip install 'gptjax\[remote\]'"):
        expand("gs://bucket/run")
    bucket_client.client.cache_clear()
