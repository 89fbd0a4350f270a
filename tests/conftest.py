"""All tests run on CPU and raise on silent broadcasting; compiled programs are kept from one test run to the next."""

import contextlib
import gc
import json
import os
import resource
import shutil
import signal
from collections.abc import Callable, Generator, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

from tests import commands

# Environment variables, before anything imports jax: processes that tests start inherit them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path("~/.cache/gptjax/compiled-tests").expanduser()))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# Read when gcsfs is imported; it would ask Google, not the emulator, for the type of a bucket, and wait for the answer.
os.environ["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"
# JAX writes a program in place: another process may read a part of it, warns, and compiles it itself.
ignored = "ignore:Error reading persistent compilation cache entry:UserWarning"  # as in pyproject.toml
os.environ["PYTHONWARNINGS"] = ",".join(filter(None, [os.environ.get("PYTHONWARNINGS"), ignored]))
# Programs are compiled in a quarter of the time, and compute the same but for the last bits.
QUICK = [
    *("--xla_backend_optimization_level=0", "--xla_llvm_disable_expensive_passes=true"),
    "--xla_cpu_parallel_codegen_split_count=1",
]
if version("jaxlib").startswith("0.10."):  # later ones have the slower emitters only, and end the process at the flag
    QUICK += ["--xla_cpu_use_fusion_emitters=false"]
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *QUICK]).strip()
# A shell that starts the tests in the background lets them ignore SIGINT, and nohup lets them ignore SIGHUP; what they
# start would inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Compilation and a busy machine count as slowness. A change is tested on the same examples here and in CI;
# `pytest --hypothesis-profile=search` draws new ones.
settings.register_profile("search", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("gptjax", settings.get_profile("search"), derandomize=True)
settings.load_profile("gptjax")


def spent() -> float:
    """Returns the processor seconds of this process and of those that it started and that have ended."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages) + commands.processor_seconds()


class Costs:
    """Processor seconds of each folder of tests, printed after the tests of more than one folder.

    What several tests share counts where it is made: in the folder of the first of them.
    """

    def __init__(self) -> None:
        self.counted = 0.0  # processor seconds of this process that are in a report, or precede the first test
        self.of_folder: dict[str, float] = {}

    def pytest_collection_finish(self) -> None:
        commands.spare_collections()
        self.counted = spent()

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        now = spent()
        report.processor_seconds = now - self.counted  # an attribute of a report reaches the main process of xdist
        self.counted = now
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        folder = report.nodeid.partition("::")[0].rpartition("/")[0]
        self.of_folder[folder] = self.of_folder.get(folder, 0.0) + getattr(report, "processor_seconds", 0.0)

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if len(self.of_folder) > 1:
            terminalreporter.section("processor seconds by folder")
            for folder, seconds in sorted(self.of_folder.items(), key=lambda item: -item[1]):
                terminalreporter.line(f"{seconds:7.1f} {folder}")
            terminalreporter.line(f"{sum(self.of_folder.values()):7.1f} in total")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Costs())


def pytest_runtest_teardown(item: pytest.Item) -> None:
    """Collects what a test has left while the warnings that it ignores are ignored."""
    if item.get_closest_marker("filterwarnings") is not None:
        gc.collect()


@pytest.fixture(scope="module")
def run_script(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """`run_script(path, *arguments, devices=8)`: what a script writes to its first argument, as JSON.

    It runs in a process of its own, which alone can have several devices.
    """

    def run(path: Path, *arguments: str, devices: int = 8) -> Any:
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
        out = tmp_path_factory.mktemp("script") / "results.json"
        result = commands.run_command(path, out, *arguments, environment={"XLA_FLAGS": flags})
        assert result.returncode == 0, result.stderr
        return json.loads(out.read_text())

    return run


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workdir of tiny weights to fine-tune; nobody may change it."""
    from tests.tiny_tasks import save_pretrained

    return save_pretrained(tmp_path_factory.mktemp("pretrained"))


@pytest.fixture(scope="session")
def o200k_harmony(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The tokenizer of gpt-oss."""
    from gptjax.data.tokenizers import get_tokenizer

    cache_dir = tmp_path_factory.mktemp("o200k_harmony")
    return get_tokenizer("o200k_harmony", train_documents=list, corpus_fingerprint="", cache_dir=cache_dir)


@pytest.fixture
def file_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A server that huggingface_hub, s3fs and gcsfs take for the Hub and their buckets, with empty caches."""
    import fsspec
    from huggingface_hub import constants

    from tests.file_servers import serving

    with serving() as server:
        environment = {
            "AWS_ENDPOINT_URL": f"{server.url}/s3",
            "AWS_ACCESS_KEY_ID": "id",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "STORAGE_EMULATOR_HOST": server.url,
            "HF_ENDPOINT": server.url,
        }
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub/hub"))  # of the environment at import
        for protocol in ("https", "s3", "gs", "hf"):
            with contextlib.suppress(ImportError):
                fsspec.get_filesystem_class(protocol).clear_instance_cache()
        yield server


@pytest.fixture(scope="session")
def make_tiny() -> Callable[[Path], Any]:
    """Directory -> the config of a run small enough to train in a test."""
    from tests.tiny_runs import tiny_config

    return tiny_config


@pytest.fixture
def tiny(make_tiny: Callable[[Path], Any], tmp_path: Path) -> Any:
    """The config of a run small enough to train in a test."""
    return make_tiny(tmp_path)


@pytest.fixture(scope="session")
def original(make_tiny: Callable[[Path], Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """The config and workdir of a run with the checkpoints 4 and 6; nobody may change it."""
    from gptjax.config import replace
    from gptjax.run import run

    directory = tmp_path_factory.mktemp("original")
    changes = {
        "model": {"vocab_size": 257},
        "optimizer": {"schedule": "constant"},
        "evaluation": {"sample_tokens": 0},
        "checkpoint": {"keep_last": 2},
    }
    config = replace(make_tiny(directory), changes)
    run(config, directory / "run")
    return config, directory / "run"


@pytest.fixture
def trained(original: tuple[Any, Path], tmp_path: Path) -> tuple[Any, Path]:
    """The config of a run with the checkpoints 4 and 6, and a copy of its workdir."""
    config, workdir = original
    shutil.copytree(workdir, tmp_path / "run")
    return config, tmp_path / "run"
