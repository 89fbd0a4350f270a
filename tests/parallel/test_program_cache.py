"""Compiled programs are cached where possible, and nothing fails elsewhere."""

import dataclasses
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gptjax.config import Config, replace, to_json
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.distributed import processes
from gptjax.parallel import program_cache

KEYS = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_compilation_cache_max_size")


@pytest.fixture(autouse=True)
def _as_without_a_cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """JAX as in a process whose environment names no cache, as that of the tests does."""
    before = {key: getattr(jax.config, key) for key in KEYS}
    jax.config.update("jax_compilation_cache_dir", None)
    compilation_cache.reset_cache()
    monkeypatch.setattr(program_cache, "MIN_SECONDS", 0.0)
    yield
    for key, value in before.items():
        jax.config.update(key, value)
    compilation_cache.reset_cache()


def compile_a_program() -> None:
    def wave(x: jax.Array) -> jax.Array:
        return jnp.sin(x) * 3 + 1

    jax.jit(wave)(jnp.ones((7, 5))).block_until_ready()


def kept(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.rglob("jit_wave-*-cache"))


def test_a_program_is_kept_and_found_again(tmp_path):
    program_cache.use(tmp_path)
    compile_a_program()
    programs = kept(tmp_path / "compiled")
    assert len(programs) == 1
    jax.clear_caches()
    compile_a_program()
    assert kept(tmp_path / "compiled") == programs


@pytest.mark.slow
@pytest.mark.parametrize("command", ["generate", "chat", "evaluate", "predict"])
def test_the_config_of_a_workdir_does_not_choose_the_cache(command, tmp_path):
    """Each command ends with an error behind the point where it opens the cache, as the workdir has no checkpoint."""
    workdir, planted, own = (tmp_path / name for name in ("run", "planted", "own"))
    BytesTokenizer().save(workdir / "tokenizer")
    changes = {"data": {"cache_dir": str(planted)}, "batch": {"total_tokens": 2**20}}
    config = dataclasses.replace(replace(Config(), changes), stage="sft" if command == "chat" else "pretrain")
    (workdir / "config.json").write_text(to_json(config))
    more = {"generate": ["--prompt=a"], "evaluate": ["--tasks=lambada"]}.get(command, [])
    result = subprocess.run(
        [sys.executable, "-m", f"gptjax.{command}", f"--workdir={workdir}", f"--cache_dir={own}", *more],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=1000,
        env={name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"},
    )
    assert result.returncode == 2
    assert result.stderr.startswith(f"error: {workdir} has no checkpoint")
    assert not planted.exists()
    assert (own / "compiled").is_dir()


@pytest.mark.parametrize(
    ("culprit", "mode"), [("", 0o777), ("", 0o1777), ("compiled", 0o702), ("compiled", 0o720), ("..", 0o707)]
)
def test_a_directory_that_others_can_write_to_is_not_used(culprit, mode, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(program_cache, "_is_private_group", lambda group: False)
    cache = tmp_path / "a" / "cache"
    (cache / "compiled").mkdir(parents=True)
    (cache / culprit).chmod(mode)
    program_cache.use(cache)
    if mode & 0o1000:  # sticky: others may add entries, but not replace `compiled`
        assert jax.config.jax_compilation_cache_dir is not None
        return
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = capsys.readouterr().err.splitlines()
    assert f"other users may write to {(cache / culprit).resolve()}, and could run code" in line


def test_a_directory_of_another_user_is_not_used(tmp_path, capsys, monkeypatch):
    program_cache.use(tmp_path)
    assert jax.config.jax_compilation_cache_dir is not None
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)  # as if this user had not made it
    program_cache.use(tmp_path)
    assert jax.config.jax_compilation_cache_dir is None
    assert "other users may write to" in capsys.readouterr().err


def test_a_link_is_followed_before_its_target_is_checked(tmp_path, capsys):
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    (tmp_path / "link").symlink_to(tmp_path / "open")
    program_cache.use(tmp_path / "link")
    assert jax.config.jax_compilation_cache_dir is None
    assert f"other users may write to {tmp_path / 'open'}" in capsys.readouterr().err


def test_a_place_that_was_given_stays(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "given"))
    program_cache.use(tmp_path)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "given")
    assert not (tmp_path / "compiled").exists()


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path):
    (tmp_path / "compiled").write_text("a file")
    program_cache.use(tmp_path)
    compile_a_program()
    assert jax.config.jax_compilation_cache_dir is None


def test_several_processes_as_one_keep_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "is_one_of_several", lambda: True)
    program_cache.use(tmp_path)
    assert jax.config.jax_compilation_cache_dir is None
    assert list(tmp_path.iterdir()) == []
