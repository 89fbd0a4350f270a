"""Configs from files, workdirs and overrides: what is read, and what is refused in one line."""

import dataclasses
from pathlib import Path

import pytest

from gptjax import config as c
from gptjax.config import UserError, load_config
from gptjax.config.reference import plain_text

ROOT = Path(__file__).parents[2]
GPT2 = f"{ROOT}/configs/gpt2.py:runlocal"


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("batch.total_tokens", "1e9", 10**9),
        ("batch.total_tokens", "2.5e6", 2_500_000),
        ("batch.total_tokens", "700_000", 700_000),
        ("optimizer.peak_lr", "3e-4", 3e-4),
        ("optimizer.peak_lr", "1", 1.0),
        *(("logging.tensorboard", text, False) for text in ("no", "0", "false", "off", "False")),
        *(("optimizer.offload", text, True) for text in ("yes", "1", "true", "on", "True")),
        ("optimizer.clip_norm", "None", None),
        ("evaluation.patience", "3", 3),
        ("model.dtype", "bfloat16", "bfloat16"),
        ("model.attention_pattern", "dense,banded", ("dense", "banded")),
        ("model.attention_pattern", "('dense', 'banded')", ("dense", "banded")),
        ("optimizer.decay_rules", '((".*", 0.5),)', ((".*", 0.5),)),
        ("evaluation.sample_prompt", "1", "1"),
    ],
)
def test_text_is_read_as_the_type_of_its_key(key, text, value):
    section, name = key.split(".")
    assert getattr(getattr(load_config(GPT2, {key: text}), section), name) == value


@pytest.mark.parametrize(
    ("key", "text", "words"),
    [
        ("batch.total_tokens", "1.5", r"batch.total_tokens='1.5' is not an integer, such as 1000 or 1e9"),
        ("batch.total_tokens", "1e999999999", r"is not an integer"),
        ("batch.total_tokens", "nan", r"is not an integer"),
        ("optimizer.peak_lr", "high", r"optimizer.peak_lr='high' is not a number"),
        ("logging.tensorboard", "maybe", r"logging.tensorboard='maybe' is not a bool: write true or false"),
        ("lr", "1", r"unknown config key 'lr': did you mean 'optimizer.peak_lr'\?"),
        ("model.lr", "1", r"did you mean 'optimizer.peak_lr'\?"),
        ("batch_size", "1", r"did you mean 'batch.tokens_per_batch'\?"),
        ("steps", "1", r"did you mean 'batch.total_tokens'\?"),
        ("epochs", "1", r"did you mean 'batch.epochs'\?"),
        ("every_tokens", "1", r"did you mean 'evaluation.every_tokens' or 'checkpoint.every_tokens'\?"),
        ("seed", "None", "seed=None is not of type int"),
        *((key, "inf", f"{key}=inf must be a finite number") for key in ("batch.epochs", "optimizer.peak_lr")),
        ("peft.orthogonality", "nan", "peft.orthogonality=nan must be a finite number"),
        ("optimizer.decay_rules", '((".*", -1.0),)', "optimizer.decay_rules=.* has a negative factor"),
        ("model.kernel_init_std", "-1", "model.kernel_init_std=-1.0 must not be negative"),
        ("peft.initial_rank", "0", "peft.initial_rank=0 must be positive"),
        ("peft.orthogonality", "-0.1", "peft.orthogonality=-0.1 must not be negative"),
    ],
)
def test_what_is_refused_names_the_key_and_the_fix(key, text, words):
    with pytest.raises(UserError, match=words):
        load_config(GPT2, {key: text})


def test_every_synonym_leads_to_a_key():
    from gptjax.config.edited import SYNONYMS

    for key in set(SYNONYMS.values()):
        c.check_key(key)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("def get_config(arg=None):\n    return 1 / 0\n", r"mine.py:2: ZeroDivisionError: division by zero"),
        ("import nothing_of_this_name\n", r"mine.py:1: ModuleNotFoundError: No module named"),
        ("x = 1\ndef get_config(:\n", r"mine.py:2: invalid syntax"),
        ("x = 1\n", r"mine.py defines no function get_config"),
        ("def get_config():\n    return {}\n", r"mine.py: get_config returns dict"),
    ],
)
def test_an_exception_in_a_config_file_names_file_and_line(source, words, tmp_path):
    (tmp_path / "mine.py").write_text(source)
    with pytest.raises(UserError, match=words):
        load_config(str(tmp_path / "mine.py"))


def saved(directory: Path, **changes: object) -> c.Config:
    config = dataclasses.replace(load_config(GPT2), **changes)  # type: ignore[arg-type]
    (directory / "config.json").write_text(c.to_json(config))
    return config


def test_a_workdir_and_its_config_json_are_configs(tmp_path):
    config = saved(tmp_path, seed=7)
    assert load_config(str(tmp_path)) == load_config(str(tmp_path / "config.json")) == config
    assert load_config(str(tmp_path), {"model.num_layers": "2"}).model.num_layers == 2
    with pytest.raises(UserError, match=r"is not a workdir: it has no config\.json"):
        load_config(str(ROOT / "configs"))


def test_code_that_a_saved_config_names_must_be_repeated(tmp_path):
    reward = "python:planted.reward"
    saved(tmp_path, stage="grpo", rl=c.RLConfig(reward=reward))
    with pytest.raises(UserError, match=r"runs code .* add --config.rl.reward=python:planted.reward$"):
        load_config(str(tmp_path))
    assert load_config(str(tmp_path), {"rl.reward": reward}).rl.reward == reward
    saved(tmp_path, compiler_options=(("xla_dump_to", "/tmp"),))
    with pytest.raises(UserError, match=r"sets XLA flags"):
        load_config(str(tmp_path))


def test_the_reference_has_every_key_with_its_default_and_comment():
    text = plain_text()
    for key in c.changes(c.Config(), c.Config(model=c.GPTConfig(num_layers=1))):
        assert f"--config.{key}=12" in text
    for section in dataclasses.fields(c.Config):
        value = getattr(c.Config(), section.name)
        for field in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
            end = "." if dataclasses.is_dataclass(getattr(value, field.name)) else "="  # a group within the section
            assert f"--config.{section.name}.{field.name}{end}" in text
    own = plain_text("optimizer", c.Config(optimizer=c.OptimizerConfig(peak_lr=1.0)))
    assert "--config.optimizer.peak_lr=1.0 (default 0.0006)" in own
    assert "--config.model" not in own
    with pytest.raises(UserError, match="unknown section 'optimiser': did you mean 'optimizer'"):
        plain_text("optimiser")
