"""All tests run on CPU and raise on silent broadcasting; compiled programs are kept from one test run to the next."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Environment variables, before anything imports jax: processes that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/gptjax/compiled-tests").expanduser()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Programs are compiled in little more than half the time, and compute the same but for the last bits.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
# A shell that starts the tests in the background lets them ignore SIGINT, and what they start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="module")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`run_script(path, *arguments, devices=8)`: what a script writes to its first argument, as JSON.

    It runs in a process of its own, which alone can have several devices.
    """

    def run(path: Path, *arguments: str, devices: int = 8) -> Any:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        out = tmp_path_factory.mktemp("script") / "results.json"
        environment = {**os.environ, "XLA_FLAGS": flags, "PYTHONPATH": str(Path(__file__).parents[1])}
        subprocess.run([sys.executable, path, out, *arguments], env=environment, check=True)
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir of tiny weights to fine-tune; nobody may change it."""
    from tests.tiny_tasks import save_pretrained

    return save_pretrained(tmp_path_factory.mktemp("pretrained"))
