"""Glob patterns and the files that they match."""

import glob
import os

import pytest

from gptjax.config import UserError
from gptjax.data.file_patterns import expand_pattern, matching_files
from gptjax.data.sources import open_source


def read(spec: str) -> list[str]:
    return list(open_source(spec).documents())


def test_a_hash_in_a_path_is_not_a_field(tmp_path):
    (tmp_path / "c#").mkdir()
    (tmp_path / "c#/a#1.jsonl").write_text('{"text": "no", "body": "yes"}')
    for spec, text in [("c#/a#1.jsonl", "no"), ("c#/*.jsonl", "no"), ("c#/a#*.jsonl#body", "yes")]:
        assert read(f"jsonl:{tmp_path}/{spec}") == [text]
    with pytest.raises(UserError, match=r"no file matches '.*c'$"):
        read(f"jsonl:{tmp_path}/c#/none.jsonl")


def test_a_name_with_brackets_is_literal_where_it_exists(tmp_path):
    for folder in ("run[1]", "run1"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a[2].txt").write_text(folder)
    assert read(f"text:{tmp_path}/run[1]/a[2].txt") == ["run[1]"]
    assert read(f"text:{tmp_path}/run[1]/*.txt") == ["run[1]"]
    assert read(f"text:{tmp_path}/run[[]1]/*.txt") == ["run[1]"]
    assert read(f"text:{tmp_path}/run[12]/*.txt") == ["run1"]
    assert read(f"text:{tmp_path}/*/a[[]2].txt") == ["run1", "run[1]"]


def test_two_stars_read_each_folder_once(tmp_path):
    (tmp_path / "b/c").mkdir(parents=True)
    (tmp_path / "b/c/x.txt").write_text("x")
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden/y.txt").write_text("y")
    for name in ("b/again", "b/c/too"):
        (tmp_path / name).symlink_to(tmp_path)
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "self").symlink_to("self")
    assert matching_files(f"{tmp_path}/**/*.txt") == [tmp_path / "b/c/x.txt"]
    assert matching_files(f"{tmp_path}/**/c/**/*.txt") == [tmp_path / "b/c/x.txt"]
    outside = tmp_path / "only"
    outside.mkdir()
    (outside / "link").symlink_to(tmp_path / "b/c")
    assert matching_files(f"{outside}/**/x.txt") == [outside / "link/x.txt"]


def test_patterns_match_as_those_of_glob(tmp_path, monkeypatch):
    for name in ("a.txt", "b.txt.gz", "deep/er/c.txt.zst", "deep/empty.txt", "other.csv"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    patterns = ("**/*.txt*", "deep/**/*.zst", "**", "*/**", "a.txt", "./*.txt", "**/er/*", f"{tmp_path}/**/[ab].*")
    for pattern in patterns:
        ours = {path for path in expand_pattern(pattern) if not os.path.isdir(path)}
        assert ours == {path for path in glob.glob(pattern, recursive=True) if not os.path.isdir(path)}
