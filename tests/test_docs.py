"""The pages of docs/ and examples/ name paths, modules, flags and config keys that exist; the config reference."""

import ast
import dataclasses
import functools
import importlib.util
import re
from pathlib import Path
from typing import Literal

import pytest

from gptjax.config import Config, check_key, reference

ROOT = Path(__file__).parents[1]
GUIDES = sorted((ROOT / "docs").rglob("*.md"))
PROGRAMS_OF_EXAMPLES = sorted((ROOT / "examples").glob("*/*.py"))
FILES = sorted(path for path in (ROOT / "examples").iterdir() if path.is_file())
PAGES = [*GUIDES, *FILES, *PROGRAMS_OF_EXAMPLES]
# Flags of other programs that the pages call.
OTHERS = {
    *("help", "no-deps"),  # of every command; of pip
    *("continuous-batching",),  # of transformers serve
    *("zone", "worker", "command", "accelerator-type", "version", "node-count", "implicit-dirs"),
    *("kill-on-bad-exit", "job-name", "nodes", "ntasks-per-node", "gres", "cpus-per-task", "time", "requeue"),
    *("open-mode", "output", "xla_force_host_platform_device_count", "xla_gpu_exclude_nondeterministic_ops"),
}


PROGRAMS = ("gptjax", "benchmarks", "examples")


@functools.cache
def defined_flags() -> set[str]:
    code = "".join(path.read_text() for folder in PROGRAMS for path in (ROOT / folder).glob("*.py"))
    code += "".join(path.read_text() for path in PROGRAMS_OF_EXAMPLES)
    return set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', code))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_and_config_keys_exist(page: Path) -> None:
    named = re.findall(r"(?<![\w-])--([a-z][\w-]*)(?:\.([\w.]*\w))?", page.read_text())
    assert named or page.name in ("index.md", "notebooks.md")
    for name, key in named:
        assert name in defined_flags() | OTHERS, f"no flag --{name}"
        if key:
            check_key(key)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_modules_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    modules = re.findall(
        r"\b(gptjax\.(?:main|sweep|compare|evaluate|generate|convert|plan|predict|prepare|chat)"
        r"|benchmarks\.(?!md\b)\w+)\b",
        text,
    )
    assert not [module for module in modules if importlib.util.find_spec(module) is None]
    links = {page.parent / link for link in re.findall(r"\]\((?!http|#)([^)#]+)", text)}
    paths = {ROOT / path for path in re.findall(r"(?<![\w/.-])((?:gptjax|configs|tests|examples)/[\w./-]*\w)", text)}
    assert not [path for path in links | paths if not path.exists()]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: str(path.relative_to(ROOT)))
def test_config_keys_in_backticks_exist(guide: Path) -> None:
    sections = [name for name in reference.sections() if name]
    for section, key in re.findall(rf"`({'|'.join(sections)})\.([a-z_]+)(?=[`=])", guide.read_text()):
        check_key(f"{section}.{key}")


@pytest.mark.parametrize("name", ["training", "finetuning", "chat"])
def test_a_chinese_guide_names_the_flags_and_keys_of_the_english_one(name: str) -> None:
    def named(guide: str) -> set[str]:
        text = (ROOT / "docs" / guide).read_text()
        keys = re.findall(r"`((?:[a-z]+\.)+[a-z_]+)(?=[`=])", text)
        return {*keys, *re.findall(r"(?<![\w-])--([a-z_]+(?:\.[\w.]*\w)?)", text)}

    english, chinese = named(f"{name}.md"), named(f"zh/{name}.md")
    # Commands of measurements that only the English page has in full.
    assert english - chinese <= {"init_from", "pretrain_tokens", "rows"}
    assert chinese <= english


def defined_names(path: Path) -> set[str]:
    """The functions, classes and variables at the top level of a module."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_no_docstring_has_a_cross_reference_of_markdown() -> None:
    """`[A][B]` outside of backticks is a link to B for the documentation site, and an error where there is no B."""
    for path in sorted((ROOT / "gptjax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
                prose = re.sub(r"`[^`]*`", "", ast.get_docstring(node) or "")
                assert not re.findall(r"\]\[[^\]]*\]", prose), f"{path}:{node}"


def test_contributing_names_the_place_of_every_new_thing() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text()
    rows = re.findall(r"^\| ([^|]+) \| [^|]*`(?:gptjax|docs|tests)/", text, flags=re.MULTILINE)
    assert {"loss", "optimizer", "Hugging Face family", "stage", "metric of generated text", "config key"} <= set(rows)
    assert {"command-line flag", "sharding rule", "benchmark", "source of text"} <= set(rows)
    places = set(re.findall(r"`([\w/]+\.py):(\w+)`", text))
    assert len(places) > 30
    assert not [f"{path}:{name}" for path, name in sorted(places) if name not in defined_names(ROOT / path)]


def test_there_are_pages() -> None:
    named = {page.relative_to(ROOT).as_posix() for page in PAGES}
    assert {"docs/multi_host.md", "docs/finetuning.md", "docs/chat.md", "examples/slurm.sbatch"} <= named
    assert {"docs/zh/training.md", "docs/zh/finetuning.md", "docs/zh/chat.md", "examples/gke_jobset.yaml"} <= named


def test_every_guide_is_in_the_navigation() -> None:
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert not [guide for guide in GUIDES if guide.relative_to(ROOT / "docs").as_posix() not in navigation]


def test_the_config_reference_has_every_key_once() -> None:
    def names(section: object, prefix: str = "") -> list[str]:
        found = []
        for field in dataclasses.fields(section):  # type: ignore[arg-type]
            value = getattr(section, field.name)
            inner = dataclasses.is_dataclass(value)
            found += names(value, f"{prefix}{field.name}.") if inner else [prefix + field.name]
        return found

    listed = [key.name for section in reference.sections() for key in reference.keys(section)]
    assert sorted(listed) == sorted(names(Config()))
    page = reference.markdown()
    assert all(f"`{name}`" in page for name in listed)


@dataclasses.dataclass(frozen=True)
class Commented:
    """A docstring."""

    # Above,
    # over two lines
    first: int = 1
    second: Literal["a", "b"] = "a"  # behind;
    # continued below
    third: tuple[str, ...] = (
        "x",  # inside
    )

    fourth: int | None = None


def test_the_config_reference_reads_the_comments_of_fields() -> None:
    assert reference.field_comments(Commented) == {
        "first": "Above, over two lines",
        "second": "behind; continued below",
        "third": "inside",
        "fourth": "",
    }


def test_the_config_reference_escapes_what_a_markdown_table_would_read() -> None:
    lines = [line for line in reference.markdown().splitlines() if line.startswith("| `")]
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in lines} == {5}
    assert not [line for line in lines if re.search(r"<(?!/?code>)", line)]
