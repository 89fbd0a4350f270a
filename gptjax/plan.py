"""Plans training and generation on TPUs without a TPU.

python -m gptjax.plan --config=configs/gpt_oss.py:size=120b
python -m gptjax.plan --config=configs/gpt2.py:size=124m --topology=v5e:2x2 --search
python -m gptjax.plan --config=configs/gpt3.py:size=175b --topology=v5p:8x8x16 --config.model.vocab_size=50304 \
    --config.mesh.data=1 --config.mesh.fsdp=64 --config.mesh.tensor=16 --config.batch.microbatch_size=64 \
    --config.batch.ramp_start_tokens=131072 --config.model.remat=full

Without --topology, layouts for slices of several sizes are found by formula, in seconds. With it, the
training step is compiled ahead of time, and memory, collectives and time are reported. That needs libtpu, which
contains the TPU compiler (pip install 'gptjax[tpu]'). `--topology=cpu:8` compiles for simulated CPU devices.
"""

import dataclasses
import json
import os
import re
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from absl import flags

from gptjax import cli
from gptjax.config import Config, UserError
from gptjax.files import expand

if TYPE_CHECKING:
    from gptjax.planning.report import StepPlan
    from gptjax.planning.topology import Topology

CONFIG = cli.ConfigFlag()
TOPOLOGY = flags.DEFINE_string(
    "topology",
    None,
    "CHIP:SHAPE, such as v5e:4x4 or v5p:8x8x16; all: an overview of many; cpu:N: N simulated devices. Without it: "
    "layouts on slices of v5e, v5p and v6e by formula, without libtpu.",
)
NUM_SLICES = flags.DEFINE_integer("num_slices", 1, "Slices of that shape, connected by the data-centre network.")
SEARCH = flags.DEFINE_bool(
    "search", False, "Search mesh, microbatch size and rematerialisation, and print their flags."
)
SEARCH_LIMIT = flags.DEFINE_integer(
    "search_limit", 4, "Maximum number of programs that a search compiles.", lower_bound=1
)
DECODE = flags.DEFINE_bool("decode", False, "Plan generation instead of training.")
WEIGHTS = flags.DEFINE_enum(
    "weights", "bfloat16", ["as_given", "bfloat16", "int8"], "With --decode: the dtype of weights."
)
JSON = flags.DEFINE_string(
    "json", None, "Write the plan to this JSON file; -: print JSON to standard output instead of the table."
)
CACHE = flags.DEFINE_bool("cache", True, "Cache compilation results in ~/.cache/gptjax/plans.")

# Keeps libtpu from looking for a TPU, and from logging that there is none.
ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_WORKER_ID": "0",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_MIN_LOG_LEVEL": "3",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",  # programs compiled without a client cannot be loaded from it
}


def main() -> None:
    config = CONFIG.load()
    if config is None:
        raise UserError("needs --config=FILE, such as --config=configs/gpt_oss.py:size=120b")
    reads_images = config.model.reads_images
    if reads_images and TOPOLOGY.value in (None, "all"):
        raise UserError("a model that reads images is planned for one --topology=CHIP:SHAPE: name it")
    if reads_images and (config.init_from is not None or config.peft.method != "none" or SEARCH.value or DECODE.value):
        raise UserError(
            "a model that reads images is planned with all weights trained: leave out init_from, peft, --search and "
            "--decode"
        )
    if TOPOLOGY.value is None and (SEARCH.value or NUM_SLICES.value != 1):
        raise UserError("--search and --num_slices need --topology=CHIP:SHAPE, such as --topology=v5e:2x2")
    if DECODE.value and TOPOLOGY.value == "all":
        raise UserError("--decode plans one topology: name it in place of --topology=all, or give none for all of them")
    set_environment(TOPOLOGY.value or "")
    from gptjax.data.tokenizers import vocab_size
    from gptjax.planning import topology
    from gptjax.stages import registry

    definition = registry.definition(config)
    if not definition.rows_of_context or definition.conversational != reads_images:
        other = "supervised fine-tuning (sft)" if reads_images else "pretraining"
        raise UserError(f"a run of stage {config.stage} cannot be planned: plan {other} of the same model")

    tokens = vocab_size(config.data.tokenizer)
    model = config.model.with_vocabulary(tokens + reads_images)  # the chat format adds more tokens, too few to matter
    vision = dataclasses.replace(model.vision, image_token=tokens if reads_images else None)
    config = dataclasses.replace(config, model=dataclasses.replace(model, vision=vision))
    if TOPOLOGY.value is None:
        check_ranking(config)
        plan_by_formula(config)
        return
    if TOPOLOGY.value == "all":
        check_ranking(config)
        plan_all(config)
        return
    where = topology.parse_topology(TOPOLOGY.value, NUM_SLICES.value)
    topology.check_libtpu(where)
    if where.chip is None and (SEARCH.value or DECODE.value):
        raise UserError("--search and --decode need a TPU topology: the memory limit of cpu:N is unknown")
    if DECODE.value and SEARCH.value:
        check_ranking(config)
        plan_decoding_search(config, where)
    elif DECODE.value:
        plan_decoding(config, where)
    elif SEARCH.value:
        check_ranking(config)
        plan_search(config, where)
    else:
        plan_step(config, where)


