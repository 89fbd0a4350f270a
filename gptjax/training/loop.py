"""The one training loop. A stage says what is learned; this does the rest: step, evaluate, log, save, report."""

import dataclasses
import importlib.metadata
import math
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.position import Position
from gptjax.checkpoint.saved_trees import ConfigChanges
from gptjax.checkpoint.state import Batch, TrainState, abstract_state, make_train_step, state_shardings
from gptjax.config import Config, UserError, config_hash
from gptjax.distributed import preemption, processes
from gptjax.distributed.preemption import PreemptedError
from gptjax.models import peft
from gptjax.optim.optimizers import num_microbatches, schedule
from gptjax.parallel import compiler
from gptjax.parallel.rows import global_array, process_rows
from gptjax.stages.start import resumed_state, start_state
from gptjax.training.debug_bundles import save_bundle
from gptjax.training.loss_monitor import LossSpikeError, NotFiniteError
from gptjax.training.metrics_file import MetricsWriter, plot_loss
from gptjax.training.progress import Progress
from gptjax.training.stage import Stage

PROFILED_STEPS = range(5, 8)  # counted from the start of the process: the first ones compile and fill queues
LOWER_IS_BETTER = ("loss", "perplexity", "bits_per_byte", "mean_squared_error")  # of the validation's metrics
MAX_REWINDS = 3  # to one checkpoint: other data does not help it


@dataclasses.dataclass(frozen=True)
class Report:
    """How a run ended."""

    step: int
    tokens: int
    validation: dict[str, float]
    sample: str | None
    conclusion: str | None


def train(
    stage: Stage,
    mesh: Mesh,
    workdir: Path,
    *,
    profile: bool = False,
    changes: ConfigChanges | None = None,
    on_start: Callable[[], None] | None = None,
) -> Report:
    """Trains to `stage.total_tokens`, from the newest checkpoint in `workdir` if there is one.

    Args:
      stage: what to train.
      mesh: the devices.
      workdir: gets checkpoints/, metrics.jsonl, tensorboard/, samples/ and loss.png.
      profile: write a trace of a few steps to `<workdir>/profile/`.
      changes: of the config since the run in `workdir` was started; None: there are none.
      on_start: called when the state has been restored, before anything is written.

    Raises:
      UserError: the disk is full, the data cannot be read, or too many updates in a row were skipped, as the numbers
        were not finite. Checkpoints already saved are whole.
      PreemptedError: the run was asked to stop, and is saved up to its last step.
    """
    config = stage.config
    with jax.set_mesh(mesh), ExitStack() as stack:
        checkpoints = stack.enter_context(Checkpoints(workdir, config.checkpoint))
        state, position = start_state(stage.program, mesh, checkpoints, changes)
        if on_start is not None:
            on_start()
        run = _Run(stage, mesh, workdir, checkpoints, state, position, stack, changes)
        if run.step > 0:
            run.say(f"going on from step {run.step}")
        if run.owes_evaluation:
            run.evaluate()
        if run.step == 0 and config.stability.on_spike == "rewind":
            run.save()  # so that there is always something to go back to
        finished = False
        while not finished:
            try:
                _train_on(run, profile)
                finished = True
            except LossSpikeError as spike:
                run.rewind(spike)
            except NotFiniteError as error:
                run.give_up(error)
        if profile and run.steps_here <= PROFILED_STEPS.start:
            run.say(f"no profile: the run ended before step {PROFILED_STEPS.start + 1} of this process")
        if jax.process_index() == 0:
            plot_loss(workdir)
        conclusion = None if stage.conclude is None else stage.conclude(*run.best_params(), workdir)
        return Report(run.step, run.tokens, run.validation, run.sample, conclusion)


def _train_on(run: "_Run", profile: bool) -> None:
    """Trains from where the run is to its end, or until it is asked to stop."""
    config, total_tokens = run.stage.config, run.stage.total_tokens
    try:
        while run.tokens < total_tokens and not run.out_of_patience:
            before = run.tokens
            if profile and run.steps_here == PROFILED_STEPS.start:
                run.profile_steps()
            else:
                run.train_step()
            if _due(config.evaluation.every_tokens, before, run.tokens):
                run.evaluate()
            if _due(config.checkpoint.every_tokens, before, run.tokens):
                run.save()
            preemption.check()
        run.save()
    except PreemptedError as request:
        run.stop(request)


