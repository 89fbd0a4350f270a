"""Documentation under test: what the READMEs name exists, and their commands are understood."""

import functools
import importlib.util
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from gptjax.config import Config, load_config, to_json
from gptjax.scaling.flops import parameter_count

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
PATHS = re.compile(r"(?<![\w/.-])((?:gptjax|configs|tests)/[\w./-]*\w)")
SIZE_ROW = re.compile(r"^\| `(configs/[^`]+)` \| ([\d,]+)M \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)


def read(readme: str) -> str:
    return (ROOT / readme).read_text(encoding="utf-8")


def commands(readme: str) -> list[str]:
    """The commands of the shell blocks, continued lines joined, comments dropped."""
    shell = "".join(re.findall(r"```bash\n(.*?)```", read(readme), flags=re.DOTALL)).replace("\\\n", " ")
    return [" ".join(words) for line in shell.splitlines() if (words := shlex.split(line, comments=True))]


def trainings(readme: str) -> list[str]:
    return [command for command in commands(readme) if "--config=" in command]


def load(arguments: list[str]) -> Config:
    """The config that `--config...` arguments give."""
    values = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    path = values.pop("config")
    return load_config(path, {key.removeprefix("config."): value for key, value in values.items()})


@pytest.mark.parametrize("readme", READMES)
def test_paths_exist(readme: str) -> None:
    links = re.findall(r"\]\((?!http|#)([^)#]+)", read(readme))
    paths = {*links, *PATHS.findall(read(readme))}
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]


@pytest.mark.parametrize("readme", READMES)
def test_modules_exist(readme: str) -> None:
    modules = set(re.findall(r"python -m ((?:gptjax|benchmarks)[\w.]*)", read(readme)))
    assert modules
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


@pytest.mark.parametrize("command", sorted({command for readme in READMES for command in trainings(readme)}))
def test_configs_and_overrides_resolve(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    # The weights that a command starts from are what an earlier one has left.
    (tmp_path / "config.json").write_text(to_json(load(["--config=configs/gpt2.py:runlocal"])))
    words = [re.sub(r"init_from=runs/\w+", f"init_from={tmp_path}", word) for word in command.split()]
    load([word for word in words if word.startswith("--config")])


@pytest.mark.parametrize("readme", READMES)
def test_flags_exist(readme: str) -> None:
    programs = [*(ROOT / "gptjax").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]
    code = "".join(program.read_text() for program in programs)
    for name, key in re.findall(r"--([a-z_]+)(?:\.([\w.]*\w))?", read(readme)):
        if name.startswith("xla_"):  # XLA's own, in XLA_FLAGS
            continue
        assert f'"{name}"' in code, f"no flag --{name}"
        if key:
            functools.reduce(getattr, key.split("."), Config())


@pytest.mark.parametrize("readme", READMES)
def test_the_table_of_sizes_is_that_of_the_configs(readme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = SIZE_ROW.findall(read(readme))
    assert len(rows) == 13
    for file, millions, *shape in rows:
        model = load([f"--config={file}"]).model
        assert [model.num_layers, model.embed_dim, model.num_heads, model.context_length] == list(map(int, shape))
        model = replace(model, vocab_size=40478 if "gpt1" in file else 50257)
        # The papers round to three digits.
        assert parameter_count(model) / 1e6 == pytest.approx(int(millions.replace(",", "")), rel=0.005)


@pytest.mark.parametrize("readme", READMES)
def test_make_targets_exist(readme: str) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"^make (\w+)", "\n".join(commands(readme)), flags=re.MULTILINE))
    assert named
    assert named <= targets


def test_both_languages_have_the_same_commands_and_tables() -> None:
    english, chinese = READMES
    assert commands(english) == commands(chinese)
    assert SIZE_ROW.findall(read(english)) == SIZE_ROW.findall(read(chinese))
