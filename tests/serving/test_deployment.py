"""The files of deploy/: their flags exist, and their ports and paths agree."""

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "deploy" / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def pod() -> dict[str, Any]:
    deployment, _ = yaml.safe_load_all((ROOT / "deploy" / "gke-tpu.yaml").read_text())
    found: dict[str, Any] = deployment["spec"]["template"]["spec"]
    return found


def test_flags_exist(pod) -> None:
    serve = (ROOT / "gptjax" / "serve.py").read_text()
    defined = set(re.findall(r'DEFINE_\w+\(\s*"(\w+)"', serve))
    entry = next(line for line in DOCKERFILE.splitlines() if line.startswith("ENTRYPOINT"))
    used = re.findall(r"--(\w+)=", " ".join([entry, *pod["containers"][0]["args"]]))
    assert used
    assert set(used) <= defined


def test_the_image_has_what_the_server_needs() -> None:
    extras = set(re.findall(r'^        "([\w-]+)":', (ROOT / "setup.py").read_text(), re.MULTILINE))
    named = {name for value in re.findall(r"EXTRAS=([\w,]+)", DOCKERFILE) for name in value.split(",")}
    assert {"serve", "cuda", "tpu", "remote"} <= named <= extras
    copied = [word for line in re.findall(r"^COPY (.*) \S+$", DOCKERFILE, re.MULTILINE) for word in line.split()]
    assert copied
    assert [name for name in copied if not (ROOT / name).exists()] == []


def test_the_pod_ends_after_the_server(pod) -> None:
    container = pod["containers"][0]
    drain = next(int(flag.partition("=")[2]) for flag in container["args"] if flag.startswith("--drain_seconds"))
    assert pod["terminationGracePeriodSeconds"] > drain
    assert {container[probe]["httpGet"]["path"] for probe in container if probe.endswith("Probe")} == {"/health"}
    assert f"--port={container['ports'][0]['containerPort']}" in DOCKERFILE
