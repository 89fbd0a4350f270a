"""Attention kernels on a mesh: each device computes its own rows and heads, and where it cannot there is no kernel."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("attend_on_meshes.py")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    """What the script writes, run in a process of its own with four devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    out = tmp_path_factory.mktemp("attention") / "results.json"
    subprocess.run([sys.executable, SCRIPT, out], env={**os.environ, "XLA_FLAGS": flags}, check=True)
    return json.loads(out.read_text())


@pytest.mark.parametrize("case", ["rows and heads", "rows that do not divide", "positions"])
def test_a_mesh_gives_what_one_device_gives(results, case):
    assert results[case]["error"] < 1e-5


def test_kernels_get_whole_rows_and_heads_and_gather_nothing(results):
    assert results["rows and heads"]["kernels"]
    assert not results["rows and heads"]["gathers"]


@pytest.mark.parametrize("case", ["rows that do not divide", "positions"])
def test_what_no_device_has_whole_is_left_to_xla(results, case):
    assert not results[case]["kernels"]
