"""configs/finetune.py: every argument gives a whole config, and `runlocal` trains on the embedded tweets."""

import dataclasses
import json

import pytest

from gptjax import config as c
from gptjax.config import UserError
from gptjax.data import labelled
from gptjax.metrics.task_reports import MAIN_METRIC
from gptjax.run import run
from gptjax.stages import registry
from gptjax.stages.finetune import build as finetune
from tests.tiny_tasks import MODEL, config_module, save_pretrained


@pytest.fixture(scope="module")
def module():
    return config_module("finetune")


def test_every_task_resolves(module):
    for task, kind in module.TASKS.items():
        for end in ("", ",runlocal"):
            config = c.resolve(module.get_config(f"task={task}{end}"))
            assert config.task.kind == kind
            assert config.stage == "finetune"
            assert config.evaluation.metric == MAIN_METRIC[kind]
    assert set(module.TASKS.values()) == set(MAIN_METRIC)


@pytest.mark.parametrize("recipe", ["finetune", "chatgpt"])
def test_recipes_train_float32_parameters_whatever_the_given_weights_have(recipe, tmp_path):
    given = save_pretrained(tmp_path / "given", settings=dataclasses.replace(MODEL, param_dtype="bfloat16"))
    config = c.resolve(config_module(recipe).get_config(f"init_from={given}"))
    assert config.model.param_dtype == "float32"
    assert config.model.embed_dim == MODEL.embed_dim


def test_section_4_1_of_gpt1(module):
    config = c.resolve(module.get_config())
    assert (config.batch.epochs, config.batch.tokens_per_batch // config.model.context_length) == (3.0, 32)
    assert (config.optimizer.peak_lr, config.optimizer.schedule, config.optimizer.warmup_fraction) == (
        6.25e-5,
        "linear",
        0.002,
    )
    assert (config.task.lm_weight, config.task.head_dropout) == (0.5, 0.1)
    assert config.data.source == "tweets"


def test_full_attention_is_without_the_language_model_loss(module):
    for end in ("", ",runlocal"):
        config = c.resolve(module.get_config(f"task=question_answering,bidirectional{end}"))
        assert (config.task.bidirectional, config.task.lm_weight) == (True, 0.0)
        registry.check(config)


@pytest.mark.slow
def test_runlocal_finds_the_entities_of_the_training_rows(module, tmp_path, monkeypatch):
    """The defaults find entities: a run with them, on few sentences that repeat, does not end at an F1 of 0."""
    sentences = labelled.read_rows("hironsan", "tagging")[:8]
    monkeypatch.setattr(finetune, "read_rows", lambda spec, *args, **kwargs: sentences)
    edited = module.get_config("task=ner,runlocal")
    edited.data.tokenizer = "bytes"
    edited.data.validation_source = "hironsan"
    edited.data.cache_dir = str(tmp_path / "cache")
    edited.batch.tokens_per_batch = 4 * edited.model.context_length
    edited.evaluation.every_epochs = 16.0
    edited.checkpoint.every_epochs = None
    config = c.resolve(edited)
    assert (config.task.label_piece, config.batch.epochs) == ("last", 16.0)
    assert run(config, tmp_path / "run").validation["entity_f1"] > 0.1


def test_every_method_needs_and_takes_weights_to_start_from(module, pretrained):
    for method in module.PEAK_LR:
        config = c.resolve(module.get_config(f"method={method},init_from={pretrained}"))
        assert config.peft.method == method
        assert (config.model.context_length, config.model.embed_dim) == (MODEL.context_length, MODEL.embed_dim)
        if method != "none":
            with pytest.raises(UserError, match="init_from"):
                c.resolve(module.get_config(f"method={method}"))
    with pytest.raises(UserError, match="unknown method 'prefix'"):
        module.get_config("method=prefix")
    with pytest.raises(UserError, match="is not a workdir"):
        module.get_config(f"init_from={pretrained.parent}")


@pytest.mark.slow
def test_runlocal_trains_on_the_tweets(module, tmp_path, monkeypatch):
    """A few of them, and from scratch: with a vocabulary of their own."""
    tweets = labelled.read_rows("tweets", "classification")[::500][:71]  # 64 of them to train on
    monkeypatch.setattr(finetune, "read_rows", lambda spec, *args, **kwargs: tweets)
    edited = module.get_config("runlocal")
    edited.data.tokenizer = "bpe:300"
    edited.data.cache_dir = str(tmp_path / "cache")
    edited.model.num_layers = 2
    edited.batch.tokens_per_batch = 32 * edited.model.context_length
    edited.batch.epochs = 1.0
    report = run(c.resolve(edited), tmp_path / "run")
    assert report.step == 2
    assert {"loss", "accuracy", "macro_f1"} <= report.validation.keys()
    task = json.loads((tmp_path / "run" / "task.json").read_text())
    assert task["labels"] == ["negative", "neutral", "positive"]
    assert (tmp_path / "run" / "confusion.png").exists()