def check_ranking(config: Config) -> None:
    """Raises UserError if a search could not rank plans by time."""
    if config.model.dtype == "float32":
        raise UserError(
            "plans are ranked by estimated time, and TPUs have no published peak for model.dtype=float32: search with "
            "--config.model.dtype=bfloat16"
        )


def set_environment(topology: str) -> None:
    """Sets the environment variables that JAX reads when it is imported: only this machine's CPU is used."""
    os.environ.update(ENVIRONMENT)
    if (devices := re.fullmatch(r"cpu:(\d+)", topology)) is not None:
        count = f"--xla_force_host_platform_device_count={devices[1]}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {count}"


def plan_by_formula(config: Config) -> None:
    """Plans training (unless --decode is given) and generation on slices of several sizes, without compiling.

    Raises:
      UserError: nothing fits anywhere.
    """
    from gptjax.planning.formula_plan import formula_json, formula_table, plan_topologies

    plans = []
    for plan in plan_topologies(config, cast(Any, WEIGHTS.value), training=not DECODE.value):
        plans.append(plan)
        found = [name for name, part in (("training", plan.training), ("generation", plan.decoding)) if part]
        say(f"{plan.topology.name}: {'layout for ' + ' and '.join(found) if found else 'nothing fits'}")
    if all(plan.training is None and plan.decoding is None for plan in plans):
        raise UserError("nothing fits any of the slices tried: plan larger ones by --topology=CHIP:SHAPE --search")
    output(formula_table(config, plans), formula_json(config, plans))


def plan_step(config: Config, where: "Topology") -> None:
    """Plans the config's own layout.

    Raises:
      UserError: the step does not fit.
    """
    from gptjax.planning import topology
    from gptjax.planning.compile import OutOfMemory
    from gptjax.planning.estimate import axis_traffic, estimate_step
    from gptjax.planning.report import step_json, step_table

    mesh = topology.lay_out(config.mesh, where)
    compiled = compile_step(where)(config, mesh)
    if isinstance(compiled, OutOfMemory):
        needed, capacity = compiled.needed / 2**30, compiled.capacity / 2**30
        raise UserError(
            f"the training step does not fit {where.name}: it needs {needed:.2f} GiB of a device's {capacity:.2f}, "
            f"{needed - capacity:.2f} too many: --search looks for a layout that fits"
        )
    communication = axis_traffic(compiled.collectives, mesh, where)
    step = make_step(config, where, mesh, compiled, communication, estimate_step(config, mesh, where, communication))
    output(step_table(step), step_json(step))


def plan_search(config: Config, where: "Topology") -> None:
    """Plans the fastest layouts that a search finds, with the flags that set them."""
    from gptjax.planning.report import step_json, step_table
    from gptjax.planning.search import override_flags

    steps = search_steps(config, where, SEARCH_LIMIT.value)
    if not steps:
        raise UserError(
            f"no layout that fits {where.name} was found in {SEARCH_LIMIT.value} tries: use more or larger chips "
            "(--topology=all lists some), or raise --search_limit"
        )
    texts, trees = [], []
    for number, step in enumerate(steps, start=1):
        line = " ".join(override_flags(config, step.config))
        texts.append(
            f"plan {number} of {len(steps)}, ranked by step time without overlap\n\n{step_table(step)}\n\n{line}"
        )
        trees.append(step_json(step) | {"flags": line})
    output("\n\n".join(texts[::-1]), {"plans": trees})


def plan_all(config: Config) -> None:
    """Plans every topology of `all_topologies`: the first layout that fits."""
    from gptjax.planning.report import overview, step_json
    from gptjax.planning.search import override_flags
    from gptjax.planning.topology import all_topologies, check_libtpu

    rows: list[tuple[str, StepPlan | str]] = []
    trees: dict[str, Any] = {}
    for where in all_topologies():
        check_libtpu(where)
        steps = search_steps(config, where, SEARCH_LIMIT.value, enough=1)
        rows.append((where.name, steps[0] if steps else "does not fit"))
        trees[where.name] = (
            step_json(steps[0]) | {"flags": " ".join(override_flags(config, steps[0].config))} if steps else None
        )
    output(overview(rows), trees)


