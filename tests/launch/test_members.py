"""The members of a sweep: their names, flags and configs; sweeps that are refused."""

import json
from pathlib import Path

import pytest

from gptjax.config import UserError, load_config, to_json, with_absolute_paths
from gptjax.launch.members import claim, make_members, member_names, read_space, read_sweep

GPT2 = "configs/gpt2.py:runlocal"


def members(tmp_path, *overrides, given=None):
    return make_members(GPT2, given or {}, overrides, tmp_path / "sweep")


def config_file(tmp_path: Path, body: str) -> str:
    path = tmp_path / "own.py"
    path.write_text(f"from gptjax import config as c\n\ndef get_config():\n    return c.Config()\n\n{body}\n")
    return str(path)


def test_a_config_file_of_the_repository_defines_sweeps():
    found = read_sweep(GPT2, ["lr", "seed"])
    assert len(found) == len(read_sweep(GPT2, ["lr"])) * len(read_sweep(GPT2, ["seed"]))
    assert list(found[0]) == ["optimizer.peak_lr", "seed"]
    assert "optimizer.peak_lr" in read_space(GPT2, "")


def test_the_flags_of_a_member_give_its_config(tmp_path):
    overrides = [
        {"optimizer.peak_lr": 0.1 + 0.2, "seed": 1},
        {"optimizer.clip_norm": None, "logging.tensorboard": False},
        {"model.attention_pattern": ("dense", "banded"), "data.source": "text:/a b/*.txt"},
        {"optimizer.peak_lr": "3e-4", "optimizer.decay_rules": [(".*", 0.5)]},
        {"config": "configs/gpt2.py:size=355m,runlocal"},
    ]
    for member in members(tmp_path, *overrides, given={"batch.total_tokens": "1e5"}):
        values = dict(flag.removeprefix("--").split("=", 1) for flag in member.flags)
        path = values.pop("config")
        config = load_config(path, {key.removeprefix("config."): value for key, value in values.items()})
        assert with_absolute_paths(config) == member.config
        assert member.config.batch.total_tokens == 100_000
        assert member.workdir == tmp_path / "sweep" / member.name


def test_names_are_short_unique_and_plain():
    assert member_names([{"optimizer.peak_lr": 1e-3, "seed": 0}, {}]) == ["peak_lr=0.001-seed=0", "default"]
    # Two keys of the same last part; values that differ only in what a name cannot have; a long value.
    assert member_names([{"evaluation.every_tokens": 1, "checkpoint.every_tokens": 2}]) == [
        "evaluation.every_tokens=1-checkpoint.every_tokens=2"
    ]
    names = member_names([{"data.source": "text:/a/b"}, {"data.source": "text:/a:b"}, {"data.source": "x" * 300}])
    assert len(set(names)) == 3
    assert all(len(name) <= 150 and not set(name) & set("/: *,") for name in names)
    assert names[:2] == member_names([{"data.source": "text:/a/b"}, {"data.source": "text:/a:b"}])


@pytest.mark.parametrize(
    ("overrides", "given", "words"),
    [
        ([{"optimizer.peak_l": 1}], {}, "run peak_l=1 of the sweep: unknown config key 'optimizer.peak_l': did you"),
        ([{"optimizer.peak_lr": "high"}], {}, "optimizer.peak_lr='high'"),
        ([{"model.num_heads": 5}], {}, "run num_heads=5 of the sweep: model.num_heads=5 does not divide"),
        ([{"seed": 0}, {"seed": 0}], {}, "the runs seed=0 and seed=0 of the sweep have the same config"),
        ([{}, {"seed": 0}], {}, "the runs default and seed=0 of the sweep have the same config"),
        ([{"seed": 0}], {"seed": "1"}, "the sweep sets seed, and so does --config.seed=1"),
    ],
)
def test_bad_members_are_refused(overrides, given, words, tmp_path):
    with pytest.raises(UserError, match=words):
        members(tmp_path, *overrides, given=given)


@pytest.mark.parametrize(
    ("body", "names", "words"),
    [
        ("", [], r"defines no sweep\(\): write one"),
        ("def sweep_lr(): return []", [], r"defines no sweep\(\): did you mean 'sweep_lr'"),
        ("def sweep_lr(): return []", ["lr"], r"sweep_lr\(\) is empty"),
        ("def sweep_lr(): yield 3", ["lr"], r"sweep_lr\(\) yields 3"),
        ("def sweep_lr(): yield {3: 4}", ["lr"], r"sweep_lr\(\) yields {3: 4}"),
        ("def sweep_lr(): yield 1 / 0", ["lr"], r"own.py:6: ZeroDivisionError"),
    ],
)
def test_a_bad_sweep_function_is_one_line(body, names, words, tmp_path):
    with pytest.raises(UserError, match=words):
        read_sweep(config_file(tmp_path, body), names)


def test_a_search_space_has_distributions(tmp_path):
    with pytest.raises(UserError, match=r"search_lr\(\) returns {'seed': 3}: return distributions"):
        read_space(config_file(tmp_path, "def search_lr(): return {'seed': 3}"), "lr")


def test_a_saved_config_has_no_sweep(tmp_path):
    (tmp_path / "config.json").write_text(to_json(load_config(GPT2)))
    with pytest.raises(UserError, match=r"saved config: a sweep needs the config file that defines sweep\(\)"):
        read_sweep(str(tmp_path), [])


def test_a_directory_holds_one_sweep(tmp_path):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    one, two = members(tmp_path, {"seed": 0}), members(tmp_path, {"seed": 0}, {"seed": 1})
    claim(workdir, one)
    claim(workdir, two)  # more runs
    with pytest.raises(UserError, match="holds another sweep, with the run seed=1"):
        claim(workdir, one)
    with pytest.raises(UserError, match="holds another sweep"):
        claim(workdir, two, {"sampler": "tpe"})
    one[0].workdir.mkdir()
    (one[0].workdir / "config.json").write_text(to_json(members(tmp_path, {"seed": 2})[0].config))
    with pytest.raises(UserError, match=r"run seed=0 has another config \(seed: 2 -> 0\)"):
        claim(workdir, two)
    assert list(json.loads((workdir / "sweep.json").read_text())["members"]) == ["seed=0", "seed=1"]


def test_a_directory_of_something_else_is_refused(tmp_path):
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    (workdir / "config.json").write_text("{}")
    with pytest.raises(UserError, match="something other than a sweep"):
        claim(workdir, members(tmp_path, {"seed": 0}))
    (workdir / "sweep.json").write_text('{"members": {"../other": {}}}')
    with pytest.raises(UserError, match=r"'../other' is not the name of a run"):
        claim(workdir, members(tmp_path, {"seed": 0}))
