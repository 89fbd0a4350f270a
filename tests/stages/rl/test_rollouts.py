"""Files of rollouts: written whole or not at all; completions of a damaged one are sampled again by all processes."""

import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from gptjax import config as c
from gptjax.distributed import processes
from gptjax.parallel.mesh import make_mesh
from gptjax.stages.rl.rollouts import Rollouts, read_arrays, write_arrays

SHAPE = (2, 3, 8)
ARRAYS = {name: np.arange(48, dtype="i4").reshape(SHAPE) for name in ("tokens", "targets", "weights")}


@pytest.fixture
def run(tmp_path: Path) -> SimpleNamespace:
    """A run that resumes within iteration 1."""
    said: list[str] = []
    return SimpleNamespace(workdir=tmp_path, say=said.append, said=said)


@pytest.fixture
def rollouts(tiny, run) -> Rollouts:
    """The rollouts of `run`, whose file is undamaged."""
    config = c.replace(tiny, {"rl": {"prompts_per_iteration": SHAPE[0], "responses_per_prompt": SHAPE[1]}})
    made = Rollouts(config, make_mesh(c.MeshConfig()), SimpleNamespace(row_length=SHAPE[2]), [None] * 4, None)
    made._keep(run.workdir, 1, ARRAYS)
    return made


def file_of(run: SimpleNamespace) -> Path:
    return run.workdir / "rollouts" / "00000001.npz"


def test_arrays_come_back(rollouts, run):
    found = rollouts._kept(run, 1)
    assert found.keys() == ARRAYS.keys()
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype
    assert run.said == []


def too_large(path: Path) -> None:
    """A small file of many zeros."""
    large = {"more": np.zeros(2**24, np.int8)}
    np.savez_compressed(path, names=np.array(sorted(ARRAYS | large)), **ARRAYS, **large)


def unsupported(path: Path) -> None:
    """One flipped bit: a method of compression that zipfile does not know."""
    with zipfile.ZipFile(path) as archive:
        start = archive.start_dir
    content = bytearray(path.read_bytes())
    content[start + 10] ^= 2
    path.write_bytes(content)


def one_array(path: Path) -> None:
    with path.open("wb") as file:
        np.save(file, ARRAYS["tokens"])


def without_one(path: Path) -> None:
    np.savez(path, names=np.array(sorted(ARRAYS)), tokens=ARRAYS["tokens"])


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"PK"),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: path.write_bytes(path.read_bytes().replace(b"\x01\0\0\0\x02", b"\x01\0\0\0\x03", 1)),
        one_array,
        unsupported,
        too_large,
        without_one,
    ],
    ids=["empty", "two bytes", "cut short", "flipped", "npy", "unsupported", "too large", "missing array"],
)
def test_a_damaged_file_is_discarded(rollouts, run, damage):
    damage(file_of(run))
    assert rollouts._kept(run, 1) is None
    (message,) = run.said
    assert "00000001.npz (it is damaged: " in message
    rollouts._keep(run.workdir, 1, ARRAYS)
    assert rollouts._kept(run, 1) is not None


def test_a_file_that_is_larger_than_its_arrays_is_not_read(rollouts, run):
    with file_of(run).open("ab") as file:
        file.truncate(2**30)
    assert rollouts._kept(run, 1) is None
    (message,) = run.said
    assert "it has 1,073,741,824 bytes, more than" in message


def test_a_missing_file_and_one_of_other_sizes(rollouts, run):
    file_of(run).unlink()
    assert rollouts._kept(run, 1) is None
    write_arrays(file_of(run), {name: array[:1] for name, array in ARRAYS.items()})
    assert rollouts._kept(run, 1) is None
    missing, other = run.said
    assert "(No such file or directory)" in missing
    assert "(its iteration has other sizes)" in other


@pytest.mark.parametrize(
    ("other", "reason"), [([None, "Input/output error"], "Input/output error"), (["0" * 64, ""], "different files")]
)
def test_all_processes_use_the_file_or_none_does(rollouts, run, other, reason, monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda own: [own, other])
    assert rollouts._kept(run, 1) is None
    assert reason in run.said[0]


def test_a_failed_write_leaves_the_file_as_it_was(rollouts, run, monkeypatch):
    content = file_of(run).read_bytes()

    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        with pytest.raises(c.UserError, match=r"cannot write .*00000001.npz: No space left"):
            rollouts._keep(run.workdir, 1, {"tokens": ARRAYS["tokens"] + 1})
    assert file_of(run).read_bytes() == content
    rollouts._keep(run.workdir, 2, ARRAYS)
    assert not list(file_of(run).parent.glob("*.part"))


def test_a_damaged_size_does_not_hide_damaged_data(tmp_path):
    """numpy compares no checksum of a member that is said to go on after its array."""
    path = tmp_path / "00000000.npz"
    tokens = np.arange(24_000, dtype=np.int32).reshape(20, 30, 40)
    write_arrays(path, {"tokens": tokens, "weights": tokens})
    content = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        size, directory = archive.getinfo("tokens.npy").file_size, archive.start_dir
    place = content.index(size.to_bytes(4, "little") * 2, directory)  # of the compressed and the uncompressed size
    content[place : place + 8] = (size + 50_000).to_bytes(4, "little") * 2
    content[content.index(np.int32(23_000).tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="is damaged"):
        read_arrays(path, (20, 30, 40))


def test_what_is_read_is_a_file_that_may_be_anybodys(tmp_path):
    np.savez(tmp_path / "a.npz", names=np.array(["tokens"]), tokens=np.array([object()] * 48).reshape(SHAPE))
    with pytest.raises(ValueError, match="damaged"):
        read_arrays(tmp_path / "a.npz", SHAPE)
