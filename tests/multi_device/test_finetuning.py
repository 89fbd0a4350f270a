"""Fine-tuning a part of the weights on simulated devices gives the losses of one, with the base spread over them."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

MESHES = ["fsdp=4", "fsdp=2,tensor=2"]


@pytest.fixture(scope="module")
def results(run_script) -> dict[str, Any]:
    names = [f"{mesh}+lora" for mesh in ("one", *MESHES)]
    return run_script(Path(__file__).with_name("finetune_on_meshes.py"), *names, devices=4)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_losses_of_one_device(results, mesh):
    found, expected = results[f"{mesh}+lora"], results["one+lora"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=3e-5)
    assert found["validation"] == pytest.approx(expected["validation"], rel=3e-5)


def test_the_base_is_spread_and_the_runs_learn(results):
    assert {mesh: results[f"{mesh}+lora"]["share"] for mesh in ("one", *MESHES)} == {
        "one": 1,
        "fsdp=4": 1 / 4,
        "fsdp=2,tensor=2": 1 / 4,
    }
    losses = results["one+lora"]["losses"]
    assert losses[-1] < losses[0] - 0.01
