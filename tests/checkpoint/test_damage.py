"""Damaged checkpoints are detected, reported, kept, and never used."""

import json
import random
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.checkpoint import read_errors, stored_checkpoint
from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.position import Position
from gptjax.checkpoint.state import TrainState, abstract_state
from gptjax.config import Config, UserError, replace
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import make_mesh
from gptjax.run import run
from gptjax.stages import registry
from gptjax.training.metrics_file import read_metrics

NEWEST, BEFORE = 6, 4

# What the threads of orbax and tensorstore leave of reads that failed, where the garbage collector finds it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


def restore(config: Config, workdir: Path) -> tuple[TrainState, Position]:
    mesh = make_mesh(config.mesh)
    with jax.set_mesh(mesh), Checkpoints(workdir, config.checkpoint) as checkpoints:
        state, position = checkpoints.restore(abstract_state(registry.parameters(config), mesh))
        return jax.device_get(state), position


def equal(one: TrainState, other: TrainState) -> bool:
    return jax.tree.all(jax.tree.map(np.array_equal, one, other))


def damage(path: Path, kind: str, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    if kind == "remove":
        path.unlink()
    elif kind == "truncate":
        path.write_bytes(data[: rng.randrange(len(data) + 1)])
    elif kind == "zeros":
        path.write_bytes(bytes(len(data)))
    elif data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)


@pytest.mark.slow
def test_whatever_is_damaged_the_state_is_whole(trained, tmp_path):
    config, workdir = trained
    newest = workdir / "checkpoints" / str(NEWEST)
    whole, position = restore(config, workdir)
    shutil.copytree(workdir, tmp_path / "older")
    shutil.rmtree(tmp_path / "older" / "checkpoints" / str(NEWEST))
    older, older_position = restore(config, tmp_path / "older")
    files = sorted(path.relative_to(newest) for path in newest.rglob("*") if path.is_file())
    rng, noticed = random.Random(0), 0
    for number in range(12):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(workdir, copy)
        damage(
            copy / "checkpoints" / str(NEWEST) / rng.choice(files),
            rng.choice(["flip", "truncate", "zeros", "remove"]),
            rng,
        )
        state, found = restore(config, copy)
        if int(state.step) == NEWEST:  # the damage is in arrays that are not read
            assert equal(state, whole)
            assert found == position
        else:
            noticed += 1
            assert equal(state, older)
            assert found == older_position
            assert (copy / "damaged" / f"{NEWEST}.0").is_dir()
    assert noticed > 3


def test_every_array_and_the_position_are_checked(trained, tmp_path, capsys):
    config, workdir = trained
    path = workdir / "checkpoints" / str(NEWEST) / "manifest" / "metadata"
    manifest = json.loads(path.read_text())
    assert {name.partition("/")[0] for name in manifest["checksums"]} == {"params", "ema", "train"}
    for number, change in enumerate(("checksum of an array", "position")):
        changed = json.loads(path.read_text())
        if change == "position":
            changed["position"]["examples"] += 4
        else:
            changed["checksums"]["train/rng"] ^= 1
        copy = tmp_path / f"copy{number}"
        shutil.copytree(workdir, copy)
        (copy / path.relative_to(workdir)).write_text(json.dumps(changed))
        assert int(restore(config, copy)[0].step) == BEFORE
        assert "checkpoint 6 in" in (line := capsys.readouterr().err)
        assert "is damaged (its manifest is not what was saved)" in line


@pytest.mark.parametrize(
    "change",
    [
        {"position": {"examples": "24"}},
        {"position": {"examples": 24, "skipped_examples": 0, "progress": [], "owes_evaluation": False}},
        {"position": {"examples": 24, "other": 1}},
        {"position": None},
        {"checksums": None},
        {"checksums": {"ema/head/bias": "../x"}},
    ],
)
def test_a_manifest_that_anybody_may_have_written_is_none(trained, change):
    config, workdir = trained
    path = workdir / "checkpoints" / str(NEWEST) / "manifest" / "metadata"
    manifest = json.loads(path.read_text()) | change
    del manifest["crc32"]
    path.write_text(json.dumps(manifest | {"crc32": stored_checkpoint.crc32(manifest)}))
    assert int(restore(config, workdir)[0].step) == BEFORE


