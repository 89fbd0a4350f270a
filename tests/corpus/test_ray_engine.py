"""Preparation by Ray Data: the same files as by one process, also when a worker is killed."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gptjax.corpus.executors import Executor
from gptjax.corpus.recipe import Recipe
from gptjax.corpus.run_preparation import prepare_corpus

ray = pytest.importorskip("ray")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own


@pytest.fixture(scope="module")
def two_workers() -> Iterator[None]:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


def files_of(directory: Path) -> dict[str, bytes]:
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}


@pytest.mark.usefixtures("two_workers")
def test_ray_writes_the_files_of_one_process_and_survives_a_killed_worker(
    documents: list[str], recipe_of: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "task.jsonl").write_text(json.dumps({"text": documents[3][:200]}) + "\n")
    texts = [*documents, *documents[:5], *(text + " end" for text in documents[:5])]
    recipe = recipe_of(texts, duplicates="near", tasks=(str(tmp_path / "task.jsonl"),))
    prepare_corpus(recipe, tmp_path / "one", tmp_path, Executor())
    killed: list[int] = []

    def kill_one() -> None:
        while not killed:
            out = subprocess.run(["ps", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
            # Only workers of this Ray, which descend from this process.
            running = [int(line.split()[0]) for line in out.splitlines() if "ray::Map" in line]
            own = [pid for pid in running if _descends(pid)]
            if own and (tmp_path / "ray" / "work" / "read").exists():
                os.kill(own[0], signal.SIGKILL)
                killed.append(own[0])
            time.sleep(0.005)

    threading.Thread(target=kill_one, daemon=True).start()
    prepare_corpus(recipe, tmp_path / "ray", tmp_path, Executor(2, "ray"))
    assert killed
    assert files_of(tmp_path / "ray") == files_of(tmp_path / "one")
    assert sys.modules["ray"] is ray


def _descends(pid: int) -> bool:
    while pid > 1:
        if pid == os.getpid():
            return True
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            return False
    return False
