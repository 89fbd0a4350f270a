"""A small version of each study: the sign of a claim that held does not flip."""

import json
from pathlib import Path

import pytest

from tests.commands import run_command


def done(*arguments: object) -> None:
    result = run_command(*arguments)
    assert result.returncode == 0, result.stderr[-2000:]


@pytest.mark.slow
def test_labels_are_learned_from_the_context(tmp_path: Path):
    """A run of half the study's tokens. With other data or still fewer, models of this size may not learn it."""
    done("experiments.gpt3_in_context.episodes", f"--output={tmp_path}", "--queries=200")
    workdir, output = tmp_path / "run", tmp_path / "scores.json"
    done(
        "gptjax.main",
        f"--config=experiments/gpt3_in_context/sweep.py:data=jsonl:{tmp_path}/train.jsonl#text",
        f"--workdir={workdir}",
        "--config.batch.total_tokens=700000",
    )
    tasks = [tmp_path / f"labels_{shots}.jsonl" for shots in (0, 16)]
    done("gptjax.evaluate", f"--workdir={workdir}", f"--tasks={tasks[0]},{tasks[1]}", f"--output={output}")
    results = json.loads(output.read_text())["results"]
    none, many = (results[task.stem]["metrics"]["accuracy"]["value"] for task in tasks)
    assert many - none > 0.15, (none, many)


@pytest.mark.slow
def test_pretraining_transfers(tmp_path: Path):
    """One seed of the study with the most labelled rows, and pretraining of its length."""
    done("experiments.gpt1_transfer.rows", f"--output={tmp_path}/rows")
    config = f"experiments/gpt1_transfer/sweep.py:data={tmp_path}/rows,pretrained={tmp_path}/pretrained"
    done("gptjax.main", f"--config={config}", f"--workdir={tmp_path}/pretrained")
    accuracy = {}
    for start in ("pretrained", "scratch"):
        workdir = tmp_path / start / "run"
        done("gptjax.main", f"--config={config},stage=finetune,start={start}", f"--workdir={workdir}")
        accuracy[start] = json.loads((workdir / "report.json").read_text())["accuracy"]
    assert accuracy["pretrained"] - accuracy["scratch"] > 0.03, accuracy
