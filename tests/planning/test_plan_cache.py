import dataclasses
from pathlib import Path
from typing import NoReturn

import pytest

from gptjax.config import Config, GPTConfig, replace
from gptjax.planning.compile import Compiled, Fits, Memory, TooBig, read_refusal
from gptjax.planning.plan_cache import compiled, key
from gptjax.planning.program_text import Collective
from gptjax.planning.topology import Topology
from gptjax.scaling.flops import TPU_CHIPS

CONFIG = Config(model=GPTConfig(vocab_size=128))
TOPOLOGY = Topology(TPU_CHIPS["v5e"], (2, 2))
FITS = Fits(Memory(1, 2, 3, 4), [Collective("all-gather", 5, (0, 1), 6)], 7.5)


def never() -> NoReturn:
    raise AssertionError("compiled again")


@pytest.mark.parametrize("result", [FITS, TooBig(20, 16)])
def test_what_was_compiled_is_not_compiled_again(tmp_path: Path, result: Compiled) -> None:
    assert compiled("step", CONFIG, TOPOLOGY, tmp_path, lambda: result) == result
    assert compiled("step", CONFIG, TOPOLOGY, tmp_path, never) == result


def test_without_a_directory_nothing_is_kept(tmp_path: Path) -> None:
    assert compiled("step", CONFIG, TOPOLOGY, None, lambda: FITS) == FITS
    assert not list(tmp_path.iterdir())


def test_a_damaged_file_is_compiled_again(tmp_path: Path) -> None:
    compiled("step", CONFIG, TOPOLOGY, tmp_path, lambda: FITS)
    (file,) = tmp_path.iterdir()
    file.write_text(file.read_text()[:-9])
    assert compiled("step", CONFIG, TOPOLOGY, tmp_path, lambda: TooBig(2, 1)) == TooBig(2, 1)
    assert compiled("step", CONFIG, TOPOLOGY, tmp_path, never) == TooBig(2, 1)


def test_the_key_changes_with_all_that_a_program_depends_on() -> None:
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


@pytest.mark.parametrize(
    ("message", "needed", "capacity"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.50G of 15.75G hbm. Exceeded", 20.5, 15.75),
        ("the total memory required for HLO temporaries (2.00T) exceeds available HBM (95.5G).", 2048, 95.5),
    ],
)
def test_the_compiler_tells_what_a_program_needs(message: str, needed: float, capacity: float) -> None:
    assert read_refusal(message) == TooBig(round(needed * 2**30), round(capacity * 2**30))


def test_other_errors_of_the_compiler_are_not_about_memory() -> None:
    assert read_refusal("INTERNAL: Mosaic failed to compile") is None
