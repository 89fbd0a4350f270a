"""The Python API in a notebook: no flags are parsed, and heavy packages are imported on demand."""

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest

import gptjax
from gptjax.training.metrics_file import read_metrics
from tests.tiny_chats import save_sft

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


def test_curves_are_the_records_of_a_split_as_arrays(original):
    _, workdir = original
    _, records = read_metrics(workdir)
    curves = gptjax.curves(workdir, "validation")
    assert curves["loss"].tolist() == [record["loss"] for record in records if record["split"] == "validation"]
    assert {len(values) for values in curves.values()} == {len(curves["step"])}
    with pytest.raises(gptjax.UserError, match="no records of split 'rollout': it has validation, train"):
        gptjax.curves(workdir, "rollout")


def test_a_value_that_a_record_lacks_is_nan(tmp_path):
    place = {"step": 1, "tokens": 8, "split": "train", "seconds": 1.0}
    lines = [{"run": {}}, {**place, "loss": 2.0}, {**place, "step": 2, "loss": None, "grad_norm": 3.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = gptjax.curves(tmp_path)
    np.testing.assert_array_equal(curves["loss"], [2.0, np.nan])
    np.testing.assert_array_equal(curves["grad_norm"], [np.nan, 3.0])


def test_scores_are_log_probabilities(pretrained):
    model = gptjax.load(pretrained)
    whole = model.score(["It"], [" was"])
    parts = model.score(["It", "It "], [" ", "was"])
    assert whole[0] < 0
    # White space moves from the end of a context to the continuation, so that both parts have it.
    assert model.score(["It "], ["was"]) == pytest.approx(whole)
    assert parts[0] > whole[0]
    with pytest.raises(gptjax.UserError, match="there is nothing to score"):
        model.score(["It"], [""])


def test_a_conversation_is_started_with_a_chat_model_alone(pretrained, tmp_path):
    with pytest.raises(gptjax.UserError, match="stage pretrain trains no chat model"):
        gptjax.load(pretrained).chat()
    chat = gptjax.load(save_sft(tmp_path / "sft", tmp_path)).chat(max_new_tokens=4, seed=3)
    reply = chat.reply("q1")
    assert [(turn.role, turn.content) for turn in chat.turns] == [("user", "q1"), ("assistant", reply)]


def test_a_hugging_face_model_becomes_a_workdir_that_stages_extend(pretrained, tmp_path):
    """Chat templates add tokens to the vocabulary, whose size the config of imported weights has."""
    from gptjax.config import MeshConfig
    from gptjax.interop.huggingface import export_workdir
    from gptjax.parallel.mesh import make_mesh
    from gptjax.stages.builders import build

    export_workdir(pretrained, tmp_path / "exported")
    gptjax.import_huggingface(str(tmp_path / "exported"), tmp_path / "run")
    prompt = {"max_new_tokens": 5, "temperature": 0.0}
    imported = gptjax.load(tmp_path / "run")
    assert imported.generate("1 and", **prompt) == gptjax.load(pretrained).generate("1 and", **prompt)
    (tmp_path / "chats.jsonl").write_text("".join(f'{{"prompt": "{i}", "completion": "b"}}\n' for i in range(20)))
    config = gptjax.load_config(
        f"configs/chatgpt.py:stage=sft,data=jsonl:{tmp_path}/chats.jsonl,init_from={tmp_path}/run",
        {"evaluation.sample_tokens": 0},
    )
    stage = build(config, make_mesh(MeshConfig()), imported.tokenizer)
    assert stage.tokenizer.vocab_size == 257
    assert stage.objective.parameters.config.model.vocab_size == 257 + 2


def test_a_server_runs_in_the_background_until_it_is_closed(pretrained):
    with gptjax.open_server(pretrained, name="tiny", rows=1) as server:
        body = json.dumps({"model": server.model, "prompt": "1 and", "max_tokens": 4, "temperature": 0}).encode()
        request = urllib.request.Request(f"{server.url}/v1/completions", body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as response:
            text = json.load(response)["choices"][0]["text"]
    assert text == gptjax.load(pretrained).generate("1 and", 4, temperature=0.0)
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(server.url)
    server.close()  # a second time
    with pytest.raises(gptjax.UserError, match="nonexistent"):
        gptjax.open_server("/nonexistent")
