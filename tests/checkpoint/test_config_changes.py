"""Resuming with a changed config works, or one line names the field; no checkpoint is moved or deleted."""

import dataclasses
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.restore import resumed_state
from gptjax.checkpoint.saved_trees import ConfigChanges
from gptjax.checkpoint.state import TrainState, create_state
from gptjax.checkpoint.stored_checkpoint import crc32
from gptjax.config import Config, UserError, check, read_config, replace
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages import registry
from gptjax.training.metrics_file import read_metrics
from tests.tiny_tasks import BATCH, CONTEXT, run_config, with_method
from tests.training.test_loop import steps

STEP = 128  # tokens of the pretraining run
# Values that fields may take, some of them bad; a change draws from several.
OPTIMIZER: dict[str, list[Any]] = {
    "name": ["adamw", "muon", "adafactor"],
    "clip_norm": [None, 1.0, 0.5],
    "weight_decay": [0.0, 0.1],
    "first_moment_dtype": ["param_dtype", "float32", "bfloat16"],
    "layer_lr_decay": [1.0, 0.8],
    "ema_decay": [None, 0.9, 0.99],
    "beta1": [0.0, 0.9, 0.95],
    "beta2": [0.95, 0.999],
    "offload": [False, True],
    "min_factored_dim": [8, 32],
    "decay_rules": [((".*", 1.0),), (("nothing", 0.0), (".*", 1.0))],
    "schedule": ["constant", "cosine", "wsd"],
    "peak_lr": [1e-2, 1e-3],
}
PEFT: dict[str, list[Any]] = {
    "method": ["none", "lora", "adalora", "adapters", "head", "top_layers"],
    "rank": [1, 2, 3],
    "initial_rank": [3, 4],
    "alpha": [4.0, 8.0],
    "dropout": [0.0, 0.1],
    "adapter_dim": [3, 4],
    "num_layers": [1, 2, 3],
    "targets": [("layers/.*/attention/(qkv|out)/kernel",), ("layers/.*/mlp/up/kernel",), ("nothing",)],
}


