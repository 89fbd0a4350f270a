"""A complete run, from a config to its report: what `python -m gptjax.main` does."""

import dataclasses
import itertools
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.checkpoint.lock import locked
from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.saved_trees import ConfigChanges
from gptjax.checkpoint.state import abstract_state
from gptjax.checkpoint.stored_checkpoint import step_directories
from gptjax.config import Config, UserError, changes, differences, naming, read_config, to_json, with_absolute_paths
from gptjax.data import hub, remote_record, tokenizers
from gptjax.distributed import processes
from gptjax.files import expand, write_whole
from gptjax.models import peft
from gptjax.parallel.mesh import make_mesh
from gptjax.scaling import memory
from gptjax.scaling.parameters import active_parameter_count
from gptjax.stages import builders, registry
from gptjax.stages.preference.reward_model import SCALE_FILE
from gptjax.stages.start import start_state
from gptjax.training.loop import RunReport, train
from gptjax.training.metrics_file import METRICS_FILE, read_metrics, shown_name
from gptjax.training.stage import Stage

# Files that a run adds to its workdir, except its config and its tokenizer.
_FILES_OF_A_RUN = (
    *("checkpoints", "damaged", "rollouts", "debug", "profile", "evaluation", "samples", "tensorboard", "wandb"),
    *(METRICS_FILE, "loss.png", SCALE_FILE, remote_record.RECORD_FILE),
)

Callbacks = Sequence[Callable[[dict[str, Any]], None]]


def run(
    config: Config,
    workdir: Path,
    *,
    profile: bool = False,
    allow_config_changes: bool = False,
    start_over: bool = False,
    callbacks: Callbacks = (),
) -> RunReport:
    """Trains `config` in `workdir`, or resumes the run found there; prints its progress.

    Args:
      config: what `gptjax.config.resolve` returns.
      workdir: created if it does not exist.
      profile: write a trace of a few steps to `<workdir>/profile/`.
      allow_config_changes: resume although the workdir's run was started with another config, of the same model. Where
        the optimizer's state does not fit the new config, a fresh one is made.
      start_over: start from scratch where an earlier run has left records or damaged checkpoints, but no undamaged
        checkpoint; its files are kept in `<workdir>/earlier/`. An undamaged checkpoint is resumed as usual.
      callbacks: each is called with every record of metrics.jsonl, by process 0.

    Raises:
      UserError: any user error, before anything slow where it can be known.
    """
    config, mesh = _checked(config)
    processes.check_shared(workdir)
    with locked(workdir) if processes.is_first() else nullcontext():
        try:
            config = _with_revisions(config, workdir)
            changed = processes.of_first(lambda: _check_workdir(config, workdir, allow_config_changes, start_over))
            if changed is None:
                registry.check_sections(config)
            return _run_alone(config, workdir, mesh, profile, allow_config_changes, changed, callbacks)
        except (OSError, UserError):
            if workdir.is_dir():
                raise
            raise UserError(
                f"--workdir={workdir} was deleted during the run, and what it held is lost; "
                "the same command starts again"
            ) from None


def dry_run(config: Config, workdir: Path, *, allow_config_changes: bool = False) -> str:
    """Describes the run that `run` would start or resume: config, data, parameters, FLOPs and memory.

    It prepares the data, which is kept in data.cache_dir, and writes nothing in `workdir`; raises the errors of `run`.
    """
    config, mesh = _checked(config)
    config = _with_revisions(config, workdir)
    changed = _check_workdir(config, workdir, allow_config_changes, start_over=False)
    if changed is None:
        registry.check_sections(config)
    stage = _build(config, workdir, mesh, resumes=changed is not None, allow_changes=allow_config_changes)
    return _summary(config, stage, mesh)


def _checked(config: Config) -> tuple[Config, Mesh]:
    """Checks what can be checked without the data; returns the config with absolute paths, and its mesh."""
    registry.check(config)
    processes.check_same(_leaves(dataclasses.asdict(config), "config"), "give all processes the same config")
    config = with_absolute_paths(config)
    mesh = make_mesh(config.mesh)
    if config.init_from is not None:
        with naming("init_from"):  # before the corpus is prepared
            registry.check_given(config, read_config(expand(config.init_from)))
    return config, mesh


def _with_revisions(config: Config, workdir: Path) -> Config:
    """Names the commit of each source on the Hugging Face Hub: that of the run found in `workdir`, or the newest."""
    if not (specs := hub.without_revision(config)):
        return config

    def find() -> dict[str, str]:
        return hub.revisions(specs, read_config(workdir) if (workdir / "config.json").exists() else None)

    return hub.with_revisions(config, processes.of_first(find))


