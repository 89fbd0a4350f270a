"""Documentation under test: what the READMEs and guides name exists, and their commands are understood."""

import ast
import functools
import importlib.util
import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

import gptjax
from gptjax.config import Config, load_config, to_json
from gptjax.scaling.parameters import parameter_count
from tests.architecture import declared_letters

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README.zh-CN.md")
TRAINING = ("docs/training.md", "docs/zh/training.md")
GUIDES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "docs").rglob("*.md")
    if path.name != "multi_host.md"  # commands of other programs, over several lines; test_docs.py reads it
)
DOCUMENTS = (*READMES, "CONTRIBUTING.md", *GUIDES)
MAX_README_LINES = 200
PATHS = re.compile(r"(?<![\w/.-])((?:gptjax|configs|tests)/[\w./-]*\w)")
SIZE_ROW = re.compile(r"^\| `(configs/[^`]+)` \| ([\d,]+)M \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)


def read(document: str) -> str:
    return (ROOT / document).read_text(encoding="utf-8")


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", read(document), flags=re.DOTALL)


def commands(document: str) -> list[str]:
    """The commands of the shell blocks, continued lines joined, comments dropped."""
    shell = "".join(blocks(document, "bash")).replace("\\\n", " ")
    return [shlex.join(words) for line in shell.splitlines() if (words := shlex.split(line, comments=True))]


def trainings(document: str) -> list[str]:
    return [command for command in commands(document) if "--config=" in command]


def load(arguments: list[str]) -> Config:
    """The config that `--config...` arguments give."""
    values = dict(argument.removeprefix("--").split("=", 1) for argument in arguments)
    path = values.pop("config")
    return load_config(path, {key.removeprefix("config."): value for key, value in values.items()})


@pytest.mark.parametrize("document", DOCUMENTS)
def test_paths_exist(document: str) -> None:
    text = read(document)
    links = {(ROOT / document).parent / link for link in re.findall(r"\]\((?!http|#)([^)#]+)", text)}
    paths = links | {ROOT / path for path in PATHS.findall(text)}
    assert not [path for path in paths if not path.exists()]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_modules_exist(document: str) -> None:
    modules = set(re.findall(r"python -m ((?:gptjax|benchmarks)[\w.]*)", read(document)))
    assert not [module for module in modules if importlib.util.find_spec(module) is None]


@pytest.mark.parametrize("command", sorted({command for document in DOCUMENTS for command in trainings(document)}))
def test_configs_and_overrides_resolve(command: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(ROOT)
    # The weights that a command starts from are what an earlier one has left.
    (tmp_path / "config.json").write_text(to_json(load(["--config=configs/gpt2.py:runlocal"])))
    words = [re.sub(r"init_from=runs/\w+", f"init_from={tmp_path}", word) for word in shlex.split(command)]
    load([word for word in words if word.startswith("--config")])


@pytest.mark.parametrize("document", DOCUMENTS)
def test_flags_exist(document: str) -> None:
    programs = [path for folder in ("gptjax", "benchmarks", "examples") for path in (ROOT / folder).glob("*.py")]
    programs += (ROOT / "examples").glob("*/*.py")
    code = "".join(program.read_text() for program in programs)
    for name, key in re.findall(r"(?<![\w-])--([a-z][a-z0-9_]*)(?:\.([\w.]*\w))?", read(document)):
        if name == "help" or name.startswith("xla_"):  # of every command; XLA's own, in XLA_FLAGS
            continue
        if document == "CONTRIBUTING.md" and name in ("report", "hypothesis"):  # of tests.architecture and pytest
            continue
        assert f'"{name}"' in code, f"no flag --{name}"
        if key:
            functools.reduce(getattr, key.split("."), Config())


@pytest.mark.parametrize("guide", TRAINING)
def test_the_table_of_sizes_is_that_of_the_configs(guide: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    rows = SIZE_ROW.findall(read(guide))
    assert len(rows) == 13
    for file, millions, *shape in rows:
        model = load([f"--config={file}"]).model
        assert [model.num_layers, model.embed_dim, model.num_heads, model.context_length] == list(map(int, shape))
        model = replace(model, vocab_size=40478 if "gpt1" in file else 50257)
        # The papers round to three digits.
        assert parameter_count(model) / 1e6 == pytest.approx(int(millions.replace(",", "")), rel=0.005)


@pytest.mark.parametrize("document", ["README.md", "README.zh-CN.md", "CONTRIBUTING.md"])
def test_make_targets_exist(document: str) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z-]+)`|^make ([a-z-]+)", read(document), flags=re.MULTILINE))
    assert named
    assert {name for pair in named for name in pair if name} <= targets


@pytest.mark.parametrize("readme", READMES)
def test_the_readme_is_short_and_names_every_package(readme: str) -> None:
    text = read(readme)
    assert len(text.splitlines()) <= MAX_README_LINES
    packages = {path.parent.name for path in (ROOT / "gptjax").glob("*/__init__.py")}
    assert packages <= set(re.findall(r"^  (\w+)/ ", text, flags=re.MULTILINE))


@pytest.mark.parametrize("document", DOCUMENTS)
def test_python_examples_compile_and_name_what_exists(document: str) -> None:
    for block in blocks(document, "python"):
        tree = ast.parse(block)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("gptjax"):
                module = importlib.import_module(node.module)
                assert not [alias.name for alias in node.names if not hasattr(module, alias.name)]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "gptjax":
                assert hasattr(gptjax, node.attr), node.attr


@pytest.mark.parametrize("pair", [READMES, TRAINING], ids=["readme", "training"])
def test_both_languages_have_the_same_commands_and_tables(pair: tuple[str, str]) -> None:
    english, chinese = pair
    assert commands(english) == commands(chinese)
    assert blocks(english, "python") == blocks(chinese, "python")
    assert SIZE_ROW.findall(read(english)) == SIZE_ROW.findall(read(chinese))
    cells = [re.findall(r"^\| ([A-Z]|`[^`|]+`) \|", read(document), flags=re.MULTILINE) for document in pair]
    assert cells[0] == cells[1]


def test_the_axis_letters_are_declared() -> None:
    assert declared_letters() == set("BTSDHKFVLMENCPGJROAXQU")