def batch_fields(step: int, rows: int) -> dict[str, list[Any]]:
    return {
        "total_tokens": [step, 2 * step, 3 * step],
        "tokens_per_batch": [step // 2, step, 2 * step, step + 1],
        "microbatch_size": [None, rows // 2, rows, 3],
        "ramp_start_tokens": [None, step // 2],
        "ramp_tokens": [None, 4 * step],
    }


@pytest.fixture(scope="module")
def pretraining(make_tiny: Callable[[Path], Config], tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run of 2 steps, each saved."""
    directory = tmp_path_factory.mktemp("pretraining")
    changes = {
        "optimizer": {"schedule": "constant"},
        "evaluation": {"sample_tokens": 0},
        "batch": {"total_tokens": 2 * STEP},
        "checkpoint": {"every_tokens": STEP, "keep_last": 2},
    }
    config = replace(make_tiny(directory), changes)
    run(config, directory / "run")
    return config, directory / "run"


@pytest.fixture(scope="module")
def finetuning(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, Path]:
    """A run of 2 steps with LoRA."""
    directory = tmp_path_factory.mktemp("finetuning")
    config = with_method(run_config(directory, "classification", pretrained), "lora")
    config = replace(config, {"checkpoint": {"every_tokens": 1, "keep_last": 2}})
    run(config, directory / "run")
    return config, directory / "run"


def changed(config: Config, rng: random.Random) -> tuple[Config, set[str]]:
    """`config` with one to three fields changed, and the names of these."""
    fields = [("optimizer", name, value) for name, values in OPTIMIZER.items() for value in values]
    if config.stage == "finetune":
        fields += [("peft", name, value) for name, values in PEFT.items() for value in values] * 2
        fields += [("batch", n, v) for n, values in batch_fields(BATCH * CONTEXT, BATCH).items() for v in values]
    else:
        fields += [("batch", n, v) for n, values in batch_fields(STEP, 8).items() for v in values]
    names = set()
    for section, name, value in rng.sample(fields, rng.randint(1, 3)):
        if getattr(getattr(config, section), name) != value:
            config = replace(config, {section: {name: value}})
            names.add(name)
    return config, names


def check_resumes_or_names(original: tuple[Config, Path], workdir: Path, seed: int) -> str:
    """Resumes a copy of a run with a random change; how that ended."""
    config, source = original
    shutil.copytree(source, workdir)
    before = {
        step: (workdir / "checkpoints" / str(step) / "manifest" / "metadata").read_bytes() for step in steps(workdir)
    }
    other, names = changed(config, random.Random(seed))
    # All are kept, so that a missing one was moved or deleted by mistake.
    other = replace(other, {"checkpoint": {"keep_last": 9}})
    try:
        check(other)  # as a command line is checked
        report = run(other, workdir, allow_config_changes=True)
    except UserError as error:
        ended = str(error)
        assert "\n" not in ended
        assert any(name in ended for name in names), (names, ended)
    else:
        ended = "resumed"
        assert report.step >= 2
        recorded = [record["step"] for record in read_metrics(workdir)[1] if record["split"] == "train"]
        assert recorded == list(range(1, report.step + 1))
    assert not (workdir / "damaged").exists()
    for step, manifest in before.items():
        assert (workdir / "checkpoints" / str(step) / "manifest" / "metadata").read_bytes() == manifest
    # The workdir has the config of its checkpoints: of the old run, or of one that has been resumed.
    assert read_config(workdir) in ((other,) if ended == "resumed" else (config, other))
    return ended


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_random_change_resumes_or_is_named(pretraining, tmp_path, seed):
    check_resumes_or_names(pretraining, tmp_path / "run", seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [4, 5, 6])
def test_a_random_change_of_finetuning_resumes_or_is_named(finetuning, tmp_path, seed):
    check_resumes_or_names(finetuning, tmp_path / "run", seed)


def resumed(config: Config, workdir: Path, changes: ConfigChanges | None = None) -> TrainState:
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), Checkpoints(workdir, config.checkpoint) as checkpoints:
        return jax.device_get(resumed_state(registry.parameters(config.completed(257)), mesh, checkpoints, changes)[0])


@pytest.fixture(scope="module")
def before(pretraining) -> TrainState:
    """The state that the run of `pretraining` saved last."""
    return resumed(*pretraining)


@pytest.mark.parametrize("change", [{"clip_norm": None}, {"weight_decay": 0.0}, {"layer_lr_decay": 0.8}])
def test_a_change_without_arrays_keeps_the_optimizer_state(pretraining, before, change):
    config, workdir = pretraining
    after = resumed(replace(config, {"optimizer": change}), workdir)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    "change",
    [{"first_moment_dtype": "bfloat16"}, {"name": "muon"}, {"name": "adafactor"}, {"name": "adafactor", "beta1": 0.0}],
)
def test_another_optimizer_state_is_made_anew_if_allowed(pretraining, before, change, capsys):
    config, workdir = pretraining
    other = replace(config, {"optimizer": change})
    with pytest.raises(UserError, match=r"has another optimizer state: opt_state/.* --allow_config_changes") as error:
        resumed(other, workdir)
    assert "\n" not in str(error.value)
    state = resumed(other, workdir, ConfigChanges(True, ("optimizer.name: 'adamw' -> ...", "batch.epochs: ...")))
    assert "a fresh optimizer state: the saved one does not fit (optimizer.name: 'adamw' -> ...)" in (
        capsys.readouterr().err
    )
    assert int(state.step) == 2
    assert jax.tree.all(jax.tree.map(np.array_equal, (state.params, state.ema), (before.params, before.ema)))
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh):
        fresh = create_state(registry.parameters(other.completed(257)), mesh).opt_state
    assert jax.tree.all(jax.tree.map(np.array_equal, state.opt_state, fresh))


def test_an_average_can_be_begun_and_left_out(pretraining, tmp_path):
    config, workdir = pretraining
    without = replace(config, {"optimizer": {"ema_decay": None}})
    assert resumed(without, workdir).ema is None
    shutil.copytree(workdir, tmp_path / "run")
    run(replace(without, {"batch": {"total_tokens": 3 * STEP}}), tmp_path / "run", allow_config_changes=True)
    with pytest.raises(UserError, match=r"has no moving average: leave optimizer\.ema_decay unset, or"):
        resumed(config, tmp_path / "run")
    state = resumed(config, tmp_path / "run", ConfigChanges(True))
    assert jax.tree.all(jax.tree.map(np.array_equal, state.params, state.ema))
    assert not (tmp_path / "run" / "damaged").exists()


def test_other_parameters_are_an_error_by_name(finetuning, tmp_path):
    config, source = finetuning
    shutil.copytree(source, tmp_path / "run")
    for method in ("head", "none"):
        with pytest.raises(
            UserError, match=rf"does not fit this config: params/.* \(peft\.method: 'lora' -> '{method}'"
        ):
            run(with_method(config, method), tmp_path / "run", allow_config_changes=True)
    assert read_config(tmp_path / "run") == config
    assert steps(tmp_path / "run") == steps(source)


def test_a_checkpoint_without_shapes_in_its_manifest_opens(pretraining, tmp_path):
    """Manifests of earlier versions have checksums alone."""
    config, source = pretraining
    shutil.copytree(source, tmp_path / "run")
    path = tmp_path / "run" / "checkpoints" / "2" / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    for name in ("arrays", "crc32"):
        del manifest[name]
    path.write_text(json.dumps(manifest | {"crc32": crc32(manifest)}))
    assert int(resumed(config, tmp_path / "run").step) == 2
    with pytest.raises(UserError, match="has another optimizer state"):
        resumed(replace(config, {"optimizer": {"first_moment_dtype": "bfloat16"}}), tmp_path / "run")
    deeper = dataclasses.replace(config, model=dataclasses.replace(config.model, embed_dim=32))
    with pytest.raises(UserError, match=r"params/.* is float32\[16\] in the checkpoint and float32\[32\] in this run"):
        resumed(deeper, tmp_path / "run")


@pytest.mark.slow
def test_offloaded_state_is_saved_and_resumed(pretraining, tmp_path):
    config, _ = pretraining
    offloaded = replace(config, {"optimizer": {"offload": True}})
    longer = replace(offloaded, {"batch": {"total_tokens": 3 * STEP}})
    run(offloaded, tmp_path / "resumed")
    run(longer, tmp_path / "resumed", allow_config_changes=True)
    run(longer, tmp_path / "whole")
    one, other = resumed(longer, tmp_path / "resumed"), resumed(longer, tmp_path / "whole")
    assert int(one.step) == 3
    assert jax.tree.all(jax.tree.map(np.array_equal, one, other))
    # Where the state is stored makes no difference to what is saved.
    assert jax.tree.all(
        jax.tree.map(
            np.array_equal, other, resumed(replace(longer, {"optimizer": {"offload": False}}), tmp_path / "whole")
        )
    )
