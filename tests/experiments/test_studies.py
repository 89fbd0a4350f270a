"""Every study is complete, and RESULTS.md says what the results.json files have."""

import ast
import json
import re
from pathlib import Path

import pytest

from experiments import study
from gptjax.config import load_config
from gptjax.launch.members import read_sweep

STUDIES = sorted(path.parent for path in study.FOLDER.glob("*/sweep.py"))
SECTIONS = ["Claim", "Run", "Cost", "Result", "What would refute it", "Larger"]
MOST_LINES = 150


@pytest.fixture(params=STUDIES, ids=lambda folder: folder.name)
def folder(request) -> Path:
    return request.param


def code_lines(path: Path) -> int:
    """The number of lines without blank lines, comments and docstrings."""
    text = path.read_text()
    documentation: set[int] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            documentation |= set(range(node.body[0].lineno, (node.body[0].end_lineno or 0) + 1))
    lines = [line.strip() for number, line in enumerate(text.splitlines(), 1) if number not in documentation]
    return sum(bool(line) and not line.startswith("#") for line in lines)


def test_code_of_a_study_is_short(folder):
    lines = sum(map(code_lines, folder.rglob("*.py")))
    assert 0 < lines <= MOST_LINES, f"{folder.name} has {lines} lines of code"


def test_readme_of_a_study_has_all_sections(folder):
    text = (folder / "README.md").read_text()
    assert re.findall(r"^## (.*)$", text, re.MULTILINE) == SECTIONS
    assert re.search(r"section \d|figure \d", text), "the place in the paper"
    assert f"({study.FIGURE})" in text
    assert "python -m gptjax.sweep" in text
    for scale in ("scale=tpu_", "scale=gpu_"):
        assert scale in text


def test_results_of_a_study_are_whole(folder):
    results = json.loads((folder / study.RESULTS).read_text())
    assert re.fullmatch(r"[0-9a-f]{40}", results["commit"])
    assert results["command"].startswith("python -m experiments.")
    assert results["command"] in (folder / "README.md").read_text()
    assert results["runs"] == len(read_sweep(str(folder / "sweep.py"), []))
    assert results["seconds_of_runs"] > 0
    for claim in results["claims"]:
        assert len(claim["seeds"]) >= 3
        low, high = claim["interval"]
        assert low <= claim["mean"] <= high
        assert claim["held"] == (low > claim["at_least"])
    points = [point for panel in results["figures"].values() for line in panel.values() for point in line]
    assert points
    assert all(len(point["seeds"]) >= 3 and point["interval"] for point in points)
    assert (folder / study.FIGURE).read_bytes().startswith(b"\x89PNG")
    assert (folder / study.FIGURE).stat().st_size < 100_000


def test_claims_are_in_the_results_page(folder):
    page = (study.FOLDER / "RESULTS.md").read_text()
    assert page == study.results_page()
    assert f"({folder.name}/README.md)" in page
    assert f"({folder.name}/README.md)" in (study.FOLDER / "README.md").read_text()


@pytest.mark.parametrize("scale", ["cpu", "tpu_v5e_4", "gpu_h100_8"])
def test_every_scale_is_a_valid_config(folder, scale):
    load_config(f"{folder / 'sweep.py'}:scale={scale}", {})


def test_a_claim_holds_if_its_whole_interval_is_above_the_bound():
    assert study.Claim("a", [0.4, 0.5, 0.6]).record()["held"]
    assert not study.Claim("a", [0.4, 0.5, 0.6], 0.3).record()["held"]  # the interval begins at 0.25
    assert not study.Claim("a", [0.5]).record()["held"]
