"""Compiled for a TPU, the splash kernels do not materialise the T x T scores."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("libtpu")

SCRIPT = Path(__file__).with_name("compile_for_tpu.py")
LAYERS = ["dense 64", "banded 80", "dense 96", "banded 128"]


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[str, Any]:
    """What the script writes, in a process of its own: libtpu is configured for no TPU, and for concurrent loading."""
    out = tmp_path_factory.mktemp("tpu") / "compiled.json"
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    subprocess.run([sys.executable, SCRIPT, out], env={**os.environ, **variables}, check=True)
    return json.loads(out.read_text())


@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_is_three_kernels_and_talks_to_no_other_device(results, layer):
    assert results[layer]["kernels"] == 3  # forward; gradient of q; gradients of k and v
    assert not results[layer]["collectives"]


@pytest.mark.parametrize("layer", LAYERS)
def test_memory_has_no_room_for_the_scores(results, layer):
    scores = 4 * 4 * 2048 * 2048 * 4  # float32 of the 4 rows and 4 heads of a device
    assert results["xla"]["kernels"] == 0
    assert results["xla"]["temp_bytes"] > scores
    assert results[layer]["temp_bytes"] < scores / 5


def test_keeping_what_attention_returned_spares_its_recomputation(results):
    assert (results["dense 64"]["kernels"], results["not kept"]["kernels"]) == (3, 4)
