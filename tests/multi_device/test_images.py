"""Training on images on simulated devices has the losses of one device."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

MESH = "data=2,fsdp=2,tensor=2"


def test_many_devices_give_the_losses_of_one(run_script):
    results = run_script(Path(__file__).with_name("images_on_meshes.py"), "one", MESH)
    found, expected = results[MESH], results["one"]
    assert found["losses"] == pytest.approx(expected["losses"], rel=3e-5)
    assert found["validation"] == pytest.approx(expected["validation"], rel=3e-5)
    assert expected["losses"][-1] < expected["losses"][0]
