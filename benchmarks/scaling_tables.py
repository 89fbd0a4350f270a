"""Tabulates a plan that fits for every size of GPT-2 and GPT-3 on each of v5e, v5p and v6e.

python -m benchmarks.scaling_tables

Each is the first layout that fits in the planner's search. Compilations take a few minutes each on two CPU cores, and
are kept in the planner's cache. Needs pip install 'gptjax[tpu]'.
"""

import runpy

from absl import app, flags

from gptjax import config as c
from gptjax import plan

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
TRIES = 6  # programs to compile before giving up on a topology
HEADER = "| config | topology | mesh | microbatch | remat | memory, GiB | MFU | days | chip-hours |"


def main(_: list[str]) -> None:
    plan.set_environment("v5e:1x1")
    print(HEADER)
    print("|---" * (HEADER.count("|") - 1) + "|")
    for name, topologies in TOPOLOGIES.items():
        if ONLY.value in name:
            for topology in topologies:
                print(row(name, topology), flush=True)


def row(name: str, topology: str) -> str:
    from gptjax.planning.estimate import estimate_training
    from gptjax.planning.topology import parse_topology

    path, _, argument = name.partition(":")
    config = c.resolve(runpy.run_path(f"configs/{path}")["get_config"](argument))
    config = c.replace(config, {"model": {"vocab_size": config.model.vocab_size or 50_257}})
    steps = plan.search_steps(config, parse_topology(topology, 1), TRIES, enough=1)
    if not steps:
        return f"| `{name}` | {topology} | none found | | | | | | |"
    step = steps[0]
    assert step.estimate is not None
    assert step.capacity is not None
    mesh = ", ".join(f"{axis} {size}" for axis, size in step.mesh.shape.items() if size > 1)
    count = config.batch.tokens_per_batch // (step.config.sequences_per_microbatch * config.model.context_length)
    memory = f"{step.memory / 2**30:.1f} of {step.capacity / 2**30:.1f}"
    run = estimate_training(step.config, step.estimate, step.serial)
    assert run is not None
    mfus = " to ".join(f"{step.estimate.mfu(seconds):.2f}" for seconds in (step.serial, step.estimate.overlapped))
    return (
        f"| `{name}` | {topology} | {mesh} | {step.config.sequences_per_microbatch} x {count} "
        f"| {step.config.model.remat} | {memory} | {mfus} "
        f"| {run.days:,.1f} | {run.chip_hours:,.0f} |"
    )


if __name__ == "__main__":
    ONLY = flags.DEFINE_string("only", "", "Only sizes whose name contains this text, such as gpt2.")
    app.run(main)
