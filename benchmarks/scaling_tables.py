"""Tabulates a plan that fits for every published size on v5e, v5p and v6e.

python -m benchmarks.scaling_tables
python -m benchmarks.scaling_tables --formula

Each is the first layout that fits in the planner's search. Compilations take a few minutes each on two CPU cores, and
are kept in the planner's cache. Needs pip install 'gptjax[tpu]'. With --formula, each is the fastest by formula of all
layouts, which takes seconds and no libtpu.
"""

import dataclasses
import runpy
from collections.abc import Mapping
from typing import TYPE_CHECKING

from absl import app, flags

from gptjax import config as c
from gptjax import plan

if TYPE_CHECKING:
    from gptjax.planning.estimate import StepEstimate

# One topology of each chip for a size: about as many chips as a run of that size would get.
TOPOLOGIES = {
    "gpt2.py:size=124m": ("v5e:2x2", "v5p:2x2x1", "v6e:2x2"),
    "gpt2.py:size=355m": ("v5e:2x4", "v5p:2x2x1", "v6e:2x2"),
    "gpt2.py:size=774m": ("v5e:4x4", "v5p:2x2x1", "v6e:2x4"),
    "gpt2.py:size=1558m": ("v5e:4x4", "v5p:2x2x4", "v6e:4x4"),
    "gpt3.py:size=small": ("v5e:4x4", "v5p:2x2x4", "v6e:4x4"),
    "gpt3.py:size=medium": ("v5e:4x4", "v5p:2x2x4", "v6e:4x4"),
    "gpt3.py:size=large": ("v5e:8x8", "v5p:2x2x4", "v6e:4x4"),
    "gpt3.py:size=xl": ("v5e:8x8", "v5p:4x4x4", "v6e:8x8"),
    "gpt3.py:size=2.7b": ("v5e:8x8", "v5p:4x4x4", "v6e:8x8"),
    "gpt3.py:size=6.7b": ("v5e:16x16", "v5p:4x4x4", "v6e:8x8"),
    "gpt3.py:size=13b": ("v5e:16x16", "v5p:4x4x4", "v6e:16x16"),
    "gpt3.py:size=175b": ("v5p:8x8x16", "v6e:16x16", "v5e:16x16"),
}
# No layout of these is searched by compiling: contexts of 131,072 tokens take long to compile.
BY_FORMULA_ONLY = {
    "gpt_oss.py:size=20b": ("v5e:16x16", "v5p:4x4x4", "v6e:16x16"),
    "gpt_oss.py:size=120b": ("v5e:16x16", "v5p:4x4x4", "v6e:16x16"),
}
TRIES = 6  # programs to compile before giving up on a topology
LAYOUT = "| config | topology | mesh | microbatch | remat | memory, GiB | MFU |"


def main(_: list[str]) -> None:
    plan.set_environment("v5e:1x1")
    header, rows, topologies = f"{LAYOUT} days | chip-hours |", row, TOPOLOGIES
    if FORMULA.value:
        header, rows, topologies = f"{LAYOUT} bound |", formula_row, TOPOLOGIES | BY_FORMULA_ONLY
    print(header)
    print("|---" * (header.count("|") - 1) + "|")
    for name in topologies:
        if ONLY.value in name:
            for topology in topologies[name]:
                print(rows(name, topology), flush=True)


def config_of(name: str) -> c.Config:
    path, _, argument = name.partition(":")
    config = c.resolve(runpy.run_path(f"configs/{path}")["get_config"](argument))
    return c.replace(config, {"model": {"vocab_size": config.model.vocab_size or 50_257}})


def formula_row(name: str, topology: str) -> str:
    """MFU with no communication overlapped to all of it, and the largest part of the step without overlap."""
    from gptjax.planning.formula_plan import FILLED, training_layout
    from gptjax.planning.topology import parse_topology

    place = parse_topology(topology, 1)
    assert place.chip is not None
    layout = training_layout(config_of(name), place, FILLED * place.chip.program_memory)
    if layout is None:
        return f"| `{name}` | {topology} | none fits | | | | | |"
    mesh, estimate = dataclasses.asdict(layout.config.mesh), layout.estimate
    cells = layout_cells(layout.config, mesh, layout.memory, place.chip.program_memory, estimate, estimate.serial)
    return f"| `{name}` | {topology} {cells} | {estimate.bound} |"


def row(name: str, topology: str) -> str:
    from gptjax.planning.estimate import estimate_training
    from gptjax.planning.topology import parse_topology

    config = config_of(name)
    steps = plan.search_steps(config, parse_topology(topology, 1), TRIES, enough=1)
    if not steps:
        return f"| `{name}` | {topology} | none found | | | | | | |"
    step = steps[0]
    assert step.estimate is not None
    assert step.capacity is not None
    run = estimate_training(step.config, step.estimate, step.serial)
    assert run is not None
    cells = layout_cells(step.config, step.mesh.shape, step.memory, step.capacity, step.estimate, step.serial)
    return f"| `{name}` | {topology} {cells} | {run.days:,.1f} | {run.chip_hours:,.0f} |"


def layout_cells(
    config: c.Config, mesh: Mapping[str, int], memory: float, capacity: float, estimate: "StepEstimate", serial: float
) -> str:
    """The columns from the mesh to the MFU: from seconds `serial` of a step to those with everything overlapped."""
    from gptjax.planning.compile import microbatches

    axes = ", ".join(f"{axis} {size}" for axis, size in mesh.items() if size > 1)
    mfus = " to ".join(f"{estimate.mfu(seconds):.2f}" for seconds in (serial, estimate.overlapped))
    return (
        f"| {axes} | {config.sequences_per_microbatch} x {microbatches(config)} | {config.model.remat} "
        f"| {memory / 2**30:.1f} of {capacity / 2**30:.1f} | {mfus}"
    )


if __name__ == "__main__":
    ONLY = flags.DEFINE_string("only", "", "Only sizes whose name contains this text, such as gpt2.")
    FORMULA = flags.DEFINE_bool("formula", False, "The fastest layout by formula, without compiling.")
    app.run(main)
