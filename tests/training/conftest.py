"""A run small enough to train in a test."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptjax import config as c


@pytest.fixture(scope="session")
def make_tiny() -> Callable[[Path], c.Config]:
    return _tiny


@pytest.fixture
def tiny(tmp_path: Path) -> c.Config:
    return _tiny(tmp_path)


@pytest.fixture(scope="session")
def original(tmp_path_factory: pytest.TempPathFactory) -> tuple[c.Config, Path]:
    """A run with the checkpoints 4 and 6; nobody may change it."""
    from gptjax.run import run

    directory = tmp_path_factory.mktemp("original")
    changes = {
        "model": {"vocab_size": 257},
        "optimizer": {"schedule": "constant"},
        "evaluation": {"sample_tokens": 0},
        "checkpoint": {"keep_last": 2},
    }
    config = c.replace(_tiny(directory), changes)
    run(config, directory / "run")
    return config, directory / "run"


@pytest.fixture
def trained(original: tuple[c.Config, Path], tmp_path: Path) -> tuple[c.Config, Path]:
    """A run with the checkpoints 4 and 6, and a copy of its workdir."""
    config, workdir = original
    shutil.copytree(workdir, tmp_path / "run")
    return config, tmp_path / "run"


def _tiny(directory: Path) -> c.Config:
    """Two layers on a text made in `directory`; 6 steps of 2 microbatches, with dropout and averaged weights."""
    text = directory / "text"
    text.mkdir()
    for i in range(40):
        (text / f"{i:02}.txt").write_text(f"document {i} says: " + f"{i} and {i + 1} are neighbours. " * 8)
    tokens_per_batch = 2 * 4 * 16
    return c.Config(
        model=c.GPTConfig(
            context_length=16, num_layers=2, num_heads=2, embed_dim=16, residual_dropout=0.1, dtype="float32"
        ),
        data=c.DataConfig(
            source=f"text:{text}/*.txt", tokenizer="bytes", validation_fraction=0.1, cache_dir=str(directory / "cache")
        ),
        batch=c.BatchConfig(total_tokens=6 * tokens_per_batch, tokens_per_batch=tokens_per_batch, microbatch_size=4),
        optimizer=c.OptimizerConfig(peak_lr=1e-2, warmup_tokens=tokens_per_batch, ema_decay=0.9),
        evaluation=c.EvaluationConfig(every_tokens=2 * tokens_per_batch, max_tokens=256, sample_tokens=4),
        checkpoint=c.CheckpointConfig(every_tokens=2 * tokens_per_batch, keep_last=1),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )
