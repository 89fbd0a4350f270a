"""Plans for TPUs, compiled by libtpu: the whole command, on a model that compiles in seconds."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("libtpu")

ROOT = Path(__file__).parents[2]
TINY = """
from gptjax import config as c

def get_config(arg=None):
    return c.config_dict(c.Config(
        model=c.GPTConfig(context_length=128, num_layers=1, num_heads=1, embed_dim=128),
        data=c.DataConfig(tokenizer="bytes"),
        batch=c.BatchConfig(total_tokens=10_000_000, tokens_per_batch=8 * 128),
    ))
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("home")
    (directory / "tiny.py").write_text(TINY)
    return directory


def plan(home: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "gptjax.plan", f"--config={home / 'tiny.py'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "HOME": str(home)})


def test_a_step_for_four_chips(home):
    result = plan(home, "--topology=v5e:2x2", "--config.mesh.data=2", "--config.mesh.fsdp=2", "--json=-")
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout)
    memory = numbers["memory"]
    assert memory["capacity"] == 15.75 * 2**30  # what libtpu leaves of 16 GiB
    assert memory["parameters"] + memory["optimizer"] < memory["arguments"] < memory["total"] < memory["capacity"]
    assert {axis for part in numbers["communication"] for axis in part["axes"]} == {"data", "fsdp"}
    estimate = numbers["estimate"]
    parts = [estimate[name] for name in ("compute", "hbm", "busiest", "dcn")]
    assert estimate["overlapped"]["seconds"] == max(parts)
    assert 0 < estimate["serial"]["mfu"] < estimate["overlapped"]["mfu"] < 1
    assert estimate["serial"]["training"]["steps"] == 9766
    # Only the program's own messages reach the terminal, not libtpu's log.
    assert result.stderr in ("", "compiling the training step for v5e:2x2 ...\n")


def test_out_of_memory_is_one_line(home):
    result = plan(home, "--topology=v5e:2x2", "--config.model.vocab_size=60000000")
    assert result.returncode == 2
    assert "GiB of a device's 15.75" in result.stderr.splitlines()[-1]
    assert "--search looks for a layout" in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr


def test_a_search_prints_the_flags_of_its_plan(home):
    result = plan(home, "--topology=v5e:2x2", "--search", "--search_limit=1", f"--json={home / 'found.json'}")
    assert result.returncode == 0, result.stderr
    (found,) = json.loads((home / "found.json").read_text())["plans"]
    flags = result.stdout.strip().splitlines()[-1]
    assert flags == found["flags"]
    again = plan(home, "--topology=v5e:2x2", *flags.split(), "--json=-")
    assert {**json.loads(again.stdout), "flags": flags} == found  # from the cache: the same key


def test_decoding_fills_the_memory(home):
    longer = ("--config.model.context_length=1024", "--config.batch.tokens_per_batch=8192")
    result = plan(home, "--topology=v5e:2x2", "--decode", "--json=-", *longer)
    assert result.returncode == 0, result.stderr
    numbers = json.loads(result.stdout)
    assert numbers["cache_bytes_per_sequence"] == 2 * 1024 * 128 * 2
    assert numbers["weight_bytes"] < numbers["decode_memory"]["total"] <= 15.75 * 2**30
    assert numbers["decode_memory"]["total"] > 0.8 * 15.75 * 2**30


def test_two_slices_are_joined_by_data(home):
    result = plan(
        home, "--topology=v5e:2x2", "--num_slices=2", "--config.mesh.data=2", "--config.mesh.fsdp=4", "--json=-"
    )
    assert result.returncode == 0, result.stderr
    network = {tuple(part["axes"]): part["dcn_seconds"] for part in json.loads(result.stdout)["communication"]}
    assert network.pop(("data",)) > 0
    assert set(network.values()) == {0}
    refused = plan(home, "--topology=v5e:2x2", "--num_slices=2", "--config.mesh.data=1", "--config.mesh.fsdp=8")
    assert refused.returncode == 2
    assert "2 slices" in refused.stderr.splitlines()[-1]