def test_a_run_goes_on_from_the_checkpoint_before_as_if_undisturbed(trained, tmp_path, capsys):
    config, workdir = trained
    longer = replace(config, {"batch": {"total_tokens": 9 * 128}})
    shutil.copytree(workdir, tmp_path / "whole")
    run(longer, tmp_path / "whole", allow_config_changes=True)
    for path in (workdir / "checkpoints" / str(NEWEST) / "params" / "d").iterdir():
        path.write_bytes(path.read_bytes()[:-20])
    capsys.readouterr()
    run(longer, workdir, allow_config_changes=True)
    assert f"and was moved to {workdir}/damaged/6.0: the checkpoint before it is used" in capsys.readouterr().err
    assert equal(restore(longer, workdir)[0], restore(longer, tmp_path / "whole")[0])


def test_a_command_that_only_reads_moves_nothing(trained, capsys, monkeypatch):
    config, workdir = trained
    monkeypatch.setattr(read_errors, "RETRY_DELAYS", ())  # in which a run would have deleted the checkpoint
    shutil.rmtree(workdir / "checkpoints" / str(NEWEST) / "ema" / "d")
    mesh = make_mesh(config.mesh)
    with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        abstract = abstract_params(GPT(config.model), mesh)
        assert checkpoints.restore_params(abstract)[1] == BEFORE
        assert "is damaged" in capsys.readouterr().err
        with pytest.raises(UserError, match="move it away"):
            list(checkpoints.stream_params(abstract))
    assert (workdir / "checkpoints" / str(NEWEST)).is_dir()
    assert not (workdir / "damaged").exists()


def test_without_a_whole_checkpoint_nothing_starts_over(trained):
    config, workdir = trained
    for step in (BEFORE, NEWEST):
        (workdir / "checkpoints" / str(step) / "manifest" / "metadata").write_text("{}")
    with pytest.raises(UserError, match=r"all checkpoints in .* are damaged: use another .* --start_over"):
        run(config, workdir)
    assert sorted(path.name for path in (workdir / "damaged").iterdir()) == ["4.0", "6.0"]


# --- runs that cannot be resumed are not restarted --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["damaged", "records", "damaged records"])
def test_a_lost_run_is_begun_anew_only_on_demand(trained, kind, capsys):
    config, workdir = trained
    if kind == "damaged":
        for step in (BEFORE, NEWEST):
            (workdir / "checkpoints" / str(step) / "manifest" / "metadata").write_text("{}")
        with pytest.raises(UserError, match=r"all checkpoints in .* are damaged"):
            run(config, workdir)
        (workdir / "metrics.jsonl").unlink()
    else:
        shutil.rmtree(workdir / "checkpoints")
        if kind == "damaged records":
            (workdir / "metrics.jsonl").write_text("?\n")
    before = {path.relative_to(workdir): path.read_bytes() for path in workdir.rglob("*") if path.is_file()}
    for _ in range(2):
        with pytest.raises(UserError, match=r"no undamaged checkpoint to resume from: .* --start_over"):
            run(config, workdir)
    assert {path.relative_to(workdir): path.read_bytes() for path in workdir.rglob("*") if path.is_file()} == before
    assert run(config, workdir, start_over=True).step == NEWEST
    assert "starting from scratch" in capsys.readouterr().err
    for path in ("config.json", "metrics.jsonl", f"damaged/{NEWEST}.0/manifest/metadata"):
        if Path(path) in before:
            assert (workdir / "earlier" / "0" / path).read_bytes() == before[Path(path)]
    # An undamaged checkpoint is resumed whether the flag is given or not.
    assert run(config, workdir, start_over=True).step == NEWEST
    assert [path.name for path in (workdir / "earlier").iterdir()] == ["0"]


def test_records_of_step_0_alone_are_no_lost_run(trained):
    config, workdir = trained
    shutil.rmtree(workdir / "checkpoints")
    lines = (workdir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (workdir / "metrics.jsonl").write_text("".join(lines[:2]))
    assert [record["step"] for record in read_metrics(workdir)[1]] == [0]
    assert run(config, workdir).step == NEWEST


def test_a_workdir_deleted_under_its_run_is_one_line(trained, monkeypatch):
    config, workdir = trained
    longer = replace(config, {"batch": {"total_tokens": 9 * 128}})
    save = Checkpoints.save

    def deleted(self, *args):
        shutil.rmtree(deleted.directory)
        save(self, *args)

    monkeypatch.setattr(Checkpoints, "save", deleted)
    for deleted.directory, words in (
        (workdir / "checkpoints", "checkpoints was deleted during the run"),
        (workdir, "run was deleted during the run"),
    ):
        with pytest.raises(UserError, match=words) as error:
            run(longer, workdir, allow_config_changes=True, start_over=True)
        assert "\n" not in str(error.value)
