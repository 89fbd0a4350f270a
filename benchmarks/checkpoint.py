"""Measures the cost of saving checkpoints: `python -m benchmarks.checkpoint --config=configs/gpt2.py:runlocal`.

Sequences of steps that begin with a save alternate with sequences without one, so that other load on the machine
affects both. A sequence with a save ends when the checkpoint is on disk, so that the slowdown by saving in the
background is included. The reported share of training time is for the config's interval, `checkpoint.every_tokens`.
Tokens are random.
"""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import flags

from gptjax import cli
from gptjax import config as c
from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.position import Position
from gptjax.checkpoint.state import TrainState, create_state, state_shardings
from gptjax.optim.optimizers import num_microbatches
from gptjax.parallel.mesh import make_mesh
from gptjax.stages import registry
from gptjax.training.step import make_train_step

CONFIG = cli.ConfigFlag("configs/gpt2.py:runlocal")


def loaded_config() -> c.Config:
    """Loads the config that the flags name."""
    config = CONFIG.load()
    assert config is not None, "the flag has a default"
    return config


class Trainer:
    """Repeats the compiled training step on one batch.

    Attributes:
      state: the training state.
      tokens_per_step: tokens of a full batch.
    """

    def __init__(self, config: c.Config):
        mesh = make_mesh(config.mesh)
        objective = registry.objective(config)
        self.state: TrainState = create_state(objective.parameters, mesh)
        self.tokens_per_step, context = config.batch.tokens_per_batch, config.model.context_length
        rows = config.sequences_per_microbatch
        shape_MBT = (self.tokens_per_step // (rows * context), rows, context)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size or 0, shape_MBT, np.int32)
        batch = {"tokens": tokens, "targets": tokens, "weights": np.ones(shape_MBT, np.float32)}
        step = make_train_step(objective, state_shardings(objective.parameters, mesh))
        full = num_microbatches(config.batch, context, 10**18)
        self._arguments: tuple[Any, ...] = (batch, np.int32(full), {"lr": np.float32(1e-5)})
        self._step = step.lower(self.state, *self._arguments).compile()

    def train(self, steps: int) -> None:
        """Runs steps, and waits for the last one."""
        for _ in range(steps):
            self.state, metrics = self._step(self.state, *self._arguments)
        jax.block_until_ready(metrics)


def seconds(trainer: Trainer, steps: int, checkpoints: Checkpoints | None, number: int) -> tuple[float, float]:
    """Measures the seconds of a sequence of steps, and of the call that saves, during which the devices are idle."""
    start = time.perf_counter()
    if checkpoints is not None:
        checkpoints.save(number, trainer.state, Position(), None)
    blocked = time.perf_counter() - start
    trainer.train(steps)
    if checkpoints is not None:
        checkpoints.wait()
    return time.perf_counter() - start, blocked


def main() -> None:
    config = loaded_config()
    every = config.checkpoint.every_tokens
    if every is None:
        raise SystemExit("the config saves only at the end: set --config.checkpoint.every_tokens")
    vocab_size = config.model.vocab_size or flags.FLAGS.vocab_size
    config = c.replace(config, {"model": {"vocab_size": vocab_size}})
    plain, saving, blocking = [], [], []
    with (
        tempfile.TemporaryDirectory(dir=flags.FLAGS.directory) as directory,
        jax.set_mesh(make_mesh(config.mesh)),
        Checkpoints(Path(directory), config.checkpoint) as checkpoints,
    ):
        trainer = Trainer(config)
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(trainer.state))
        for with_save in (checkpoints, None):  # excludes one-time costs, such as compilation
            seconds(trainer, 2, with_save, 0)
        for number in range(1, flags.FLAGS.rounds + 1):
            plain.append(seconds(trainer, flags.FLAGS.steps, None, number)[0])
            whole, blocked = seconds(trainer, flags.FLAGS.steps, checkpoints, number)
            saving.append(whole)
            blocking.append(blocked)
    step = statistics.median(plain) / flags.FLAGS.steps
    interval = every / trainer.tokens_per_step * step
    extra = [whole - without for whole, without in zip(saving, plain, strict=True)]
    share = [value / interval for value in extra]
    device = f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}"
    print(f"{device}; a checkpoint has {size / 1e6:,.1f} MB")
    print(f"step {1000 * step:,.1f} ms; from one checkpoint to the next {every:,} tokens, {interval:,.1f} s")
    print(f"a save blocks for {statistics.median(blocking):.3f} s, and costs {statistics.median(extra):.3f} s")
    print(f"share of the time: {statistics.median(share):.2%}; by round {min(share):.2%} to {max(share):.2%}")


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 7, "Sequences of each kind.", lower_bound=1)
    flags.DEFINE_integer("steps", 20, "Steps of a sequence.", lower_bound=1)
    flags.DEFINE_integer("vocab_size", 50_257, "Vocabulary size, if the config leaves it to the tokenizer.")
    flags.DEFINE_string("directory", None, "Where to save; default: the system's directory for temporary files.")
    cli.run(main)