def search_steps(config: Config, where: "Topology", limit: int, enough: int | None = None) -> "list[StepPlan]":
    """Returns the plans that fit, fastest first, after compiling at most `limit` or finding `enough`."""
    from tqdm import tqdm

    from gptjax.planning import topology
    from gptjax.planning.compile import CompiledProgram
    from gptjax.planning.report import mesh_text
    from gptjax.planning.search import search

    capacity = topology.hbm_bytes(where)
    assert capacity is not None, "a TPU's memory is known"
    steps: list[StepPlan] = []
    with tqdm(total=limit, desc=where.name, unit="plan", disable=not sys.stderr.isatty()) as bar:
        for number, trial in enumerate(search(config, where, capacity, compile_step(where)), start=1):
            tried = trial.candidate.config
            if isinstance(trial.compiled, CompiledProgram):
                parts = (trial.compiled, trial.communication or [], trial.estimate)
                steps.append(make_step(tried, where, trial.mesh, *parts))
                verdict = f"fits, {trial.compiled.memory.total / 2**30:.2f} GiB"
            else:
                verdict = f"does not fit, {trial.compiled.needed / 2**30:.2f} GiB"
            name = f"{mesh_text(trial.mesh.shape)} microbatch {tried.batch.microbatch_size} remat {tried.model.remat}"
            tqdm.write(f"{where.name} {name}: {verdict}", file=sys.stderr)
            bar.update()
            if number == limit or len(steps) == enough:
                break
    return sorted(steps, key=lambda step: step.serial)


def plan_decoding_search(config: Config, where: "Topology") -> None:
    """Plans generation on the mesh that is best by formula among those whose programs fit.

    Raises:
      UserError: none of the first --search_limit meshes fits.
    """
    from gptjax.planning.decode_search import decoding_layouts
    from gptjax.planning.search import override_flags
    from gptjax.planning.topology import hbm_bytes

    capacity = hbm_bytes(where)
    assert capacity is not None, "a TPU's memory is known"
    refused = f"no mesh for generation fits {where.name} by formula: use more or larger chips"
    for layout in decoding_layouts(config, where, capacity, cast(Any, WEIGHTS.value))[: SEARCH_LIMIT.value]:
        line = " ".join(override_flags(config, layout.config))
        try:
            plan_decoding(layout.config, where, line)
            return
        except UserError as error:
            refused = str(error)
            say(f"{line}: {refused}")
    raise UserError(refused)


def plan_decoding(config: Config, where: "Topology", flags: str | None = None) -> None:
    """Plans generation with the config's model on its mesh; `flags` are printed after the plan."""
    from gptjax.parallel import compiler
    from gptjax.planning import decode_plan as decoding
    from gptjax.planning import plan_cache as cache
    from gptjax.planning import topology
    from gptjax.planning.report import decoding_json, decoding_table

    mesh = topology.lay_out(config.mesh, where)
    capacity = topology.hbm_bytes(where)
    assert capacity is not None, "a TPU's memory is known"
    with compiler.announced(f"prefill and decoding for {where.name}"):
        plan = decoding.plan_decoding(
            config,
            mesh,
            where,
            capacity,
            cast(Any, WEIGHTS.value),
            lambda what, make: cache.compile_cached(what, config, where, cache_directory(), make),
        )
    table, tree = decoding_table(plan, capacity), decoding_json(plan)
    output(table if flags is None else f"{table}\n{flags}", tree if flags is None else tree | {"flags": flags})


def compile_step(where: "Topology") -> Any:
    """Returns a function that compiles a config's training step on a mesh of `where`, or reads it from the cache."""
    from gptjax.parallel import compiler
    from gptjax.planning import plan_cache as cache
    from gptjax.planning.compile import compile_training_step

    def compile(config: Config, mesh: Any) -> Any:
        make = partial(compile_training_step, config, mesh)
        with compiler.announced(f"the training step for {where.name}"):
            return cache.compile_cached("training step", config, where, cache_directory(), make)

    return compile


def make_step(
    config: Config, where: "Topology", mesh: Any, compiled: Any, communication: Any, estimate: Any
) -> "StepPlan":
    from gptjax.planning.compile import state_bytes
    from gptjax.planning.report import StepPlan
    from gptjax.planning.topology import hbm_bytes

    return StepPlan(config, where, mesh, state_bytes(config, mesh), compiled, communication, estimate, hbm_bytes(where))


def cache_directory() -> Path | None:
    from gptjax.planning import plan_cache as cache

    return cache.DIRECTORY if CACHE.value else None


def say(text: str) -> None:
    """Prints progress to stderr; standard output is for the plan."""
    print(text, file=sys.stderr, flush=True)


def output(table: str, tree: dict[str, Any]) -> None:
    """Prints the table, and writes the JSON where --json says."""
    text = json.dumps(tree, indent=2)
    if JSON.value == "-":
        print(text)
        return
    if JSON.value is not None:
        try:
            expand(JSON.value).write_text(text + "\n")
        except OSError as error:
            raise UserError(f"cannot write --json={JSON.value}: {error.strerror}") from None
    print(table)


if __name__ == "__main__":
    cli.run(main)
