"""The notebooks of colab/: both forms agree, links lead somewhere, and each runs from a fresh kernel."""

import json
import os
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from tests.notebooks import ROOT, SOURCES, assigned, code_with_tag, of_source, written

NOTEBOOKS = [path.stem for path in SOURCES]
REPOSITORY = "https://github.com/OWNER/gptjax"
BADGE = "https://colab.research.google.com/github/OWNER/gptjax/blob/main/colab/{}.ipynb"
PAGES = [
    *(ROOT / name for name in ("README.md", "README.zh-CN.md", "CONTRIBUTING.md")),
    *(path for folder in ("docs", "colab", "examples", "tests/fixtures") for path in (ROOT / folder).rglob("*.md")),
    *SOURCES,
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
HOST = re.compile(r"([a-z0-9-]+\.)+[a-z]{2,}")
SMALL = {"CONTEXT": 32, "BATCH_ROWS": 4, "LAYERS": 1, "WIDTH": 32, "HEADS": 2}


def settings(name: str, directory: Path) -> dict[str, Any]:
    """Settings with which a notebook takes seconds."""
    text, chats = f"text:{directory}/*.txt", f"jsonl:{directory}/chats.jsonl"
    model = {"MODEL": str(directory / "huggingface"), "RUNS": str(directory / "runs"), "BATCH_ROWS": 4}
    return {
        "train_on_your_text": {"TEXT": text, "TOKENIZER": "bytes", "TOKENS": 1280, "WORKDIR": f"{directory}/run"}
        | SMALL,
        "load_gpt2_and_chat": {"CHATS": chats, "EPOCHS": 2.0} | model,
        "fine_tune_and_serve": {
            "ROWS": f"csv:{directory}/rows.csv",
            "EPOCHS": 1.0,
            "CLIENTS": (1, 2),
            "REQUESTS": 4,
        }
        | model,
        "align_by_ppo": {
            "TEXT": text,
            "CHATS": chats,
            "PRETRAIN_TOKENS": 640,
            "SFT_EPOCHS": 1.0,
            "PPO_EPOCHS": 1.0,
            "PROMPTS_PER_ITERATION": 8,
            "RUNS": str(directory / "runs"),
        }
        | SMALL
        | {"CONTEXT": 128},
        "plan_a_175b_run": {"SIZE": "small"},
        "read_a_scaling_law": {
            "SAMPLES": 20,
            "LADDER": [("1x16", 2048 * factor) for factor in (1, 4, 10, 20)],
            "TARGET": ("1x16", 100_000),
            "SEEDS": (0,),
            "RUNS": str(directory / "runs"),
        },
    }[name]


def write_data(directory: Path) -> None:
    """Writes texts, conversations, labelled rows, and a tiny GPT-2 in Hugging Face's format."""
    from gptjax.config import GPTConfig
    from gptjax.interop.huggingface import export_workdir
    from tests.tiny_tasks import save_pretrained

    for number in range(40):
        (directory / f"{number}.txt").write_text(f"Document {number} says that {number} and {number + 1} differ. " * 9)
    with (directory / "chats.jsonl").open("w") as file:
        for number in range(40):
            turns = [{"role": "user", "content": f"q{number}?"}, {"role": "assistant", "content": "A dog."}]
            file.write(json.dumps({"messages": turns}) + "\n")
    rows = [f"it is {word} {number},{word}\n" for number in range(20) for word in ("good", "bad")]
    (directory / "rows.csv").write_text("text,label\n" + "".join(rows))
    model = GPTConfig(context_length=64, num_layers=1, num_heads=2, embed_dim=16, dtype="float32")
    export_workdir(save_pretrained(directory / "pretrained", settings=model), directory / "huggingface")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_both_forms_agree_and_have_no_outputs(name: str) -> None:
    pytest.importorskip("jupytext")
    kept = (ROOT / "colab" / f"{name}.ipynb").read_text(encoding="utf-8")
    assert kept == written(ROOT / "colab" / f"{name}.py"), "write it by `python -m tests.notebooks`"
    cells = [cell for cell in json.loads(kept)["cells"] if cell["cell_type"] == "code"]
    assert not [cell for cell in cells if cell["outputs"] or cell["execution_count"] is not None]


def test_the_notebooks_have_one_set_up_and_their_own_badge() -> None:
    set_ups = set()
    for source in SOURCES:
        text = source.read_text()
        assert f"]({BADGE.format(source.stem)})" in text
        set_ups.add(text.partition('tags=["set-up"]\n')[2].partition("\n# %%")[0])
    assert len(set_ups) == 1
    assert f'"{REPOSITORY}"' in set_ups.pop()


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_imports_the_library_and_what_it_needs_alone(name: str) -> None:
    imported = re.findall(r"^\s*(?:import|from) (\w+)", (ROOT / "colab" / f"{name}.py").read_text(), re.MULTILINE)
    known = {"glob", "importlib", "inspect", "json", "os", "shutil", "subprocess", "sys", "time", "urllib", "pathlib"}
    assert set(imported) <= known | {"concurrent", "gptjax", "matplotlib", "numpy"}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_are_well_formed_and_lead_to_files_of_the_repository(page: Path) -> None:
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        parts = urlsplit(link)
        if link.startswith("#"):
            continue
        if not parts.scheme:
            target = page.parent / parts.path
        else:
            assert parts.scheme == "https", link
            assert HOST.fullmatch(parts.netloc), link
            own = re.fullmatch(r"/(?:github/)?OWNER/gptjax/(?:blob|tree)/main/(.+)", parts.path)
            if own is None:
                continue
            target = ROOT / own[1]
        assert target.exists(), link


@pytest.mark.slow
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs_from_a_fresh_kernel(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ipykernel")
    nbclient = pytest.importorskip("nbclient")
    import nbformat

    notebook = of_source(ROOT / "colab" / f"{name}.py")
    (parameters,) = code_with_tag(notebook, "parameters")
    changed = settings(name, tmp_path)
    assert set(changed) <= assigned(parameters)
    write_data(tmp_path)
    place = next(i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", []))
    code = "\n".join(f"{key} = {value!r}" for key, value in changed.items())
    notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(code))
    # The kernel reads the library from here, and warns where the tests fail.
    client = nbclient.NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}
    )
    client.execute(env={**os.environ, "PYTHONPATH": str(ROOT)})
    if (kept := os.environ.get("GPTJAX_EXECUTED")) is not None:
        nbformat.write(notebook, Path(kept) / f"{name}.ipynb")
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    figures = sum("image/png" in output.get("data", {}) for output in outputs)
    assert figures == sum(cell.source.count("plt.show()") for cell in notebook.cells)
