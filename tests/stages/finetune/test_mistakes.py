"""User errors in fine-tuning: one line that names the culprit and the fix, before anything is compiled."""

import dataclasses
import json
from pathlib import Path

import pytest

from gptjax.config import Config, UserError, replace
from gptjax.run import run
from gptjax.training import loop
from tests.commands import run_command
from tests.tiny_tasks import run_config, with_method

ROOT = Path(__file__).parents[3]


@pytest.fixture(autouse=True)
def no_training(monkeypatch):
    monkeypatch.setattr(loop._Run, "train_step", lambda run: pytest.fail("it began to train"))


def refused(config: Config, directory: Path, *words: str) -> None:
    with pytest.raises(UserError) as error:
        run(config, directory / "run")
    assert "\n" not in str(error.value)
    for word in words:
        assert word in str(error.value)


CSV = {  # of classification: (training rows, validation rows), and what is said of them
    "unknown label": (
        ("good day,good", "bad day,bad"),
        ("so so,fair",),
        ["v.csv:2", "unknown label 'fair'", "bad, good"],
    ),
    "empty text": (("good day,good", " ,bad"), ("a,good",), ["t.csv:3", "text is empty"]),
    "empty label": (("good day,good", "bad day,"), ("a,good",), ["t.csv:3", "label is empty"]),
    "one class": (
        ("good day,good", "better day,good"),
        ("a,good",),
        ["t.csv:2 to ", "t.csv:3", "'good'", "two labels"],
    ),
}


@pytest.mark.parametrize("case", CSV)
def test_rows(case, pretrained, tmp_path):
    train, validation, words = CSV[case]
    for name, rows in (("t.csv", train), ("v.csv", validation)):
        (tmp_path / name).write_text("\n".join(["text,label", *rows, ""]))
    sources = {"source": f"csv:{tmp_path}/t.csv", "validation_source": f"csv:{tmp_path}/v.csv"}
    config = replace(run_config(tmp_path, "classification", pretrained), {"data": sources})
    refused(config, tmp_path, *words)


def test_a_column_that_is_not_there(pretrained, tmp_path):
    config = run_config(tmp_path, "classification", pretrained)
    refused(replace(config, {"task": {"columns": (("text", "tweet"),)}}), tmp_path, "'tweet'", "text, label")
    refused(replace(config, {"task": {"kind": "entailment"}}), tmp_path, "no column for premise", "task.columns")


def test_tags_that_are_not_one_for_each_word(pretrained, tmp_path):
    (tmp_path / "rows.jsonl").write_text(json.dumps({"tokens": ["a", "b"], "tags": ["O"]}) + "\n")
    config = run_config(tmp_path, "tagging", pretrained)
    config = replace(config, {"data": {"source": f"jsonl:{tmp_path}/rows.jsonl"}})
    refused(config, tmp_path, "rows.jsonl:1", "2 tokens and 1 tags")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"task": {"labels": ("good", "bad")}}, ["unknown label 'fair'", "good, bad"]),
        ({"task": {"labels": ("good", "bad", "fair", "bad")}}, ["label twice"]),
        ({"task": {"label_weights": (1.0, 2.0)}}, ["task.label_weights", "each of 3 labels"]),
        ({"model": {"num_layers": 4}}, ["init_from=", "model.num_layers: 2 -> 4"]),
        ({"batch": {"ramp_start_tokens": 256, "ramp_tokens": 512}}, ["batch.ramp_start_tokens"]),
        (
            {"peft": {"method": "lora", "targets": ("layers/.*/none",)}},
            ["peft.targets", "layers/.*/none", "qkv/kernel"],
        ),
        ({"peft": {"method": "lora", "rank": 64, "initial_rank": 64}}, ["peft.rank=64", "lower it"]),
        ({"peft": {"method": "top_layers", "num_layers": 3}}, ["peft.num_layers=3", "the 2 of the model"]),
        ({"evaluation": {"metric": "f1"}}, ["evaluation.metric='f1'", "macro_f1"]),
    ],
)
def test_configs(changes, words, pretrained, tmp_path):
    refused(replace(run_config(tmp_path, "classification", pretrained), changes), tmp_path, *words)


def test_weights_that_are_not_there(pretrained, tmp_path):
    config = run_config(tmp_path, "classification", pretrained)
    refused(
        dataclasses.replace(config, init_from=str(tmp_path)), tmp_path, f"init_from: {tmp_path}", "is not a workdir"
    )
    assert not (tmp_path / "run").exists()


def test_what_is_about_places_is_not_mixed(tmp_path):
    from gptjax.config import check

    config = replace(run_config(tmp_path, "tagging", None), {"regularisation": {"mixup_alpha": 0.2}})
    with pytest.raises(UserError, match=r"regularisation\.mixup_alpha=0\.2 .* task\.kind=tagging"):
        check(config)
    with pytest.raises(UserError, match=r"peft\.method=lora .* init_from"):
        check(with_method(run_config(tmp_path, "tagging", None), "lora"))


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        ("regression", {"regularisation": {"label_smoothing": 0.1}}, ["label_smoothing=0.1", "task.kind=regression"]),
        ("question_answering", {"regularisation": {"label_smoothing": 0.1}}, ["label_smoothing", "set it to 0"]),
        ("regression", {"task": {"balanced_labels": True}}, ["task.balanced_labels", "task.kind=regression"]),
        ("tagging", {"task": {"bidirectional": True}}, ["task.bidirectional", "task.lm_weight=0.5 to 0"]),
        (
            "tagging",
            {"task": {"bidirectional": True, "lm_weight": 0.0}, "model": {"attention_backend": "splash"}},
            ["model.attention_backend=splash", "auto"],
        ),
    ],
)
def test_what_a_task_would_ignore_or_contradict(kind, changes, words, tmp_path):
    refused(replace(run_config(tmp_path, kind, None), changes), tmp_path, *words)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("method=lora", ["peft.method=lora", "init_from"]),
        ("data=csv:{}/rows.csv", ["rows.csv:2", "text is empty"]),
        ("task=sentiment", ["unknown task 'sentiment'", "classification"]),
    ],
)
def test_the_command_ends_with_one_line_and_exit_code_2(flags, words, tmp_path):
    (tmp_path / "rows.csv").write_text("text,label\n,good\nbad,bad\n")
    arguments = [f"--config=configs/finetune.py:runlocal,{flags.format(tmp_path)}", f"--workdir={tmp_path / 'run'}"]
    result = run_command("gptjax.main", *arguments)
    assert result.returncode == 2, result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in last
    assert not (tmp_path / "run").exists()
