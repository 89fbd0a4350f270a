"""A small version of each study: the sign of a claim that held does not flip."""

import json
from pathlib import Path

import pytest

from experiments.instructgpt.gold import gold_reward
from experiments.policies import complete
from gptjax.data.conversations import read_prompts
from gptjax.stages.trained_model import load_model
from gptjax.training.metrics_file import read_metrics
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


def last_bits(workdir: Path, config: str, *overrides: str) -> float:
    """Trains two layers; returns the last held-out bits per byte."""
    arguments = ["--config.model.num_layers=2", "--config.evaluation.every_tokens=None", *overrides]
    done("gptjax.main", f"--config={config}", f"--workdir={workdir}", *arguments)
    return [record["bits_per_byte"] for record in read_metrics(workdir)[1] if record["split"] == "validation"][-1]


@pytest.mark.slow
def test_modern_beats_gpt2_and_muon_gives_a_part_of_it(tmp_path: Path):
    """One seed of the study since_gpt2, at a third of its tokens."""
    file, tokens = "experiments/since_gpt2/sweep.py", "--config.batch.total_tokens=30000"
    bits = {name: last_bits(tmp_path / name, f"{file}:variant={name}", tokens) for name in ("gpt2", "muon", "modern")}
    assert bits["gpt2"] - bits["modern"] > 0.1, bits
    assert bits["muon"] - bits["modern"] > 0.05, bits


@pytest.mark.slow
def test_recipes_improve_at_equal_compute(tmp_path: Path):
    """One seed of the study evolution, at a quarter of its compute."""
    file = "experiments/evolution/sweep.py"
    bits = {
        name: last_bits(tmp_path / name, f"{file}:generation={name},share=0.25") for name in ("gpt1", "gpt2", "modern")
    }
    assert bits["gpt1"] - bits["gpt2"] > 0.02, bits
    assert bits["gpt2"] - bits["modern"] > 0.1, bits


@pytest.mark.slow
def test_ppo_beats_its_start_by_the_gold_reward(tmp_path: Path):
    """One seed of the study instructgpt, with a smaller model that was not pretrained, and fewer completions."""
    done("experiments.instructgpt.task", f"--data={tmp_path}/data")

    def train(method: str, workdir: str, *overrides: str) -> None:
        config = f"experiments/instructgpt/sweep.py:method={method},root={tmp_path},reward=reward"
        sizes = ("--config.model.num_layers=2", "--config.model.embed_dim=64", "--config.model.num_heads=2")
        done("gptjax.main", f"--config={config}", f"--workdir={tmp_path}/{workdir}", *sizes, *overrides)

    train("sft", "sft", "--config.init_from=None", "--config.batch.epochs=1")
    files = (f"--prompts={tmp_path}/data/train.jsonl", f"--output={tmp_path}/data/rankings.jsonl")
    gold = "--gold=experiments.instructgpt.gold.gold_reward"
    done("experiments.rankings", f"--workdir={tmp_path}/sft", *files, gold, "--ranked=300")
    train("reward", "reward")
    train("ppo", "ppo", "--config.batch.total_tokens=36864")  # 6 iterations
    prompts = read_prompts(f"jsonl:{tmp_path}/data/held_out.jsonl")
    golds = [complete(load_model(tmp_path / name), prompts, 32).golds(gold_reward).mean() for name in ("sft", "ppo")]
    assert golds[1] - golds[0] > 0.3, golds
