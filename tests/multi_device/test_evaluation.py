"""Eight simulated devices give the scores of one, however they are arranged."""

from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

MESHES = ["data=8", "fsdp=4,data=2", "tensor=4,data=2", "context=2,data=4"]


@pytest.fixture(scope="module")
def results(run_script) -> dict[str, Any]:
    return run_script(Path(__file__).with_name("score_on_meshes.py"), *MESHES)


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_scores_of_one_device(results, mesh):
    assert results[mesh]["logprobs"] == pytest.approx(results["one"]["logprobs"], rel=2e-5)
    assert results[mesh]["greedy"] == results["one"]["greedy"]


@pytest.mark.parametrize("mesh", MESHES)
def test_the_fingerprint_does_not_depend_on_the_mesh(results, mesh):
    assert results[mesh]["fingerprint"] == results["one"]["fingerprint"]


def test_batches_fill_the_mesh(results):
    """Two requests to a batch, rounded up to the shards of the batch."""
    rows = {mesh: results[mesh]["rows"] for mesh in ["one", *MESHES]}
    assert rows == {"one": 2, "data=8": 8, "fsdp=4,data=2": 8, "tensor=4,data=2": 2, "context=2,data=4": 4}
