"""Our side of `benchmarks/train_step.py`: programs of the training step that differ in how, and not in what."""

import ast
import dataclasses
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.measuring import device_kernels
from gptjax import config as c
from gptjax.checkpoint.state import TrainState, create_state, state_shardings
from gptjax.config import UserError
from gptjax.losses import cross_entropy as losses
from gptjax.models import attention, elementwise
from gptjax.parallel import compiler
from gptjax.parallel.mesh import make_mesh
from gptjax.stages import registry
from gptjax.training.step import make_train_step

MODULES: dict[str, Any] = {"losses": losses, "attention": attention, "elementwise": elementwise}


def platform() -> str:
    """As gptjax names it."""
    name = jax.devices()[0].platform
    return "gpu" if name == "cuda" else name


@dataclasses.dataclass(frozen=True)
class Variant:
    """One program of ours."""

    name: str
    config: c.Config
    constants: dict[tuple[str, str], Any]  # (module, name): what it chooses for the platform


def parse_variant(text: str, base: c.Config) -> Variant:
    """`base` changed as NAME,KEY=VALUE,... says; UserError for a key that is not there."""
    name, *changes = text.split(",")
    edited, flags_of_xla, constants = c.config_dict(base), [], {}
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
            flags_of_xla.append((field, value))
        elif section in MODULES:
            if not isinstance(getattr(MODULES[section], field, None), dict):
                raise UserError(f"--variant={text}: {section} chooses no {field} by platform")
            constants[section, field] = _literal(value)
        else:
            c.check_key(key)
            edited.update_from_flattened_dict({key: _literal(value)})
    edited.batch.microbatch_size = sequences
    edited.batch.tokens_per_batch = microbatches * sequences * base.model.context_length
    config = c.resolve(edited)
    options = (*config.compiler_options, *flags_of_xla)
    return Variant(name, dataclasses.replace(config, compiler_options=options), constants)


def batch_shape(config: c.Config) -> tuple[int, int, int]:
    """Microbatches, sequences of each, and their tokens."""
    rows, context = config.sequences_per_microbatch, config.model.context_length
    return config.batch.tokens_per_batch // (rows * context), rows, context


def _literal(value: str) -> Any:
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


@contextmanager
def changed(constants: dict[tuple[str, str], Any], platform: str) -> Iterator[None]:
    """In which modules choose other values for the platform."""
    tables = [(getattr(MODULES[module], name), value) for (module, name), value in constants.items()]
    before = [table[platform] for table, _ in tables]
    for table, value in tables:
        table[platform] = value
    try:
        yield
    finally:
        for (table, _), value in zip(tables, before, strict=True):
            table[platform] = value


class Trainer:
    """The real training step of several variants, on one state that goes from one to the other, and one device.

    The learning rate is 0, which no program knows: so all variants have one loss and one gradient, and show it.

    Attributes:
      compile_seconds, memory_bytes: by variant; memory is what the compiler says a step needs.
      numbers: by variant that has run, the loss and the norm of the gradient.
    """

    def __init__(self, base: c.Config, workers: int):
        """Args: workers: programs that are compiled at once."""
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
        """Traces a variant, and has it compiled by another thread."""
        config, name = variant.config, variant.name
        shape_MBT = batch_shape(config)
        tokens = np.random.default_rng(0).integers(0, config.model.vocab_size or 0, shape_MBT[1:], np.int32)
        # A model with a tied head finds it easy to say what it has just read: targets are the tokens after.
        rows_MBT = (np.broadcast_to(rows, shape_MBT) for rows in (tokens, np.roll(tokens, -1, axis=1)))
        tokens_MBT, targets_MBT = map(jax.device_put, rows_MBT)
        batch = {"tokens": tokens_MBT, "targets": targets_MBT, "weights": jnp.ones(shape_MBT)}
        self._arguments[name] = (batch, np.int32(shape_MBT[0]), {"lr": np.float32(0)})
        with jax.set_mesh(self._mesh), changed(variant.constants, platform()):
            step = make_train_step(registry.objective(config), self._placement)
            state = jax.eval_shape(lambda: create_state(self._objective.parameters, self._mesh))
            lowered = step.lower(state, *self._arguments[name])

        def compiled() -> Any:
            start = time.perf_counter()
            with jax.set_mesh(self._mesh):
                program = compiler.compile(lowered, platform(), config.compiler_options)
            self.compile_seconds[name] = time.perf_counter() - start
            return program

        self._compiling[name] = self._pool.submit(compiled)

    def wait(self) -> None:
        """Until all are compiled: cuDNN, building its kernels, breaks the capture of another program's CUDA graphs."""
        wait(self._compiling.values())

    def finish(self, name: str) -> None:
        """Waits for the program of a variant, and runs it once."""
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
            self._state = None  # it was given away
            raise

    def program(self, name: str) -> jax.stages.Compiled:
        """Of a variant that is finished."""
        return self._steps[name]

    def _advance(self, name: str) -> dict[str, jax.Array]:
        self._state, metrics = self._steps[name](self._state, *self._arguments[name])
        return metrics

    def train(self, name: str, steps: int) -> float:
        """Seconds of a step."""
        self._advance(name)["loss"].block_until_ready()  # another variant ran before
        start = time.perf_counter()
        for _ in range(steps):
            metrics = self._advance(name)
        metrics["loss"].block_until_ready()
        return (time.perf_counter() - start) / steps

    def kernels(self, name: str, steps: int = 3) -> list[tuple[str, float, int]]:
        """Of a step, as `device_kernels` tells them."""
        return device_kernels(lambda: self.train(name, steps), steps + 1)
