"""The pages of docs/ and the files of examples/ name what exists: paths, modules, flags, config keys."""

import importlib.util
import re
from pathlib import Path

import pytest

from gptjax.config import check_key

ROOT = Path(__file__).parents[1]
PAGES = sorted(path for folder in ("docs", "examples") for path in (ROOT / folder).iterdir() if path.is_file())
# Flags of other programs that the pages call.
OTHERS = {
    *("zone", "worker", "command", "accelerator-type", "version", "node-count", "implicit-dirs"),
    *("kill-on-bad-exit", "job-name", "nodes", "ntasks-per-node", "gres", "cpus-per-task", "time", "requeue"),
    *("open-mode", "output", "xla_force_host_platform_device_count"),
}


PROGRAMS = ("gptjax", "benchmarks", "examples")


def defined_flags() -> set[str]:
    code = "".join(path.read_text() for folder in PROGRAMS for path in (ROOT / folder).glob("*.py"))
    return set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', code))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_flags_and_config_keys_exist(page: Path) -> None:
    named = re.findall(r"(?<![\w-])--([a-z][\w-]*)(?:\.([\w.]*\w))?", page.read_text())
    assert named
    for name, key in named:
        assert name in defined_flags() | OTHERS, f"no flag --{name}"
        if key:
            check_key(key)


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_modules_and_paths_exist(page: Path) -> None:
    text = page.read_text()
    modules = re.findall(r"\b(gptjax\.(?:main|evaluate|generate|convert|plan|predict|chat)|benchmarks\.\w+)\b", text)
    assert not [module for module in modules if importlib.util.find_spec(module) is None]
    links = {page.parent / link for link in re.findall(r"\]\((?!http|#)([^)#]+)", text)}
    paths = {ROOT / path for path in re.findall(r"(?<![\w/.-])((?:gptjax|configs|tests|examples)/[\w./-]*\w)", text)}
    assert not [path for path in links | paths if not path.exists()]


def test_there_are_pages() -> None:
    assert {"multi_host.md", "finetuning.md", "chat.md", "slurm.sbatch", "gke_jobset.yaml"} <= {
        page.name for page in PAGES
    }
