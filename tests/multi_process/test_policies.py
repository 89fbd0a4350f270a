"""A policy that two processes train writes and learns what it does in one."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from gptjax import config as c
from tests.tiny_chats import rl_config
from tests.tiny_tasks import MODEL, save_pretrained, write_config


def told(workdir: Path) -> list[dict[str, Any]]:
    """The records of a run."""
    _, *records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return records


def test_two_processes_write_and_learn_what_one_does(processes, tmp_path):
    # The byte tokenizer's 257, and 2 special tokens more, rounded up to divide over the tensor axis.
    pretrained = save_pretrained(tmp_path / "pretrained", settings=dataclasses.replace(MODEL, vocab_size=258))
    changes = {"model": {"vocab_size": 260}, "mesh": {"data": 1, "fsdp": 2, "tensor": 2}}
    config = c.replace(rl_config("ppo", tmp_path, pretrained), changes)
    command = ["-m", "gptjax.main", f"--config={write_config(tmp_path / 'config.py', config)}"]
    under_way = {
        count: processes(*command, f"--workdir={tmp_path / str(count)}", count=count, devices=4 // count)
        for count in (1, 2)
    }
    for started in under_way.values():
        for result in started.wait():
            assert result.returncode == 0, result.stderr
    one, two = told(tmp_path / "1"), told(tmp_path / "2")
    assert [(r["split"], r["step"]) for r in two] == [(r["split"], r["step"]) for r in one]
    rewards = [(r["reward"], r["response_tokens"]) for r in one if r["split"] == "rollout"]
    assert [(r["reward"], r["response_tokens"]) for r in two if r["split"] == "rollout"] == rewards
    assert len(rewards) == 3
    for of_one, of_two in zip(one, two, strict=True):
        for name in {"loss", "kl"} & of_one.keys():
            assert of_two[name] == pytest.approx(of_one[name], rel=1e-3, abs=1e-4), name