def _build(config: Config, workdir: Path, mesh: Mesh, *, resumes: bool, allow_changes: bool) -> Stage:
    may_change = allow_changes or not resumes
    remote = processes.of_first(lambda: remote_record.remote_versions(config, workdir, may_change=may_change))
    stage = builders.build(config, mesh, tokenizers.load(workdir / "tokenizer") if resumes else None)
    _check_tokenizer(config, stage.tokenizer)
    return dataclasses.replace(stage, files={**stage.files, **remote_record.record_file(remote)})


def _run_alone(
    config: Config,
    workdir: Path,
    mesh: Mesh,
    profile: bool,
    allow_changes: bool,
    changed: list[str] | None,
    callbacks: Callbacks,
) -> RunReport:
    stage = _build(config, workdir, mesh, resumes=changed is not None, allow_changes=allow_changes)

    def write() -> None:
        if jax.process_index() == 0:
            _write_workdir(config, workdir, stage)

    if jax.process_index() == 0:
        print(_summary(config, stage, mesh))
    config_changes = ConfigChanges(allow_changes, tuple(changed or ()))
    # The config is written once a checkpoint is known to fit it: until then the workdir has that of its checkpoints.
    report = train_stage(
        stage, mesh, workdir, profile=profile, changes=config_changes, on_start=write, callbacks=callbacks
    )
    if jax.process_index() == 0:
        print(_report(report, workdir))
    return report


def train_stage(
    stage: Stage,
    mesh: Mesh,
    workdir: Path,
    *,
    profile: bool = False,
    changes: ConfigChanges | None = None,
    on_start: Callable[[], None] | None = None,
    callbacks: Callbacks = (),
) -> RunReport:
    """Trains a stage in `workdir` from the state that `start_state` returns.

    Args:
      profile: write a trace of a few steps to `<workdir>/profile/`.
      changes: of the config since the run in `workdir` was started; None: there are none.
      on_start: called when the state has been restored, before anything is written.
      callbacks: each is called with every record of metrics.jsonl, by process 0.

    Raises:
      UserError: as in `start_state` and `loop.train`.
    """
    with jax.set_mesh(mesh), Checkpoints(workdir, stage.config.checkpoint) as checkpoints:
        state, position = start_state(stage.objective.parameters, mesh, checkpoints, changes)
        if on_start is not None:
            on_start()
        return train(
            stage, mesh, workdir, checkpoints, state, position, profile=profile, changes=changes, callbacks=callbacks
        )


def _leaves(tree: Any, name: str) -> dict[str, Any]:
    """The values of nested dicts under names such as "config.model.num_layers"."""
    if not isinstance(tree, dict):
        return {name: tree}
    return {leaf: value for key, part in tree.items() for leaf, value in _leaves(part, f"{name}.{key}").items()}


def _check_workdir(config: Config, workdir: Path, allow_changes: bool, start_over: bool) -> list[str] | None:
    """The config fields that differ from those of the run found in `workdir`; None: there is nothing to resume.

    Raises:
      UserError: the checkpoints are of another config, or of weights alone; or an earlier run left records and no whole
        checkpoint, and `start_over` is not given.
    """
    checkpoints = workdir / "checkpoints"
    try:
        steps = step_directories(checkpoints)
    except OSError as error:
        raise UserError(f"cannot read {checkpoints}: {error.strerror}; run the same command again") from None
    if not steps:
        if (lost := _lost_run(workdir)) is not None:
            _set_aside(workdir, lost, start_over)
        return None
    if [step.name for step in steps] == ["0"] and not (steps[0] / "train").is_dir():
        raise UserError(
            f"{workdir} holds imported weights, and no training to resume: "
            f"start from them by --config.init_from={workdir} and another --workdir"
        )
    old = with_absolute_paths(read_config(workdir))
    if changed := differences(old.model, config.model, "model."):
        raise UserError(f"{workdir} holds a run of another model ({'; '.join(changed)}): use another --workdir")
    if old.data.tokenizer != config.data.tokenizer:
        raise UserError(
            f"{workdir} holds a run with data.tokenizer={old.data.tokenizer}, whose vocabulary its model has learned, "
            f"not {config.data.tokenizer}: use another --workdir"
        )
    changed = differences(old, config)
    if changed and not allow_changes:
        raise UserError(
            f"{workdir} holds a run of another config ({'; '.join(changed)}): "
            "use another --workdir, or resume with the change by --allow_config_changes"
        )
    return changed


def _lost_run(workdir: Path) -> str | None:
    """Describes what an earlier run has left in a workdir without checkpoints; None: no trained step is recorded."""
    if any((workdir / "damaged").glob("*")):
        return "damaged checkpoints"
    if not (workdir / METRICS_FILE).exists():
        return None
    try:
        step = max((record["step"] for record in read_metrics(workdir)[1]), default=0)
    except UserError:
        return f"a damaged {METRICS_FILE}"
    return f"records of {step} steps" if step > 0 else None


