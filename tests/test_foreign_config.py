"""A workdir's config may be untrusted: it runs no code, and chooses no file that the command line does not."""

import dataclasses
import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.config import UserError
from gptjax.data import tokenizers
from gptjax.evaluation import run_tasks as evaluation
from gptjax.evaluation.dialogue import read_prompts
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.stages import registry
from gptjax.stages.preference.reward_scorer import load_reward_model
from gptjax.stages.registry import completed_config
from gptjax.stages.rl.reward_functions import open_reward
from gptjax.stages.saved_weights import load_given
from gptjax.stages.trained_model import load_model
from tests.tiny_chats import rl_config


@pytest.fixture
def foreign(tmp_path: Path, pretrained: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A workdir whose config names a module, which writes a file when it is imported, and conversations."""
    (tmp_path / "planted.py").write_text("open('ran', 'w').close()\ndef reward(*_): return 0.0\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    tokenizers.BytesTokenizer().save((directory := tmp_path / "run") / "tokenizer")
    config = rl_config("grpo", tmp_path, pretrained)
    config = dataclasses.replace(config, rl=dataclasses.replace(config.rl, reward="python:planted.reward"))
    (directory / "config.json").write_text(c.to_json(config))
    model = GPT(completed_config(directory)[0].model)
    with Checkpoints(directory, config.checkpoint) as checkpoints:
        variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))
        checkpoints.save_params(nn.unbox(variables)["params"])
    return directory


def test_code_that_a_saved_config_names_does_not_run(foreign, pretrained, tmp_path):
    config, _ = completed_config(foreign)
    load_model(foreign)
    read_prompts(None, config)
    mesh = make_mesh(c.MeshConfig())
    with pytest.raises(UserError, match="is a run of stage grpo"):
        open_reward(f"model:{foreign}", mesh, [])
    with pytest.raises(UserError, match="is of stage grpo"):
        load_reward_model(foreign, mesh)
    with jax.set_mesh(mesh):
        started = dataclasses.replace(config, init_from=str(foreign))
        assert load_given(registry.parameters(started), mesh) is not None
    assert not (tmp_path / "ran").exists()
    assert open_reward("python:planted.reward", mesh, []).on_host  # which the command line has named
    assert (tmp_path / "ran").exists()


def test_dialogue_is_read_from_what_the_command_line_names(foreign, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: pytest.fail("too late"))
    with pytest.raises(UserError, match=r"needs --source=jsonl:FILE, or --held_out to read what the run held out of"):
        evaluation.evaluate(foreign, evaluation.Options(tasks=("dialogue",)))
    for options in (
        evaluation.Options(tasks=("dialogue",), held_out=True, source="jsonl:x"),
        evaluation.Options(tasks=("lambada",), held_out=True),
    ):
        with pytest.raises(UserError, match=r"--held_out"):
            evaluation.evaluate(foreign, options)


def test_perplexity_is_read_from_what_the_command_line_names(foreign, monkeypatch):
    monkeypatch.setattr(evaluation, "load_model", lambda *_, **__: pytest.fail("too late"))
    tree = json.loads((foreign / "config.json").read_text()) | {"stage": "pretrain"}
    tree["data"]["source"] = "text:/etc/*"
    (foreign / "config.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"needs --source=text:FILE, or --held_out to read what the run held out of"):
        evaluation.evaluate(foreign, evaluation.Options(tasks=("perplexity",)))


def test_a_circle_of_base_weights(foreign):
    tree = json.loads((foreign / "config.json").read_text())
    tree |= {"init_from": str(foreign.parent / "other")}
    tree["peft"]["method"] = "lora"
    (foreign / "config.json").write_text(json.dumps(tree))
    shutil.copytree(foreign, foreign.parent / "other")
    (foreign.parent / "other" / "config.json").write_text(json.dumps(tree | {"init_from": str(foreign)}))
    with pytest.raises(UserError, match=r"has no base weights: init_from of .*other leads back to .*run: correct"):
        load_model(foreign)
