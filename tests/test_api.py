"""The Python API in a notebook: no flags are parsed, and heavy packages are imported on demand."""

import subprocess
import sys
from pathlib import Path

import pytest

import gptjax
from gptjax.training.metrics_file import read_metrics

ROOT = Path(__file__).parents[1]


def test_importing_the_library_imports_nothing_heavy():
    code = (
        "import sys, gptjax, gptjax.cli; gptjax.load_config('configs/gpt2.py:runlocal', {'seed': '1e1'});"
        "print([name for name in ('jax', 'flax', 'optax', 'orbax', 'grain', 'tqdm') if name in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout == "[]\n"


@pytest.mark.parametrize("command", [path.stem for path in sorted((ROOT / "gptjax").glob("*.py"))])
def test_no_command_imports_jax_before_its_flags_are_checked(command):
    if "cli.run(main" not in (ROOT / "gptjax" / f"{command}.py").read_text():
        pytest.skip("no command")
    code = f"import sys, gptjax.{command}; print('jax' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout == "False\n"


def test_reading_weights_does_not_import_grain():
    code = "import sys, gptjax.inference.engine, gptjax.stages.trained_model; print('grain' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert found.stdout == "False\n"


@pytest.mark.parametrize("name", gptjax.__all__)
def test_every_public_name_is_there(name):
    assert getattr(gptjax, name).__doc__


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'gptjax' has no attribute 'tran'"):
        _ = gptjax.tran


def test_train_load_and_generate(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["notebook", "--no_flag_of_ours"])
    records: list[dict] = []
    report = gptjax.train(tiny, str(tmp_path / "run"), callbacks=[records.append])
    assert report.step == 6
    assert report.best is not None
    assert report.best[:2] in {(step, "loss") for step in (2, 4, 6)}
    assert records == read_metrics(tmp_path / "run")[1]
    model = gptjax.load(tmp_path / "run")
    assert (model.step, model.config.model.num_layers) == (6, 2)
    text = model.generate("1 and", max_new_tokens=5, temperature=0.0)
    assert text == model.generate("1 and", max_new_tokens=5, temperature=0.0)
    assert [text] == model.generate(["1 and"], max_new_tokens=5, temperature=0.0)
    assert isinstance(model.generate(""), str)  # as many tokens as the context has room for
    with pytest.raises(gptjax.UserError, match="no checkpoint 5"):
        gptjax.load(tmp_path / "run", step=5)
    with pytest.raises(gptjax.UserError, match="exclude each other"):
        gptjax.load(tmp_path / "run", step=6, best=True)
