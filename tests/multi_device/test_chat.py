"""The chat stages on simulated devices have the losses of one device."""

from pathlib import Path
from typing import Any

import pytest

from tests.tiny_chats import STAGES_OF_CHAT

pytestmark = pytest.mark.slow

MESH = "data=2,fsdp=2,tensor=2"


@pytest.fixture(scope="module")
def results(run_script) -> dict[str, Any]:
    return run_script(Path(__file__).with_name("chat_on_meshes.py"), "one", MESH)


@pytest.mark.parametrize("stage", STAGES_OF_CHAT)
def test_many_devices_give_the_losses_of_one(results, stage):
    found, expected = results[MESH][stage], results["one"][stage]
    assert found["losses"] == pytest.approx(expected["losses"], rel=3e-5)
    assert found["validation"] == pytest.approx(expected["validation"], rel=3e-5)
    assert expected["losses"][-1] < expected["losses"][0]


@pytest.mark.parametrize("stage", ["ppo", "grpo"])
def test_policies_sample_and_learn_the_same(results, stage):
    found, expected = results[MESH][stage], results["one"][stage]
    assert found["rewards"] == expected["rewards"]
    assert len(expected["rewards"]) == 3
    for name in ("losses", "kl"):
        assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-4)
    assert found["validation"] == pytest.approx(expected["validation"], rel=1e-3, abs=1e-4)