def _due(every: int | None, before: int, after: int) -> bool:
    """Whether a multiple of `every` tokens lies in (before, after]."""
    return every is not None and after // every > before // every


class _Run:
    """A run in progress, and the things that happen to it."""

    def __init__(
        self,
        stage: Stage,
        mesh: Mesh,
        workdir: Path,
        checkpoints: Checkpoints,
        state: TrainState,
        position: Position,
        stack: ExitStack,
        changes: ConfigChanges | None = None,
    ):
        self._changes = changes
        self.stage, self.workdir, self.checkpoints = stage, workdir, checkpoints
        self.state, self.examples, self.skipped_examples = state, position.examples, position.skipped_examples
        self.tokens = position.tokens  # trained on
        config = stage.config
        self.step, self.steps_here = int(state.step), 0
        self.validation: dict[str, float] = {}
        self.sample: str | None = None
        self._evaluated: int | None = None  # the step that `validation` and `sample` are of
        self.owes_evaluation = self.step == 0 or position.owes_evaluation
        self._best = position.best
        self._saved = checkpoints.latest_step()
        self._rewinds = 0  # to the checkpoint `_saved`
        self._microbatch = config.sequences_per_microbatch
        # Room for the largest batch; a batch ramp fills less of it.
        self._room = config.batch.tokens_per_batch // (self._microbatch * config.model.context_length)
        self._mesh, self._rows = mesh, process_rows(mesh, self._microbatch)
        if stage.attach is not None:
            stage.attach(self)
        self._batches = stage.batches(self.examples + self.skipped_examples)
        self._batch: Batch = {}  # of the newest step, and how many of its microbatches count
        self._count = 0
        self._abstract_state = abstract_state(stage.program, mesh)
        self._train_step = make_train_step(stage.program, state_shardings(stage.program, mesh))
        self._compiled: dict[Any, jax.stages.Compiled] = {}  # by the shapes of the batch
        self._matrices = peft.count_matrices(self._abstract_state.params)
        self._writer: MetricsWriter | None = None  # of process 0 alone
        if jax.process_index() == 0:
            header = _header(config, mesh, self._abstract_state)
            writer = MetricsWriter(workdir, header, config.logging, resume_step=self._saved)
            self._writer = stack.enter_context(writer)
        self._progress = stack.enter_context(
            Progress(config, self._writer, self.tokens, stage.total_tokens, position.progress)
        )

    @property
    def policy(self) -> Any:
        return self.stage.program.join(self.state.base, self.state.params)

    @property
    def params(self) -> Any:
        """All parameters, those that are trained as their average where there is one."""
        trained = self.state.params if self.state.ema is None else self.state.ema
        return self.stage.program.join(self.state.base, trained)

    def best_params(self) -> tuple[Any, int]:
        """All parameters of the best checkpoint, and its step."""
        self.checkpoints.wait()
        best = self.checkpoints.best_step()
        if best is None or best == self.step:
            return self.params, self.step
        trained, _ = self.checkpoints.restore_params(self._abstract_state.params, best)
        return self.stage.program.join(self.state.base, trained), best

    @property
    def out_of_patience(self) -> bool:
        """Whether so many evaluations in a row were no better that the run stops."""
        patience = self.stage.config.evaluation.patience
        return patience is not None and self._best.evaluations_since >= patience

    def say(self, text: str) -> None:
        self._progress.say(text)

    def record(self, split: str, text: str | None = None, **values: float) -> None:
        """As of `Learner`; once for each step, whatever a run that goes on does again."""
        self._progress.flush()
        if self._writer is not None and not self._writer.has(self.step, split):
            self._writer.write(self.step, self.tokens, split, **values)
            if text is not None:
                self._show(split, text)

    def _show(self, name: str, text: str) -> None:
        """Writes a text in samples/, and shows it where the metrics are shown."""
        assert self._writer is not None
        directory = self.workdir / "samples"
        directory.mkdir(exist_ok=True)
        prefix = "" if name == "sample" else f"{name}_"
        (directory / f"{prefix}step_{self.step:08d}.txt").write_text(text + "\n")
        self._writer.write_text(self.step, name, text)

    def train_step(self) -> None:
        """Dispatches one step; its metrics are read when the next one is under way."""
        config = self.stage.config
        self._count = num_microbatches(config.batch, config.model.context_length, self.tokens)
        self._batch, num_tokens = self._next_batch(self._count)
        self.examples += self._count * self._microbatch
        self.tokens += num_tokens
        self.step += 1
        self.steps_here += 1
        values = schedule(config, self.step, self.tokens, self.stage.total_tokens, self._matrices)
        arguments = (self.state, self._batch, np.int32(self._count), values)
        shapes = tuple(array.shape for array in self._batch.values())
        if shapes not in self._compiled:
            self._compiled[shapes] = self._compile(arguments)
        self.state, metrics = self._compiled[shapes](*arguments)
        self._progress.add(self.step, self.tokens, self.examples, float(values["lr"]), metrics)

    def profile_steps(self) -> None:
        """Takes the steps of PROFILED_STEPS under the profiler."""
        with jax.profiler.trace(self.workdir / "profile"):
            for _ in PROFILED_STEPS:
                if self.tokens < self.stage.total_tokens:
                    self.train_step()
            jax.block_until_ready(self.state)
        self.say(f"profiled {len(PROFILED_STEPS)} steps: {self.workdir / 'profile'}")

    def _compile(self, arguments: tuple[Any, ...]) -> jax.stages.Compiled:
        """Compiles ahead of the first call: an executable cannot recompile unseen, and tells its memory."""
        start = time.perf_counter()
        platform = self._mesh.devices.flat[0].platform
        compiled = compiler.compile(self._train_step.lower(*arguments), platform, self.stage.config.compiler_options)
        if not self._compiled:
            preemption.defer()  # from here on there is something to save
        processes.gather(None)  # gloo gives up on a process that comes half a minute later to a first collective
        memory = compiled.memory_analysis()
        need = 0 if memory is None else memory.argument_size_in_bytes + memory.temp_size_in_bytes
        self.say(f"compiled the training step in {time.perf_counter() - start:.1f} s; {need / 1e9:.2f} GB a device")
        self._progress.restart()
        return compiled

    def evaluate(self) -> None:
        """Held-out loss and a sample of the present weights (their average where there is one)."""
        self._progress.flush()
        self.owes_evaluation = True
        params = self.params
        self.validation = self.stage.evaluate(params)
        self.sample = None if self.stage.sample is None else self.stage.sample(params)
        self._evaluated, self.owes_evaluation = self.step, False
        score = self.score()  # at step 0 too: a metric that is not measured is known before anything is trained
        if self.step > 0:
            self._best = self._best.after(score)
        if self._writer is not None and not self._writer.has(self.step, "validation"):  # a run that goes on has one
            self._writer.write(self.step, self.tokens, "validation", **self.validation)
            values = ", ".join(f"{name.replace('_', ' ')} {value:.3f}" for name, value in self.validation.items())
            self.say(f"step {self.step}: validation {values}")
            if self.sample is not None:
                self._show("sample", self.sample)
        self._progress.restart()

    def save(self, *, evaluate: bool = True) -> None:
        """Saves this step, once, with its held-out loss: the best checkpoint is kept besides the newest.

        Args:
          evaluate: for that loss, where this step has none yet; without one a checkpoint is never the best.
        """
        self._progress.flush()
        if evaluate and self._evaluated != self.step:
            self.evaluate()
        if self._saved != self.step:
            if self._writer is not None:
                self._writer.sync()
            position = Position(
                self.examples,
                self.tokens,
                self.skipped_examples,
                self._best,
                self._progress.state(),
                self.owes_evaluation,
            )
            score = self.score() if self._evaluated == self.step else None
            self.checkpoints.save(self.step, self.state, position, score)
            self._saved, self._rewinds = self.step, 0
            self._progress.restart()

    def stop(self, request: PreemptedError) -> NoReturn:
        """Saves this step; raises PreemptedError."""
        self.save(evaluate=False)
        self.checkpoints.wait()
        raise PreemptedError(f"{request}, step {self.step} is saved") from None

    def score(self) -> float | None:
        """Of the newest validation, the higher the better; None where it is not finite.

        Raises:
          UserError: the validation has no such metric.
        """
        name = self.stage.config.evaluation.metric
        if name not in self.validation:
            raise UserError(f"evaluation.metric={name!r} is not measured: one of {', '.join(self.validation)}")
        value = self.validation[name]
        if not math.isfinite(value):
            return None
        return -value if name in LOWER_IS_BETTER else value

    def rewind(self, spike: LossSpikeError) -> None:
        """Goes back to the newest checkpoint, and on with the data that follows the spike (`StabilityConfig`).

        Raises:
          UserError: the loss has spiked after this checkpoint too often.
        """
        self._rewinds += 1
        if self._rewinds > MAX_REWINDS:
            raise UserError(
                f"{spike}: it spiked {self._rewinds} times after checkpoint {self._saved}, whatever the data; lower "
                "optimizer.peak_lr or raise stability.spike_deviations, and go on by --allow_config_changes"
            )
        self.checkpoints.wait()
        restored, position = resumed_state(self.stage.program, self._mesh, self.checkpoints, self._changes)
        self.state = restored.replace(base=self.state.base)
        config = self.stage.config
        since = spike.examples - position.examples
        self.skipped_examples += since + config.stability.rewind_batches * self._room * self._microbatch
        self.step, self.examples, self.tokens = int(self.state.step), position.examples, position.tokens
        self._best = position.best
        self._batches = self.stage.batches(self.examples + self.skipped_examples)
        self._progress.go_back(self.tokens, position.progress)
        self._evaluated, self.owes_evaluation = None, False
        self.say(f"{spike}: back to step {self.step}, on with the data after the spike")
        if self._writer is not None:
            self._writer.go_back(self.step)
            # Of the next step, so that a run that resumes at this one, and meets the spike again, has it once.
            numbers = {"loss": spike.loss, "usual": spike.usual, "skipped_examples": self.skipped_examples}
            self._writer.write(self.step + 1, self.tokens, "rewind", spike_step=spike.step, **numbers)

    def give_up(self, error: NotFiniteError) -> NoReturn:
        """Saves what is needed to find out why the numbers are not finite, and the run; raises UserError."""
        bundle = save_bundle(self.workdir, self.stage.program, self.state, self._batch, self._count)
        self.save(evaluate=False)
        raise UserError(
            f"{error}: {self.stage.config.stability.max_skipped_updates} updates in a row were skipped; see where it "
            f"began by python -m gptjax.replay --bundle={bundle}, lower optimizer.peak_lr or lengthen "
            "optimizer.warmup_tokens; the same command goes on with the data that follows"
        )

    def _next_batch(self, count: int) -> tuple[Batch, int]:
        """The next `count` microbatches as (M, B, ...) global arrays, M the room there is, and their tokens.

        What `count` leaves of the room is 0.
        """
        microbatches = [next(self._batches) for _ in range(count)]

        def stack(*local_B: np.ndarray) -> jax.Array:
            local_MB = np.zeros((self._room, *local_B[0].shape), local_B[0].dtype)
            local_MB[:count] = local_B
            return global_array(self._mesh, self._rows, local_MB, self._microbatch, None)

        arrays = jax.tree.map(stack, *(microbatch.arrays for microbatch in microbatches))
        return arrays, sum(microbatch.num_tokens for microbatch in microbatches)


def _header(config: Config, mesh: Mesh, state: TrainState) -> dict[str, Any]:
    """What metrics.jsonl says of the run before its records."""
    return {
        "stage": config.stage,
        "config_hash": config_hash(config),
        "parameters": peft.count(state.base) + peft.count(state.params),
        "trained_parameters": peft.count(state.params),
        "devices": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processes": jax.process_count(),
        "mesh": dict(mesh.shape),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "optax", "grain")},
    }