def _set_aside(workdir: Path, lost: str, start_over: bool) -> None:
    """Moves the files of a run that cannot be resumed to `<workdir>/earlier/N/`.

    Raises:
      UserError: `start_over` is not given.
    """
    if not start_over:
        raise UserError(
            f"{workdir} holds {lost} but no undamaged checkpoint to resume from: use another --workdir, or start from "
            f"scratch with --start_over, which moves the files of the earlier run to {workdir / 'earlier'}"
        )
    try:
        place = next(path for i in itertools.count() if not (path := workdir / "earlier" / str(i)).exists())
        place.mkdir(parents=True)
        for name in _FILES_OF_A_RUN:
            if (workdir / name).exists():
                (workdir / name).rename(place / name)
        if (workdir / "config.json").exists():
            (place / "config.json").write_bytes((workdir / "config.json").read_bytes())
    except OSError as error:
        raise UserError(f"cannot move the files of the earlier run in {workdir}: {error.strerror}") from None
    print(
        f"{workdir} held {lost} but no undamaged checkpoint: starting from scratch; the earlier files are in {place}",
        file=sys.stderr,
    )


def _check_tokenizer(config: Config, tokenizer: tokenizers.Tokenizer) -> None:
    """Raises UserError if `init_from` has another tokenizer: its embeddings are those of other tokens."""
    if config.init_from is None:
        return
    directory = expand(config.init_from) / "tokenizer"
    given = tokenizers.load(directory)
    same_encoding = given.encoding_fingerprint == tokenizer.encoding_fingerprint
    if not same_encoding or given.added != tokenizer.added[: len(given.added)]:
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


def _summary(config: Config, stage: Stage, mesh: Mesh) -> str:
    """Summary of a run: config fields that differ from the defaults, the data, and the cost.

    Args:
      config: as the user gave it; that of the stage is complete.
    """
    changed = changes(Config(), config)
    width = max(map(len, changed), default=0)
    keys = [f"  {name:<{width}}  {value!r}" for name, (_, value) in changed.items()]
    config = stage.config
    model, device = config.model, jax.devices()[0]
    state = abstract_state(stage.objective.parameters, mesh)
    trained = peft.count(state.params)
    parameters = trained + peft.count(state.base)
    active = "" if model.num_experts is None else f" ({active_parameter_count(model):,} active)"
    share = "" if trained == parameters else f", {trained:,} of them trained ({100 * trained / parameters:.2g} %)"
    shards = mesh.shape["fsdp"] * mesh.shape["tensor"]
    held = memory.memory_summary(model, config.optimizer, shards, trained, expert_shards=mesh.shape["expert"])
    per_token = stage.flops_per_token
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items() if size > 1) or "one device"
    rows = {
        "parameters": f"{parameters:,}{active}{share}",
        **stage.description,
        "training": f"{stage.total_tokens:,} tokens, {config.batch.tokens_per_batch:,} per batch",
        "compute": f"{per_token / 1e6:,.1f} MFLOP per token, {per_token * stage.total_tokens:.3g} FLOP in total",
        "memory": f"{held.total / 1e9:.2f} GB per device for parameters, gradients and optimizer state",
        "devices": f"{jax.device_count()} x {device.device_kind} ({device.platform}), mesh: {axes}",
    }
    table = "\n".join(f"{name:<11} {value}" for name, value in rows.items())
    return "\n".join(["config, where it differs from the defaults:", *keys, "", table, ""])


def _report(report: RunReport, workdir: Path) -> str:
    values = "\n".join(f"{shown_name(name):<19} {value:.4f}" for name, value in report.validation.items())
    parts = [
        "",
        f"trained on {report.tokens:,} tokens in {report.step:,} steps and {_duration(report.seconds)}",
        values,
    ]
    if report.epochs:
        parts.append("epochs: " + ", ".join(f"{name} {number:.3g}" for name, number in report.epochs.items()))
    if report.best is not None:
        step, metric, value = report.best
        parts.append(f"best step {step:,}: {shown_name(metric)} {value:.4f}")
    parts.append("")
    if report.sample is not None:
        parts += ["--- sample ---", report.sample, "--------------", ""]
    if report.conclusion is not None:
        parts += [report.conclusion, ""]
    parts.append("written:")
    for path in sorted(workdir.iterdir()):
        if not path.name.startswith(".") and path.suffix != ".lock":
            parts.append(f"  {path}{'/' if path.is_dir() else ''}")
    return "\n".join(parts)


def _duration(seconds: float) -> str:
    """Formats a duration, such as "45 s", "3 min 20 s" or "2 h 5 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"
