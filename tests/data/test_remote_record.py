"""The versions of remote files that a run was started with, and what a resume makes of changed ones."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest

from gptjax.config import Config, UserError, replace
from gptjax.data.remote_record import RECORD_FILE, record_file, remote_versions
from gptjax.run import run
from tests.file_servers import FileServer

PACKAGES = {"web": "aiohttp", "s3": "s3fs", "gs": "gcsfs"}


@pytest.fixture(params=PACKAGES)
def base(request: pytest.FixtureRequest, file_server: FileServer) -> str:
    """The URL of a folder with two text files and one of tokens, by each protocol."""
    pytest.importorskip(PACKAGES[request.param])
    file_server.files = {"b/a.txt": b"first", "b/c.txt": b"second", "b/t.bin": b"\x01\x00"}
    return {"web": f"{file_server.url}/web/b", "s3": "s3://b", "gs": "gs://b"}[request.param]


def recorded(config: Config, workdir: Path) -> None:
    for name, text in record_file(remote_versions(config, workdir, may_change=False)).items():
        (workdir / name).write_text(text)


def of(source: str, **more: object) -> Config:
    return replace(Config(), {"data": {"source": source, **more}})


def test_all_remote_sources_of_a_config_are_recorded(base: str, tmp_path: Path) -> None:
    config = of(f"text:{base}/*.txt", validation_source=f"tokens:{base}/t.bin@uint16")
    config = replace(config, {"chat": {"pretraining_source": f"jsonl:{base}/a.txt#body"}})
    config = dataclasses.replace(config, init_from="gs://b/a.txt")  # no source
    recorded(config, tmp_path)
    found = json.loads((tmp_path / RECORD_FILE).read_text())
    assert {spec: sorted(files) for spec, files in found.items()} == {
        f"text:{base}/*.txt": [f"{base}/a.txt", f"{base}/c.txt"],
        f"tokens:{base}/t.bin@uint16": [f"{base}/t.bin"],
        f"jsonl:{base}/a.txt#body": [f"{base}/a.txt"],
    }
    assert re.match(r"5 bytes, (ETag|md5Hash) ", found[f"text:{base}/*.txt"][f"{base}/a.txt"])
    assert remote_versions(config, tmp_path, may_change=False) == found
    assert record_file(remote_versions(of("text:a.txt"), tmp_path, may_change=False)) == {}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"b/a.txt": b"other"}, r"BASE/a\.txt has changed, from 5 bytes, .* to 5 bytes, .*, since the run in"),
        ({"b/b.txt": b"other"}, r"BASE/b\.txt is a new file, since the run in"),
        ({"b/c.txt": None}, r"there is no longer the file BASE/c\.txt, since the run in"),
        ({"b/a.txt": None, "b/c.txt": None}, r"no file matches 'BASE/\*\.txt', since the run in"),
    ],
)
def test_changed_files_are_named(
    base: str, file_server: FileServer, tmp_path: Path, files: dict[str, bytes | None], message: str
) -> None:
    config = of(f"text:{base}/*.txt")
    recorded(config, tmp_path)
    for name, content in files.items():
        file_server.files.pop(name, None)
        if content is not None:
            file_server.files[name] = content
    with pytest.raises(UserError, match=message.replace("BASE", re.escape(base))) as error:
        remote_versions(config, tmp_path, may_change=False)
    assert "\n" not in str(error.value)
    if "b/c.txt" in file_server.files:
        remote_versions(config, tmp_path, may_change=True)


def test_a_file_that_vanished_is_named(base: str, file_server: FileServer, tmp_path: Path) -> None:
    config = of(f"text:{base}/a.txt")
    recorded(config, tmp_path)
    del file_server.files["b/a.txt"]
    with pytest.raises(UserError, match=r"a\.txt: there is no such file.*, since the run in .* was started"):
        remote_versions(config, tmp_path, may_change=False)
    # A server that refuses is no change of the data.
    file_server.refused = {"/b"}
    with pytest.raises(UserError, match="access was refused") as error:
        remote_versions(config, tmp_path, may_change=False)
    assert "was started" not in str(error.value)


def test_a_damaged_record_is_one_line(tmp_path: Path) -> None:
    for content in ("{", "[]", '{"a": 1}'):
        (tmp_path / RECORD_FILE).write_text(content)
        with pytest.raises(UserError, match=rf"{RECORD_FILE} is damaged: .*; remove it"):
            remote_versions(of("text:a.txt"), tmp_path, may_change=False)


def test_a_run_resumes_with_unchanged_files_only(
    trained: tuple[Config, Path], file_server: FileServer, tmp_path: Path
) -> None:
    pytest.importorskip("aiohttp")
    config, workdir = trained
    file_server.files = {"b/a.txt": b"A file on a server, of a few sentences. " * 100}
    url = f"{file_server.url}/web/b/a.txt"
    config = replace(config, {"data": {"source": f"text:{url}"}})
    run(config, workdir, allow_config_changes=True)
    assert list(json.loads((workdir / RECORD_FILE).read_text())) == [f"text:{url}"]
    run(config, workdir)
    file_server.files["b/a.txt"] += b" One more sentence."
    before = (workdir / RECORD_FILE).read_bytes()
    with pytest.raises(UserError, match=r"a\.txt has changed, from .* since the run"):
        run(config, workdir)
    assert (workdir / RECORD_FILE).read_bytes() == before
    run(config, workdir, allow_config_changes=True)
    assert (workdir / RECORD_FILE).read_bytes() != before
    # Without checkpoints there is nothing to resume, and the data are taken as they are.
    shutil.rmtree(workdir / "checkpoints")
    file_server.files["b/a.txt"] += b" And another."
    run(config, workdir, start_over=True)
    assert (workdir / "earlier/0" / RECORD_FILE).exists()
