"""A whole run, from a config to its report: what `python -m gptjax.main` does, callable from a notebook."""

import dataclasses
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.checkpoint.lock import locked
from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.state import abstract_state
from gptjax.config import Config, UserError, differences, read_config, to_json, with_absolute_paths
from gptjax.data import tokenizers
from gptjax.distributed import processes
from gptjax.files import write_whole
from gptjax.models import peft
from gptjax.parallel.mesh import make_mesh
from gptjax.scaling import flops
from gptjax.stages import builders, registry
from gptjax.stages.start import start_state
from gptjax.training.loop import RunReport, train
from gptjax.training.stage import Stage


def run(config: Config, workdir: Path, *, profile: bool = False, allow_config_changes: bool = False) -> RunReport:
    """Trains `config` in `workdir`, or goes on with the run found there, printing as it goes.

    Args:
      config: what `gptjax.config.resolve` returns.
      workdir: made if it is missing.
      profile: write a trace of a few steps to `<workdir>/profile/`.
      allow_config_changes: go on although the workdir's run was started with another config, of the same model.

    Raises:
      UserError: anything that the user can mend, before anything slow where it can be known.
    """
    registry.check(config)
    processes.check_same(_leaves(dataclasses.asdict(config), "config"), "give all processes the same config")
    config = with_absolute_paths(config)
    mesh = make_mesh(config.mesh)
    if config.init_from is not None:
        read_config(Path(config.init_from).expanduser())  # before the corpus is prepared
    processes.check_shared(workdir)
    with locked(workdir) if processes.is_first() else nullcontext():
        return _run_alone(config, workdir, mesh, profile, allow_config_changes)


def _run_alone(config: Config, workdir: Path, mesh: Mesh, profile: bool, allow_config_changes: bool) -> RunReport:
    resumes = _check_workdir(config, workdir, allow_config_changes)
    stage = builders.build(config, mesh, tokenizers.load(workdir / "tokenizer") if resumes else None)
    _check_tokenizer(config, stage.tokenizer)
    if jax.process_index() == 0:
        _write_workdir(config, workdir, stage)
        print(_summary(stage, mesh))
    report = train_stage(stage, mesh, workdir, profile=profile)
    if jax.process_index() == 0:
        print(_report(report, workdir))
    return report


def train_stage(stage: Stage, mesh: Mesh, workdir: Path, *, profile: bool = False) -> RunReport:
    """Trains a stage in `workdir` from where `start_state` finds its start; arguments and errors as of `loop.train`."""
    with jax.set_mesh(mesh), Checkpoints(workdir, stage.config.checkpoint) as checkpoints:
        state, position = start_state(stage.objective.parameters, mesh, checkpoints)
        return train(stage, mesh, workdir, checkpoints, state, position, profile=profile)


def _leaves(tree: Any, name: str) -> dict[str, Any]:
    """The values of nested dicts under names such as "config.model.num_layers"."""
    if not isinstance(tree, dict):
        return {name: tree}
    return {leaf: value for key, part in tree.items() for leaf, value in _leaves(part, f"{name}.{key}").items()}


def _check_workdir(config: Config, workdir: Path, allow_changes: bool) -> bool:
    """Whether `workdir` has checkpoints to go on from; UserError when they are of another config, or weights alone."""
    checkpoints = workdir / "checkpoints"
    steps = [path for path in checkpoints.iterdir() if path.name.isdecimal()] if checkpoints.exists() else []
    if not steps:
        return False
    if not any((step / "train").is_dir() for step in steps):
        raise UserError(
            f"{workdir} holds imported weights, and no training to go on with: "
            f"start from them by --config.init_from={workdir} and another --workdir"
        )
    old = with_absolute_paths(read_config(workdir))
    if changed := differences(old.model, config.model, "model."):
        raise UserError(f"{workdir} holds a run of another model ({'; '.join(changed)}): use another --workdir")
    changed = differences(old, config)
    if changed and not allow_changes:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}): "
            "use another --workdir, or go on with the change by --allow_config_changes"
        )
    return True


def _check_tokenizer(config: Config, tokenizer: tokenizers.Tokenizer) -> None:
    """Raises UserError when the weights to start from read other tokens: their embeddings would mean nothing."""
    if config.init_from is None:
        return
    directory = Path(config.init_from).expanduser() / "tokenizer"
    if tokenizers.load(directory).fingerprint != tokenizer.fingerprint:
        raise UserError(
            f"init_from={config.init_from} was trained with another tokenizer than data.tokenizer="
            f"{config.data.tokenizer}: use its own, such as json:{directory / 'tokenizer.json'}"
        )


def _write_workdir(config: Config, workdir: Path, stage: Stage) -> None:
    try:
        write_whole(workdir / "config.json", to_json(config))
        stage.tokenizer.save(workdir / "tokenizer")
        for name, text in stage.files.items():
            write_whole(workdir / name, text)
    except OSError as error:
        raise UserError(f"cannot write in --workdir={workdir}: {error.strerror}") from None


def _summary(stage: Stage, mesh: Mesh) -> str:
    """The resolved config, and what it costs."""
    config = stage.config
    model, device = config.model, jax.devices()[0]
    state = abstract_state(stage.objective.parameters, mesh)
    trained = peft.count(state.params)
    parameters = trained + peft.count(state.base)
    share = "" if trained == parameters else f", {trained:,} of them trained ({100 * trained / parameters:.2g} %)"
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    memory = flops.memory_summary(model, config.optimizer, shards, trained)
    per_token = flops.flops_per_token(model)
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    rows = {
        "parameters": f"{parameters:,}{share}",
        "training": f"{stage.total_tokens:,} tokens, {config.batch.tokens_per_batch:,} a batch",
        "compute": f"{per_token / 1e6:,.1f} MFLOP a token, {per_token * stage.total_tokens:.3g} FLOP in all",
        "state": f"{memory.total / 1e9:.2f} GB a device (parameters, gradients, optimizer)",
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform}), mesh: {axes}",
    }
    table = "\n".join(f"{name:<11} {value}" for name, value in rows.items())
    return f"{to_json(config)}\n{table}\n"


def _report(report: RunReport, workdir: Path) -> str:
    values = "\n".join(f"{name.replace('_', ' '):<19} {value:.4f}" for name, value in report.validation.items())
    sample = "" if report.sample is None else f"\n--- sample ---\n{report.sample}\n--------------\n"
    if report.conclusion is not None:
        sample += f"\n{report.conclusion}\n"
    trained = f"trained on {report.tokens:,} tokens in {report.step:,} steps"
    return f"\n{trained}\n{values}\n{sample}\nloss curve: {workdir / 'loss.png'}"
