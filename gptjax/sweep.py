"""Trains all runs of a sweep that a config file defines, and prints their table.

python -m gptjax.sweep --config=configs/gpt2.py:runlocal --sweep=lr,seed --workdir=sweeps/lr
python -m gptjax.sweep --config=configs/gpt2.py:size=124m --sweep=lr --workdir=sweeps/lr --engine=slurm
python -m gptjax.sweep --config=configs/gpt2.py:runlocal --search= --trials=16 --pruner=asha --workdir=sweeps/search

The config file has functions that return lists of overrides: sweep(), or those that --sweep names, such as sweep_lr()
and sweep_seed(), whose product is taken. Each run has an ordinary workdir below --workdir. After a kill, a preemption
or a failure, the same command resumes; more runs may be added then. table.txt and table.csv have the results without
measured times; `python -m gptjax.compare` shows these too.
"""

import ast
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags

from gptjax import cli
from gptjax.config import UserError
from gptjax.distributed.peers import FAILED, STOPPED
from gptjax.files import expand

if TYPE_CHECKING:
    from gptjax.launch.members import Member
    from gptjax.launch.scheduler import Engine

CONFIG = cli.ConfigFlag()
WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the sweep; a sweep in it is resumed.")
SWEEP = flags.DEFINE_list(
    "sweep",
    [],
    "Names of sweep functions, such as lr,seed; their product is taken; none: the config alone.",
)
ENGINE = flags.DEFINE_enum(
    "engine", "local", ["local", "slurm", "ray"], "Where runs go: processes here, a SLURM array, or a Ray cluster."
)
PROCESSES = flags.DEFINE_integer(
    "processes",
    None,
    "local: runs at the same time, among which processors and accelerators are divided evenly. Default: one for each "
    "accelerator, or for every 4 processors.",
    lower_bound=1,
)
RESOURCES = flags.DEFINE_list(
    "resources",
    [],
    "What each run gets. ray: options of an actor, such as num_cpus=4,num_gpus=1. slurm: parameters of submitit, such "
    "as timeout_min=600,gpus_per_node=1,cpus_per_task=8,slurm_partition=gpu.",
)
HOSTS = flags.DEFINE_integer(
    "hosts", 1, "ray: processes of each run, each with --resources, on hosts of their own.", lower_bound=1
)
RETRIES = flags.DEFINE_integer("retries", 2, "Retries of a run that is killed or fails.", lower_bound=0)
SEARCH = flags.DEFINE_string(
    "search", None, "Draw runs by Optuna from the space that search() returns, or search_NAME() with --search=NAME."
)
TRIALS = flags.DEFINE_integer("trials", 20, "search: number of runs.", lower_bound=1)
ROUND_SIZE = flags.DEFINE_integer("round_size", 4, "search: runs that are sampled at the same time.", lower_bound=1)
SAMPLER = flags.DEFINE_enum("sampler", "tpe", ["tpe", "random"], "search: Optuna's sampler.")
PRUNER = flags.DEFINE_enum(
    "pruner", "none", ["none", "asha", "hyperband", "median"], "search: Optuna's pruner, which stops runs early."
)
REDUCTION = flags.DEFINE_integer("reduction", 3, "asha, hyperband: 1 of so many runs passes a rung.", lower_bound=2)
SEARCH_SEED = flags.DEFINE_integer("search_seed", 0, "search: seed of the sampler.", lower_bound=0)
LIST = flags.DEFINE_bool("list", False, "Print the names and flags of the runs, then stop.")


def main() -> None:
    if CONFIG.path is None or WORKDIR.value is None:
        raise UserError("needs --config=FILE and --workdir=DIR, such as --config=configs/gpt2.py:runlocal")
    workdir = expand(WORKDIR.value)
    if SEARCH.value is not None:
        failed = run_search(CONFIG.path, SEARCH.value, workdir)
    else:
        own = ("trials", "round_size", "sampler", "pruner", "reduction", "search_seed")
        if unused := [f"--{name}" for name in own if flags.FLAGS[name].present]:
            raise UserError(f"{', '.join(unused)}: only a search has them: add --search=NAME")
        failed = run_sweep(CONFIG.path, workdir)
    if failed:
        sys.exit(STOPPED if set(failed.values()) == {STOPPED} else FAILED)


