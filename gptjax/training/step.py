"""The pure training step (`make_train_step`), and the class that runs it on a stream of batches (`Stepper`)."""

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.checkpoint.state import SHARED_PROGRAMS, TrainState, abstract_state, state_shardings
from gptjax.data.pipeline import Microbatch
from gptjax.distributed import preemption, processes
from gptjax.models import peft
from gptjax.optim import adalora
from gptjax.optim.optimizers import gradient_norm, num_microbatches, schedule
from gptjax.parallel import compiler
from gptjax.parallel.rows import global_array, process_rows
from gptjax.training.objective import Batch, Measures, Objective


def dropout_rng(rng: jax.Array, step: jax.Array | int, microbatch: jax.Array | int) -> jax.Array:
    """The dropout key of a microbatch of a step, folded from the key data of the state."""
    return jax.random.fold_in(jax.random.fold_in(jax.random.wrap_key_data(rng), step), microbatch)


def loss_and_gradient(objective: Objective, base: Any, trained: Any, batch: Batch, rng: jax.Array) -> tuple[Any, Any]:
    """((loss sum, (weight sum, measures)), gradient of the loss sum) of a microbatch, for the trained parameters."""

    def loss(trained: Any) -> tuple[jax.Array, tuple[jax.Array, Measures]]:
        total, weight, measures = objective.loss(objective.parameters.join(base, trained), batch, rng)
        return total, (weight, measures)

    return jax.value_and_grad(loss, has_aux=True)(trained)


def make_train_step(objective: Objective, placement: TrainState) -> jax.stages.Wrapped:
    """Returns the jitted step: `step(state, batch, num_microbatches, schedule)` to `(state, metrics)`.

    `batch` holds (M, B, ...) arrays: room for the M microbatches of the largest batch, of which the first
    `num_microbatches` (int32) are used, so that a batch ramp never recompiles. `schedule` is the result of
    `optimizers.schedule`. The gradient is that of the loss's weighted mean over the whole batch, independent of the
    division into microbatches, and is accumulated in float32. `state` is donated. Metrics are float32 scalars: loss
    (nats per target), grad_norm (before clipping), skipped (0 or 1: updates that are not finite are skipped), and the
    means of the further measures of the loss.

    Args:
      placement: the shardings of the state.
    """
    config = objective.config
    optimizer, ema_decay = objective.parameters.optimizer(), config.optimizer.ema_decay
    on_device = jax.tree.map(lambda sharding: sharding.with_memory_kind("device"), placement.opt_state)
    # Jitted, so that it is traced once: for the shapes of the sums, and again from the cache for the loop.
    gradient = jax.jit(partial(loss_and_gradient, objective), inline=True)

    def accumulate(state: TrainState, batch: Batch, count: jax.Array) -> tuple[jax.Array, jax.Array, Measures, Any]:
        """Sums over the microbatches: loss, weight, measures, gradient."""

        def microbatch(i: jax.Array | int) -> tuple[jax.Array, jax.Array, Measures, Any]:
            rows = jax.tree.map(lambda a_MBT: a_MBT[i], batch)
            rng = dropout_rng(state.rng, state.step, i)

            (loss_sum, (weight, measures)), grads = gradient(state.base, state.params, rows, rng)
            # Sharded as the parameters, so that each device sums its own shards.
            return loss_sum, weight, measures, jax.lax.with_sharding_constraint(grads, placement.params)

        if next(iter(batch.values())).shape[0] == 1:
            return microbatch(0)
        zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(microbatch, 0))
        return jax.lax.fori_loop(0, count, lambda i, sums: jax.tree.map(jnp.add, sums, microbatch(i)), zeros)

    def step(
        state: TrainState, batch: Batch, num_microbatches: jax.Array, schedule: dict[str, jax.Array]
    ) -> tuple[TrainState, dict[str, jax.Array]]:
        loss_sum, weight, measures, grads = accumulate(state, batch, num_microbatches)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        if config.optimizer.offload:
            state = state.replace(opt_state=jax.device_put(state.opt_state, on_device))
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, u: (p - schedule["lr"] * u).astype(p.dtype), state.params, updates)
        if config.peft.method == "adalora":
            params = adalora.prune(config.peft, params, opt_state, schedule["rank_budget"])
        ema = state.ema
        if ema_decay is not None:
            ema = jax.tree.map(lambda e, p: ema_decay * e + (1 - ema_decay) * p, ema, params)
        loss, grad_norm = loss_sum / weight, gradient_norm(grads, objective.parameters.axes)
        finite = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
        metrics = {"loss": loss, "grad_norm": grad_norm, "skipped": 1.0 - finite}
        metrics |= {name: total / weight for name, total in measures.items()}
        new, old = (params, opt_state, ema), (state.params, state.opt_state, state.ema)
        params, opt_state, ema = jax.tree.map(lambda new, old: jnp.where(finite, new, old), new, old)
        return state.replace(step=state.step + 1, params=params, opt_state=opt_state, ema=ema), metrics

    return jax.jit(
        step,
        donate_argnums=0,
        in_shardings=(placement, None, None, None),  # a batch is laid out by `batch_sharding` already
        out_shardings=(placement, None),
    )


