"""Imported models with rotary positions compute on eight simulated devices what they compute on one."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

MESHES = {
    "fsdp=8": 1 / 8,
    "fsdp=2,tensor=4": 1 / 8,
    "data=2,expert=4": 1 / 4,
    "context=4,fsdp=2": 1 / 2,
    "expert=2,tensor=2,context=2": 1 / 4,
}
TOLERANCE = 1e-4  # of logits up to 10, in float32: sums are split differently


@pytest.fixture(scope="module")
def results(run_script) -> dict[str, Any]:
    return run_script(Path(__file__).with_name("import_on_meshes.py"), *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("name", ["gpt_oss", "qwen3"])
def test_every_mesh_computes_the_logits_and_tokens_of_one_device(results, name, mesh):
    one, spread = results[name]["one"], results[name][mesh]
    assert 1 < one["size"] < 20
    assert 0 < spread["error"] < TOLERANCE
    assert spread["greedy"] == one["greedy"]
    assert min(len(set(tokens)) for tokens in one["greedy"]) > 5


@pytest.mark.parametrize(("mesh", "share"), MESHES.items())
def test_the_experts_are_sharded(results, mesh, share):
    """The equality above would hold for parameters that every device has."""
    assert results["gpt_oss"][mesh]["share"] == share