def run_sweep(path: str, workdir: Path) -> dict[str, int]:
    """Runs what the sweep functions of a config file list; returns the exit codes of the runs that failed."""
    from gptjax.launch.members import make_members, read_sweep

    single = SWEEP.value == ["none"]
    sweep = [{}] if single else read_sweep(path, SWEEP.value)
    members = make_members(path, CONFIG.overrides, sweep, workdir, ["run"] if single else None)
    if LIST.value:
        for member in members:
            print(shlex.join([member.name, *member.flags]))
        return {}
    check(members)
    from gptjax.checkpoint.lock import locked
    from gptjax.launch.members import claim
    from gptjax.launch.scheduler import Scheduler

    engine = make_engine(workdir, len(members))
    with locked(workdir):
        claim(workdir, members)
        scheduler = Scheduler(engine, RETRIES.value, say)
        scheduler.add(members)
        scheduler.run()
        report(workdir, members, scheduler.failed, {})
    return scheduler.failed


def run_search(path: str, name: str, workdir: Path) -> dict[str, int]:
    """Runs the trials that Optuna samples from a config file's search space, as `run_sweep`."""
    from gptjax.config import load_config
    from gptjax.launch.hyperparameter_search import Search, Settings
    from gptjax.launch.members import make_members, read_space

    if SWEEP.value or LIST.value:
        raise UserError("--search draws its runs while it runs: drop --sweep and --list")
    values = (SAMPLER.value, PRUNER.value, TRIALS.value, ROUND_SIZE.value, REDUCTION.value, SEARCH_SEED.value)
    settings = Settings(*values)
    search = Search(settings, read_space(path, name), load_config(path, CONFIG.overrides))
    from gptjax.checkpoint.lock import locked
    from gptjax.launch.members import claim
    from gptjax.launch.scheduler import Scheduler

    engine = make_engine(workdir, ROUND_SIZE.value)
    with locked(workdir):
        scheduler = Scheduler(engine, RETRIES.value, say)
        members: list[Member] = []

        def decide() -> None:
            for name in search.decide(scheduler.is_over):
                scheduler.drop(name)

        for number in range(-(-TRIALS.value // ROUND_SIZE.value)):
            sampled = search.sample_round(number)
            names = [f"trial-{len(members) + i:03}" for i in range(len(sampled))]
            trials = make_members(path, CONFIG.overrides, sampled, workdir, names)
            check(trials)
            members += trials
            claim(workdir, members, settings.description())
            search.add(trials)
            scheduler.add(trials)
            decide()
            scheduler.run(decide)
            decide()
        report(workdir, members, scheduler.failed, search.last_steps())
    return scheduler.failed


def check(members: "Sequence[Member]") -> None:
    """Raises UserError for settings that a stage does not support, before anything is started."""
    from gptjax.stages import registry

    for member in members:
        try:
            registry.check(member.config)
        except UserError as error:
            raise UserError(f"run {member.name} of the sweep: {error}") from None


def report(
    workdir: Path, members: "Sequence[Member]", failed: Mapping[str, int], last_steps: Mapping[str, int]
) -> None:
    """Prints the table of the runs that are done, and the names and logs of those that failed."""
    from gptjax.launch.sweep_report import failures, write_tables

    done = [member for member in members if member.name not in failed]
    if done:
        print(write_tables(workdir, done, last_steps), end="", flush=True)
    if failed:
        say(f"\n{len(failed)} of {len(members)} runs failed; the same command tries them again:")
        for line in failures(members, failed):
            say(f"  {line}")


def make_engine(workdir: Path, members: int) -> "Engine":
    """Returns the engine that --engine names."""
    if HOSTS.value > 1 and ENGINE.value != "ray":
        raise UserError(f"--hosts={HOSTS.value} is for --engine=ray: elsewhere a run of a sweep is one process")
    if ENGINE.value == "local":
        if RESOURCES.value:
            raise UserError("--resources is for --engine=slurm and --engine=ray: local runs share this machine")
        from gptjax.launch import local

        return local.LocalEngine(local.slots(PROCESSES.value, members))
    if PROCESSES.value is not None:
        raise UserError(f"--processes={PROCESSES.value} is for --engine=local: give --resources for each run")
    resources = read_resources(RESOURCES.value)
    if ENGINE.value == "ray":
        from gptjax.launch.on_ray import RayEngine

        return RayEngine(resources, HOSTS.value)
    from gptjax.launch.on_slurm import SlurmEngine

    return SlurmEngine(workdir, resources)


def read_resources(given: list[str]) -> dict[str, Any]:
    """Reads KEY=VALUE pairs; numbers become int or float."""
    found: dict[str, Any] = {}
    for pair in given:
        key, equals, text = pair.partition("=")
        if not equals:
            raise UserError(f"--resources={pair}: write KEY=VALUE, such as num_cpus=4")
        try:
            found[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            found[key] = text
    return found


def say(text: str) -> None:
    """Prints progress to stderr; standard output is for the table."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
