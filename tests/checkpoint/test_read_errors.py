"""Errors of the machine while reading a checkpoint, and concurrent deletion: neither counts as damage."""

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptjax.checkpoint import manager, read_errors, stored_checkpoint
from gptjax.checkpoint.manager import Checkpoints
from gptjax.config import UserError
from gptjax.distributed import processes
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import make_mesh
from tests.checkpoint.test_damage import BEFORE, NEWEST, restore

# What the threads of orbax and tensorstore leave of reads that failed, where the garbage collector finds it.
pytestmark = [
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning"),
]


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_errors, "RETRY_DELAYS", (0.0, 0.0, 0.0))


def contents(workdir: Path) -> dict[Path, bytes]:
    """All files of the checkpoints, damaged ones too."""
    directories = (workdir / "checkpoints", workdir / "damaged")
    return {path: path.read_bytes() for directory in directories for path in directory.rglob("*") if path.is_file()}


# Restores with ever more file descriptors left, and prints how each attempt ended.
WITHOUT_DESCRIPTORS = """
import os, resource, sys
from pathlib import Path
import jax
from gptjax.config import UserError, read_config
from gptjax.parallel.mesh import make_mesh
from gptjax.checkpoint import read_errors
from gptjax.checkpoint.manager import Checkpoints
from gptjax.stages import registry
from gptjax.checkpoint.state import abstract_state

read_errors.RETRY_DELAYS = (0.0,)
workdir = Path(sys.argv[1])
config = read_config(workdir)
mesh, (soft, hard) = make_mesh(config.mesh), resource.getrlimit(resource.RLIMIT_NOFILE)
with jax.set_mesh(mesh), Checkpoints(workdir, config.checkpoint) as checkpoints:
    abstract = abstract_state(registry.parameters(config), mesh)
    checkpoints.restore(abstract)  # loads what is loaded once
    for left in range(0, 14, 2):
        used = {int(name) for name in os.listdir("/proc/self/fd")}
        unused = [number for number in range(len(used) + left + 1) if number not in used]
        resource.setrlimit(resource.RLIMIT_NOFILE, (unused[left], hard))
        try:
            ended = f"step {int(checkpoints.restore(abstract)[0].step)}"
        except UserError as error:
            ended = str(error)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        print(ended)
"""


@pytest.mark.slow
def test_exhausted_file_descriptors_are_no_damage(trained):
    _, workdir = trained
    before = contents(workdir)
    command = [sys.executable, "-c", WITHOUT_DESCRIPTORS, workdir]
    result = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    ended = result.stdout.splitlines()
    assert os.strerror(errno.EMFILE) in ended[0]
    assert ended[-1] == f"step {NEWEST}"
    assert all(os.strerror(errno.EMFILE) in line or line == ended[-1] for line in ended)
    assert contents(workdir) == before


@pytest.mark.parametrize("code", [errno.EIO, errno.ESTALE, errno.EMFILE])
@pytest.mark.parametrize("where", ["manifest", "arrays"])
def test_a_read_error_is_retried_and_then_one_line(trained, monkeypatch, where, code):
    config, workdir = trained
    before, failures = contents(workdir), 0
    if where == "manifest":
        owner, name, error = stored_checkpoint, "read_json", OSError(code, os.strerror(code), "x")
    else:  # as TensorStore has it
        owner, name = stored_checkpoint.StoredCheckpoint, "_arrays"
        error = ValueError(f"UNKNOWN: Error reading local file \"x\": {os.strerror(code)} [os_error_code='{code}']")
    original = getattr(owner, name)

    def broken(*args, **kwargs):
        nonlocal failures
        failures -= 1
        if failures >= 0:
            raise error
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)
    failures = 3
    assert int(restore(config, workdir)[0].step) == NEWEST
    failures = 4
    with pytest.raises(
        UserError, match=rf"cannot read checkpoint {NEWEST} in .*: {os.strerror(code)}; it was left in place"
    ) as raised:
        restore(config, workdir)
    assert "\n" not in str(raised.value)
    assert contents(workdir) == before


def test_the_code_in_a_tensorstore_error_is_read(trained):
    config, workdir = trained
    for path in (workdir / "checkpoints" / str(NEWEST) / "params").rglob("d/*"):
        path.unlink()
        path.symlink_to(path)
    with pytest.raises(UserError, match=os.strerror(errno.ELOOP)):
        restore(config, workdir)
    assert not (workdir / "damaged").exists()


def test_an_error_of_the_program_is_no_damage(trained, monkeypatch):
    config, workdir = trained
    before = contents(workdir)

    def broken(*args, **kwargs):
        raise ValueError("this layout cannot be")

    with monkeypatch.context() as patch:
        patch.setattr(stored_checkpoint.ocp, "ArrayRestoreArgs", broken)
        assert int(restore(config, workdir)[0].step) == NEWEST  # by way of the host
        patch.setattr(stored_checkpoint.jax, "device_put", broken)
        with pytest.raises(RuntimeError, match="is not damaged, but cannot be sharded"):
            restore(config, workdir)
    assert contents(workdir) == before


@pytest.mark.parametrize(
    ("verdicts", "kind"),
    [
        ([None, None], None),
        ([None, ["ReadError", "too many open files"]], read_errors.ReadError),
        ([["ReadError", "too many open files"], ["DamageError", "params/a"]], read_errors.DamageError),
        ([["DamageError", "params/a"], ["VanishedError", "gone"]], read_errors.VanishedError),
    ],
)
def test_several_processes_agree_before_anything_is_moved(monkeypatch, verdicts, kind):
    own, _ = verdicts
    monkeypatch.setattr(processes, "gather", lambda value: [value, verdicts[1]])

    def read():
        if own is not None:
            raise getattr(read_errors, own[0])(own[1])
        return "whole"

    if kind is None:
        assert read_errors.agreed(read) == "whole"
    else:
        with pytest.raises(kind):
            read_errors.agreed(read)


# --- reading while a run deletes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["before", "while it is read"])
def test_a_reader_lists_again_when_the_run_deletes_a_checkpoint(trained, monkeypatch, capsys, moment):
    config, workdir = trained
    newest = workdir / "checkpoints" / str(NEWEST)
    mesh = make_mesh(config.mesh)
    abstract = abstract_params(GPT(config.model), mesh)
    original = stored_checkpoint.StoredCheckpoint.manifest

    waits = []

    def wait(delay):
        waits.append(delay)
        if len(waits) == 2:
            shutil.rmtree(newest)

    def deleting(stored):
        manifest = original(stored)
        if stored.step == NEWEST:
            if moment == "before":
                shutil.rmtree(newest)
            else:  # file by file, and the directory last
                shutil.rmtree(newest / "ema")
                monkeypatch.setattr(manager, "time", SimpleNamespace(sleep=wait))
        return manifest

    monkeypatch.setattr(stored_checkpoint.StoredCheckpoint, "manifest", deleting)
    with Checkpoints(workdir, config.checkpoint, read_only=True) as checkpoints:
        assert checkpoints.restore_params(abstract)[1] == BEFORE
    assert "damaged" not in capsys.readouterr().err
