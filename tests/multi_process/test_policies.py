"""A policy trained by two processes with two devices each has the files and metrics of one process."""

from typing import Any

import pytest

from gptjax import config as c
from gptjax.training.metrics_file import read_metrics
from tests.tiny_chats import DIVISIBLE, rl_config, save_divisible
from tests.tiny_tasks import write_config

pytestmark = pytest.mark.slow


def rollouts(records: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Mean reward and length of the answers of each iteration."""
    return [(r["reward"], r["response_tokens"]) for r in records if r["split"] == "rollout"]


def test_two_processes_write_and_learn_what_one_does(processes, tmp_path):
    config = c.replace(rl_config("ppo", tmp_path, save_divisible(tmp_path / "pretrained")), {"model": DIVISIBLE})
    meshes = {1: {}, 2: {"data": 1, "fsdp": 2, "tensor": 2}}
    under_way = {}
    for count, mesh in meshes.items():
        path = write_config(tmp_path / f"config{count}.py", c.replace(config, {"mesh": mesh}))
        command = ["gptjax.main", f"--config={path}", f"--workdir={tmp_path / str(count)}"]
        under_way[count] = processes(*command, count=count, devices=count)
    for started in under_way.values():
        for result in started.wait():
            assert result.returncode == 0, result.stderr
    one, two = (read_metrics(tmp_path / str(count))[1] for count in under_way)
    assert [(r["split"], r["step"]) for r in two] == [(r["split"], r["step"]) for r in one]
    assert rollouts(two) == rollouts(one)
    assert len(rollouts(one)) == 3
    for of_one, of_two in zip(one, two, strict=True):
        for name in {"loss", "kl"} & of_one.keys():
            assert of_two[name] == pytest.approx(of_one[name], rel=1e-3, abs=1e-4), name
