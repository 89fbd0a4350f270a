"""Compiled programs are kept where they can be, and nothing fails where they cannot."""

from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from gptjax.config import Config, UserError, replace, to_json
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


def test_what_uses_a_model_keeps_programs_where_its_run_does(tmp_path):
    (tmp_path / "run").mkdir()
    config = replace(Config(), {"data": {"cache_dir": str(tmp_path / "cache")}, "batch": {"total_tokens": 2**20}})
    (tmp_path / "run" / "config.json").write_text(to_json(config))
    program_cache.use_that_of(tmp_path / "run")
    compile_a_program()
    assert len(kept(tmp_path / "cache" / "compiled")) == 1
    with pytest.raises(UserError, match="is not a workdir"):
        program_cache.use_that_of(tmp_path)


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
