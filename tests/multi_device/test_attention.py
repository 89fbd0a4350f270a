"""Attention kernels on a mesh: each device computes its own rows and heads; the fallback where they do not divide."""

from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def results(run_script) -> dict[str, Any]:
    return run_script(Path(__file__).with_name("attend_on_meshes.py"), devices=4)


@pytest.mark.parametrize("case", ["rows and heads", "rows that do not divide", "positions"])
def test_a_mesh_gives_what_one_device_gives(results, case):
    assert results[case]["error"] < 1e-5


def test_kernels_get_whole_rows_and_heads_and_gather_nothing(results):
    assert results["rows and heads"]["kernels"]
    assert not results["rows and heads"]["gathers"]


@pytest.mark.parametrize("case", ["rows that do not divide", "positions"])
def test_what_no_device_has_whole_is_left_to_xla(results, case):
    assert not results[case]["kernels"]
