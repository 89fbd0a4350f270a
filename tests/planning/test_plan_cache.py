import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

import pytest

import gptjax
from gptjax.config import Config, GPTConfig, replace
from gptjax.planning.compile import CompiledProgram, CompileResult, DeviceMemory, OutOfMemory, read_refusal
from gptjax.planning.plan_cache import SOURCES, compile_cached, key
from gptjax.planning.program_text import Collective
from gptjax.planning.topology import Topology
from gptjax.scaling.devices import TPU_CHIPS

CONFIG = Config(model=GPTConfig(vocab_size=128))
TOPOLOGY = Topology(TPU_CHIPS["v5e"], (2, 2))
FITS = CompiledProgram(DeviceMemory(1, 2, 3, 4), [Collective("all-gather", 5, (0, 1), 6)], 7.5)


def never() -> NoReturn:
    raise AssertionError("compiled again")


@pytest.mark.parametrize("result", [FITS, OutOfMemory(20, 16)])
def test_a_cached_program_is_not_compiled_again(tmp_path: Path, result: CompileResult) -> None:
    assert compile_cached("step", CONFIG, TOPOLOGY, tmp_path, lambda: result) == result
    assert compile_cached("step", CONFIG, TOPOLOGY, tmp_path, never) == result


def test_without_a_directory_nothing_is_cached(tmp_path: Path) -> None:
    assert compile_cached("step", CONFIG, TOPOLOGY, None, lambda: FITS) == FITS
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_compiled_again(tmp_path: Path) -> None:
    compile_cached("step", CONFIG, TOPOLOGY, tmp_path, lambda: FITS)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-9])
    assert compile_cached("step", CONFIG, TOPOLOGY, tmp_path, lambda: OutOfMemory(2, 1)) == OutOfMemory(2, 1)
    assert compile_cached("step", CONFIG, TOPOLOGY, tmp_path, never) == OutOfMemory(2, 1)


def test_the_key_changes_with_everything_a_program_depends_on() -> None:
    other_configs = [
        replace(CONFIG, {section: changes})
        for section, changes in (
            ("model", {"remat": "full"}),
            ("optimizer", {"ema_decay": 0.9}),
            ("mesh", {"fsdp": 2}),
            ("batch", {"microbatch_size": 4}),
            ("batch", {"tokens_per_batch": 1024}),
            ("data", {"packing": "segment"}),
        )
    ]
    keys = [key("step", config, TOPOLOGY) for config in (CONFIG, *other_configs)]
    keys += [key("decode", CONFIG, TOPOLOGY), key("step", CONFIG, dataclasses.replace(TOPOLOGY, num_slices=2))]
    assert len(set(keys)) == len(keys)
    same = replace(
        CONFIG, {"batch": {"total_tokens": 5}, "data": {"source": "shakespeare"}, "logging": {"every_steps": 3}}
    )
    assert key("step", same, TOPOLOGY) == keys[0]


def test_the_key_covers_the_source_of_every_module_that_builds_a_program() -> None:
    """All modules that planning a step or decoding imports, except those that do not affect a program."""
    root = Path(gptjax.__file__).parent
    covered = {path for pattern in SOURCES for path in root.glob(pattern)}
    assert all(list(root.glob(pattern)) for pattern in SOURCES)
    show = "import sys, gptjax.planning.compile, gptjax.planning.decode_plan\n"
    show += "print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('gptjax.')), sep='\\n')"
    run = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
    imported = {Path(line) for line in run.stdout.splitlines()}
    # Configs are in the key; data, metrics, files and processes do not enter the program.
    elsewhere = {"config", "data", "metrics", "scaling", "distributed"}
    elsewhere |= {"files.py", "object_store.py", "bucket_client.py", "user_error.py"}
    missing = {path.relative_to(root).as_posix() for path in imported - covered if path.name != "__init__.py"}
    assert {name for name in missing if Path(name).parts[0] not in elsewhere} <= {"planning/topology.py"}


@pytest.mark.parametrize(
    ("message", "needed", "capacity"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5, 15.75),
        ("the total memory required for HLO temporaries (2.00T) exceeds available HBM (95.5G).", 2048, 95.5),
    ],
)
def test_out_of_memory_errors_are_parsed(message: str, needed: float, capacity: float) -> None:
    assert read_refusal(message) == OutOfMemory(round(needed * 2**30), round(capacity * 2**30))


def test_other_compiler_errors_are_not_about_memory() -> None:
    assert read_refusal("INTERNAL: Mosaic failed to compile") is None
