"""Scripts that run in a process of their own, which alone can have several devices."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


@pytest.fixture(scope="module")
def run_script(tmp_path_factory) -> Callable[..., Any]:
    """`run_script(name, *arguments, devices=8)`: what a script of this folder writes to its first argument, as JSON."""

    def run(name: str, *arguments: str, devices: int = 8) -> Any:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        out = tmp_path_factory.mktemp("script") / "results.json"
        command = [sys.executable, Path(__file__).with_name(name), out, *arguments]
        subprocess.run(command, env={**os.environ, "XLA_FLAGS": flags}, check=True)
        return json.loads(out.read_text())

    return run
