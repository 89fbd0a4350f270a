"""Compiled for a TPU, int8 products are integer products forward and in the model's dtype backward."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu")


def test_the_compiled_products(tmp_path):
    out = tmp_path / "products.json"
    variables = {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1"}
    script = Path(__file__).with_name("int8_for_tpu.py")
    subprocess.run([sys.executable, script, out], env={**os.environ, **variables}, check=True)
    assert json.loads(out.read_text()) == {"forward": ["s32"], "backward": ["bf16", "bf16"]}
