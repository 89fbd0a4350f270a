"""Variants of gptjax's training step for `benchmarks/train_step.py`: different programs with equal results."""

import ast
import dataclasses
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import device_kernels
from gptjax import config as c
from gptjax.checkpoint.state import TrainState, create_state, state_shardings
from gptjax.config import UserError
from gptjax.parallel import compiler
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.platforms import PlatformDefaults, override_defaults
from gptjax.stages import registry
from gptjax.training.step import make_train_step


def platform() -> str:
    """Returns the platform of the default device: "cpu", "gpu" or "tpu"."""
    name = jax.devices()[0].platform
    return "gpu" if name == "cuda" else name


@dataclasses.dataclass(frozen=True)
class Variant:
    """One program of gptjax's training step.

    Attributes:
      defaults: fields of `PlatformDefaults` that differ from the table, and their values.
    """

    name: str
    config: c.Config
    defaults: dict[str, Any]


def parse_variant(text: str, base: c.Config) -> Variant:
    """Parses NAME,KEY=VALUE,... into `base` with these changes.

    Raises:
      UserError: a KEY does not exist.
    """
    name, *changes = text.split(",")
    edited, xla_flags, defaults = c.config_dict(base), [], {}
    sequences, microbatches = base.sequences_per_microbatch, 1
    for change in changes:
        key, has_value, value = change.partition("=")
        section, _, field = key.partition(".")
        if not has_value:
            raise UserError(f"--variant={text}: {change!r} is not KEY=VALUE")
        if key == "sequences":
            sequences = int(value)
        elif key == "microbatches":
            microbatches = int(value)
        elif section == "xla":
            xla_flags.append((field, value))
        elif section == "platform":
            fields = [known.name for known in dataclasses.fields(PlatformDefaults)]
            if field not in fields:
                raise UserError(
                    f"--variant={text}: unknown platform default {field!r}, choose from {', '.join(fields)}"
                )
            defaults[field] = _literal(value)
        else:
            c.check_key(key)
            edited.update_from_flattened_dict({key: _literal(value)})
    edited.batch.microbatch_size = sequences
    edited.batch.tokens_per_batch = microbatches * sequences * base.model.context_length
    config = c.resolve(edited)
    options = (*config.compiler_options, *xla_flags)
    return Variant(name, dataclasses.replace(config, compiler_options=options), defaults)


def batch_shape(config: c.Config) -> tuple[int, int, int]:
    """Returns (M, B, T): microbatches, sequences of each, positions of a sequence."""
    rows, context = config.sequences_per_microbatch, config.model.context_length
    return config.batch.tokens_per_batch // (rows * context), rows, context


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


class Trainer:
    """The training step of several variants on one device, all on one training state.

    The learning rate is 0 (an argument of the programs), so that all variants must report the same loss and gradient.

    Attributes:
      compile_seconds, memory_bytes: by variant; memory is the compiler's figure for a step.
      numbers: loss and gradient norm of each variant that has run.
    """

    def __init__(self, base: c.Config, workers: int):
        """Args: workers: number of programs compiled in parallel."""
        self._objective = registry.objective(base)
        self._mesh = make_mesh(base.mesh, jax.devices()[:1])
        self._placement = state_shardings(self._objective.parameters, self._mesh)
        self._pool = ThreadPoolExecutor(workers)
        self._compiling: dict[str, Future[Any]] = {}
        self._steps: dict[str, Any] = {}
        self._arguments: dict[str, Any] = {}
        self._state: TrainState | None = None
        self.compile_seconds: dict[str, float] = {}
        self.memory_bytes: dict[str, int] = {}
        self.numbers: dict[str, tuple[float, float]] = {}

    def start(self, variant: Variant) -> None:
        """Traces a variant and compiles it in another thread."""
        config, name = variant.config, variant.name
        shape_MBT = batch_shape(config)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size or 0, shape_MBT[1:], np.int32)
        # Targets are the next tokens: a tied head easily predicts the token that it has just read.
        rows_MBT = (np.broadcast_to(rows, shape_MBT) for rows in (tokens, np.roll(tokens, -1, axis=1)))
        tokens_MBT, targets_MBT = map(jax.device_put, rows_MBT)
        batch = {"tokens": tokens_MBT, "targets": targets_MBT, "weights": jnp.ones(shape_MBT)}
        self._arguments[name] = (batch, np.int32(shape_MBT[0]), {"lr": np.float32(0)})
        with jax.set_mesh(self._mesh), override_defaults(platform(), **variant.defaults):
            step = make_train_step(registry.objective(config), self._placement)
            state = jax.eval_shape(lambda: create_state(self._objective.parameters, self._mesh))
            lowered = step.lower(state, *self._arguments[name])

        def compiled() -> Any:
            start = time.perf_counter()
            with jax.set_mesh(self._mesh):
                program = compiler.compile(lowered, config.compiler_options)
            self.compile_seconds[name] = time.perf_counter() - start
            return program

        self._compiling[name] = self._pool.submit(compiled)

    def wait(self) -> None:
        """Waits until all are compiled: cuDNN breaks the capture of CUDA graphs while it builds its own kernels."""
        wait(self._compiling.values())

    def finish(self, name: str) -> None:
        """Waits for the program of a variant and runs it once."""
        program = self._steps[name] = self._compiling.pop(name).result()
        memory = program.memory_analysis()
        if memory is not None:
            self.memory_bytes[name] = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        try:
            if self._state is None:
                self._state = create_state(self._objective.parameters, self._mesh)
            metrics = self._advance(name)
            self.numbers[name] = float(metrics["loss"]), float(metrics["grad_norm"])
        except Exception:
            self._state = None  # its buffers were donated
            raise

    def program(self, name: str) -> jax.stages.Compiled:
        """Returns the compiled program of a finished variant."""
        return self._steps[name]

    def _advance(self, name: str) -> dict[str, jax.Array]:
        self._state, metrics = self._steps[name](self._state, *self._arguments[name])
        return metrics

    def train(self, name: str, steps: int) -> float:
        """Returns the seconds per step."""
        self._advance(name)["loss"].block_until_ready()  # warm-up: another variant ran before
        start = time.perf_counter()
        for _ in range(steps):
            metrics = self._advance(name)
        metrics["loss"].block_until_ready()
        return (time.perf_counter() - start) / steps

    def kernels(self, name: str, steps: int = 3) -> list[tuple[str, float, int]]:
        """Returns the kernels of a step, as `device_kernels` reports them."""
        return device_kernels(lambda: self.train(name, steps), steps + 1)
