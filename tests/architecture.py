"""The structure of the library, measured from its source: `python -m tests.architecture --report`.

`test_architecture.py` holds the rules; this module has what they measure, so that a person can read it too.
"""

import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
LIBRARY = sorted((ROOT / "gptjax").rglob("*.py"))
ALL_FILES = sorted(path for folder in ("gptjax", "configs", "tests") for path in (ROOT / folder).rglob("*.py"))

# Modules that no package holds, as all packages import them.
MODULES = ("files", "object_store", "bucket_client", "user_error")
# Packages, from the highest to the lowest: a module may import its own package, and those below.
ORDER = (
    *("commands", "serving", "launch", "comparison", "planning", "corpus", "evaluation", "interop", "stages"),
    *("training", "checkpoint", "inference", "optim", "losses", "models", "metrics", "data", "scaling", "parallel"),
    "distributed",
    "config",
    *MODULES,
)
# Files that may test a stage's name: the stages themselves.
STAGE_FOLDER = ROOT / "gptjax" / "stages"
STAGE_NAMES = {"pretrain", "finetune", "sft", "reward", "dpo", "ppo", "grpo"}


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def package(module: str) -> str:
    """The entry of ORDER that a module of the library belongs to; the __main__ of a package is a command."""
    name = module.partition(".")[2].partition(".")[0]
    if module.endswith(".__main__"):
        return "commands"
    return name if name in ORDER else "commands"


def imports(nodes: Iterator[ast.AST]) -> Iterator[str]:
    """The modules that import statements name; `from a import b` names a.b, which may be a module or not."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import: write the whole name"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def imports_between_packages() -> Counter[tuple[str, str]]:
    """(importing package, imported package) -> import statements, those within functions included."""
    found: Counter[tuple[str, str]] = Counter()
    for path in LIBRARY:
        for imported in imports(ast.walk(ast.parse(path.read_text()))):
            if imported.startswith("gptjax.") and imported != "gptjax.__version__":
                found[package(module_name(path)), package(imported)] += 1
    return Counter({pair: count for pair, count in found.items() if pair[0] != pair[1]})


def imports_upwards() -> list[tuple[str, str]]:
    """(module, imported) of every import that goes up the order."""
    rank = {name: place for place, name in enumerate(ORDER)}
    found = []
    for path in LIBRARY:
        own = module_name(path)
        for imported in imports(ast.walk(ast.parse(path.read_text()))):
            # The package itself is imported for its version alone.
            inside = imported.startswith("gptjax.") and imported != "gptjax.__version__"
            if inside and rank[package(imported)] < rank[package(own)]:
                found.append((own, imported))
    return found


def stage_tests() -> list[str]:
    """file:line of every comparison with a stage's name outside the stages."""
    found = []
    for path in [*LIBRARY, *sorted((ROOT / "configs").glob("*.py"))]:
        if path.is_relative_to(STAGE_FOLDER):
            continue
        nodes = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Compare))
        tests = (node for node in nodes if _is_stage(node.left) and any(map(_names_stage, node.comparators)))
        found += [f"{path.relative_to(ROOT)}:{node.lineno}" for node in tests]
    return found


def _is_stage(node: ast.expr) -> bool:
    return (isinstance(node, ast.Attribute) and node.attr == "stage") or (
        isinstance(node, ast.Name) and node.id == "stage"
    )


def _names_stage(node: ast.expr) -> bool:
    return any(isinstance(part, ast.Constant) and part.value in STAGE_NAMES for part in ast.walk(node)) or (
        isinstance(node, ast.Name) and node.id.endswith("STAGES")
    )


def declared_letters() -> set[str]:
    """The axis letters of the README's table."""
    text = (ROOT / "README.md").read_text()
    table = text[text.index("| letter | axis |") :].split("\n\n")[0]
    return {
        cell for row in table.splitlines() for cell in map(str.strip, row.split("|")) if re.fullmatch("[A-Z]", cell)
    }


def undeclared_letters() -> list[str]:
    """file: name of every array whose axis letters the README does not declare; digits are sizes."""
    declared, found = declared_letters(), set()
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text())):
            name = node.id if isinstance(node, ast.Name) else node.arg if isinstance(node, ast.arg) else ""
            letters = re.fullmatch(r"[a-z][a-z0-9_]*_([A-Z0-9]+)", name)
            if letters and any(letter.isalpha() and letter not in declared for letter in letters[1]):
                found.add(f"{path.relative_to(ROOT)}: {name}")
    return sorted(found)


def repeated_file_names() -> dict[str, list[str]]:
    """File names that stand in several packages, with those."""
    places: dict[str, list[str]] = {}
    for path in LIBRARY:
        if path.stem != "__init__":
            places.setdefault(path.name, []).append(str(path.parent.relative_to(ROOT)))
    return {name: folders for name, folders in places.items() if len(folders) > 1}


def function_lengths() -> list[tuple[int, str]]:
    """(lines, file:line name) of all functions, the longest first."""
    found = []
    for path in LIBRARY:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lines = (node.end_lineno or node.lineno) - node.lineno + 1
                found.append((lines, f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"))
    return sorted(found, reverse=True)


def report() -> str:
    """What a reviewer of the structure wants to know, as text."""
    counts = imports_between_packages()
    lines = ["packages, the highest first; a package imports only those below it", ""]
    for name in ORDER:
        below = [f"{other} {counts[name, other]}" for other in ORDER if counts[name, other]]
        lines.append(f"{name:<12} {', '.join(below) or '-'}")
    files = sorted(((len(path.read_text().splitlines()), path) for path in LIBRARY), reverse=True)
    lines += ["", "longest files"] + [f"  {length:4} {path.relative_to(ROOT)}" for length, path in files[:5]]
    lines += ["longest functions"] + [f"  {length:4} {name}" for length, name in function_lengths()[:5]]
    for title, found in (
        ("imports upwards", [f"{own} -> {imported}" for own, imported in imports_upwards()]),
        ("tests of a stage's name outside the stages", stage_tests()),
        ("arrays with undeclared axis letters", undeclared_letters()),
        ("file names in several packages", [f"{name}: {', '.join(at)}" for name, at in repeated_file_names().items()]),
    ):
        lines += ["", f"{title}: {len(found)}", *(f"  {entry}" for entry in found)]
    return "\n".join(lines)


if __name__ == "__main__":
    if sys.argv[1:] != ["--report"]:
        sys.exit("usage: python -m tests.architecture --report")
    print(report())