@dataclasses.dataclass(frozen=True)
class StepPrograms:
    """The jitted training step of an objective on a mesh, and its executables, by names and shapes of the batch."""

    train_step: jax.stages.Wrapped
    compiled: dict[Any, jax.stages.Compiled] = dataclasses.field(default_factory=dict)


@functools.lru_cache(maxsize=SHARED_PROGRAMS)
def step_programs(objective: Objective, mesh: Mesh) -> StepPrograms:
    """Returns the same programs for all runs of a process with equal objectives, so that only the first compiles."""
    return StepPrograms(make_train_step(objective, state_shardings(objective.parameters, mesh)))


@dataclasses.dataclass(frozen=True)
class StepResult:
    """A dispatched step. Its metrics are on the device, and reading them waits for the step.

    Attributes:
      tokens, examples: number trained on, this step included.
    """

    step: int
    tokens: int
    examples: int
    lr: float
    metrics: dict[str, jax.Array]


class Stepper:
    """Runs training steps: reads a batch, compiles the step for new shapes, dispatches it.

    `start` sets the state and the batches, before the first step and after a rewind.

    Args:
      say: prints a line, such as the time of a compilation.

    Attributes:
      state: after the last step.
      step, tokens, examples: numbers since the start of the run.
      batch, count: of the last step: (M, B, ...) arrays, and the number of microbatches that were used.
    """

    state: TrainState
    step: int
    tokens: int
    examples: int
    _batches: Iterator[Microbatch]

    def __init__(self, objective: Objective, mesh: Mesh, total_tokens: int, say: Callable[[str], None]) -> None:
        config = objective.config
        self.batch: Batch = {}
        self.count = 0
        self.abstract_state = abstract_state(objective.parameters, mesh)
        self._config, self._mesh, self._total_tokens, self._say = config, mesh, total_tokens, say
        self._microbatch = config.sequences_per_microbatch
        # Microbatches of the largest batch; a batch ramp uses fewer.
        self._room = config.batch.tokens_per_batch // (self._microbatch * config.model.context_length)
        self._rows = process_rows(mesh, self._microbatch)
        self._programs = step_programs(objective, mesh)
        self._prepared: set[Any] = set()  # the keys of the programs that this run has used
        self._matrices = peft.count_matrices(self.abstract_state.params)

    @property
    def examples_per_batch(self) -> int:
        """Examples in a full batch."""
        return self._room * self._microbatch

    def start(self, state: TrainState, examples: int, tokens: int, batches: Iterator[Microbatch]) -> None:
        """Sets the state, the numbers of examples and tokens it was trained on, and the batches that follow."""
        self.state, self.step, self.examples, self.tokens = state, int(state.step), examples, tokens
        self._batches = batches

    def take(self) -> StepResult:
        """Dispatches one step."""
        config = self._config
        self.count = num_microbatches(config.batch, config.model.context_length, self.tokens)
        self.batch, num_tokens = self._next_batch(self.count)
        self.examples += self.count * self._microbatch
        self.tokens += num_tokens
        self.step += 1
        values = schedule(config, self.step, self.tokens, self._total_tokens, self._matrices)
        arguments = (self.state, self.batch, np.int32(self.count), values)
        key = tuple((name, array.shape, array.dtype) for name, array in self.batch.items())
        if key not in self._prepared:
            self._prepare(key, arguments)
        self.state, metrics = self._programs.compiled[key](*arguments)
        return StepResult(self.step, self.tokens, self.examples, float(values["lr"]), metrics)

    def _prepare(self, key: Any, arguments: tuple[Any, ...]) -> None:
        """Compiles the step ahead of time: an executable never recompiles silently, and reports its memory."""
        start, programs = time.perf_counter(), self._programs
        is_new = key not in programs.compiled
        if is_new:
            with compiler.announced("the training step"):
                lowered = programs.train_step.lower(*arguments)
                programs.compiled[key] = compiler.compile(lowered, self._config.compiler_options)
        if not self._prepared:
            preemption.defer()  # from now on a stop request saves first
        self._prepared.add(key)
        processes.gather(None)  # Gloo times out if a process is 30 s late at the first collective
        memory = programs.compiled[key].memory_analysis()
        need = 0 if memory is None else memory.argument_size_in_bytes + memory.temp_size_in_bytes
        took = f"compiled the training step in {time.perf_counter() - start:.1f} s"
        self._say(f"{took if is_new else 'reused the training step of an earlier run'}; {need / 1e9:.2f} GB per device")

    def _next_batch(self, count: int) -> tuple[Batch, int]:
        """The next `count` microbatches as (M, B, ...) global arrays, padded with zeros, and their number of tokens."""
        microbatches = [next(self._batches) for _ in range(count)]

        def stack(*local_B: np.ndarray) -> jax.Array:
            local_MB = np.zeros((self._room, *local_B[0].shape), local_B[0].dtype)
            local_MB[:count] = local_B
            return global_array(self._mesh, self._rows, local_MB, self._microbatch, None)

        arrays = jax.tree.map(stack, *(microbatch.arrays for microbatch in microbatches))
        return arrays, sum(microbatch.num_tokens for microbatch in microbatches)
