"""Eight simulated devices give the losses of one, however they are arranged."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("train_on_meshes.py")
MESHES = ["data=8", "fsdp=8", "tensor=4,data=2", "context=2,expert=4", "data=2,fsdp=2,tensor=2"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    """What the script writes, run in a process of its own with eight devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"
    out = tmp_path_factory.mktemp("meshes") / "losses.json"
    subprocess.run([sys.executable, SCRIPT, out, *MESHES], env={**os.environ, "XLA_FLAGS": flags}, check=True)
    return json.loads(out.read_text())


@pytest.mark.parametrize("mesh", MESHES)
def test_every_mesh_gives_the_losses_and_the_sample_of_one_device(results, mesh):
    # float32 sums in another order, through 6 steps at a high learning rate.
    assert results[mesh]["losses"] == pytest.approx(results["one"]["losses"], rel=2e-5)
    assert results[mesh]["sample"] == results["one"]["sample"]


def test_the_run_compared_learns(results):
    assert results["one"]["losses"][-1] < results["one"]["losses"][0] - 0.5


def test_parameters_are_spread(results):
    """The equality above would hold for a table that shards nothing."""
    shares = {mesh: results[mesh]["share"] for mesh in MESHES}
    assert shares == dict(zip(MESHES, [1, 1 / 8, 1 / 4, 1, 1 / 4], strict=True))
