"""OpenAI's own client for Node, unmodified. Run by `make clients`, which installs it into build/node."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.tiny_servers import LIMIT, wait_until

ROOT = Path(__file__).parents[2]
PACKAGES = ROOT / "build" / "node"


def test_the_node_client(server):
    node = shutil.which("node")
    if node is None or not (PACKAGES / "node_modules" / "openai").is_dir():
        pytest.skip("needs node and npm, with which `make clients` installs the package openai into build/node")
    script = Path(__file__).with_name("openai_client.mjs")
    result = subprocess.run([node, script, server.url, PACKAGES], capture_output=True, text=True, timeout=LIMIT)
    assert result.returncode == 0, result.stdout + result.stderr
    wait_until(lambda: server.engine.is_idle)  # after the requests that were aborted
