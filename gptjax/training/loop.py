"""The one training loop. A stage supplies objective, batches and evaluation; the loop steps, evaluates, logs, saves.

The loss of a step is `stage.objective.loss`, whose gradient `gptjax/training/step.py:loss_and_gradient` takes; that of
pretraining is `gptjax/stages/pretrain.py:next_token_loss`.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn

import jax
from jax.sharding import Mesh

from gptjax.checkpoint.manager import Checkpoints
from gptjax.checkpoint.position import Position
from gptjax.checkpoint.restore import resumed_state
from gptjax.checkpoint.saved_trees import ConfigChanges
from gptjax.checkpoint.state import TrainState
from gptjax.config import UserError
from gptjax.distributed import preemption
from gptjax.distributed.preemption import PreemptedError
from gptjax.files import written_locally
from gptjax.training.debug_bundles import save_bundle
from gptjax.training.loss_monitor import LossSpike, NotFinite
from gptjax.training.metrics_file import LOWER_IS_BETTER, MetricsWriter, read_metrics, shown_name
from gptjax.training.plots import plot_loss
from gptjax.training.progress import Progress
from gptjax.training.provenance import describe_run
from gptjax.training.stage import Stage
from gptjax.training.step import Stepper

PROFILED_STEPS = range(5, 8)  # counted from the start of the process: the first ones compile and fill queues
MAX_REWINDS = 3  # to one checkpoint: after these, other data does not help


@dataclasses.dataclass(frozen=True)
class RunReport:
    """The result of a run.

    Attributes:
      sample: a generated text; None: the stage has no samples.
      conclusion: the stage's own report; None: it has none.
      seconds: wall-clock time since the start of the run, downtime excluded; 0 except on process 0.
      best: step, name and value of the best `evaluation.metric` of the checkpoints that are kept; None: unknown.
      epochs: how many times each source of a mixture has been read, by name; empty: there is one source.
    """

    step: int
    tokens: int
    validation: dict[str, float]
    sample: str | None
    conclusion: str | None
    seconds: float = 0.0
    best: tuple[int, str, float] | None = None
    epochs: Mapping[str, float] = dataclasses.field(default_factory=dict)


def train(
    stage: Stage,
    mesh: Mesh,
    workdir: Path,
    checkpoints: Checkpoints,
    state: TrainState,
    position: Position,
    *,
    profile: bool = False,
    changes: ConfigChanges | None = None,
    callbacks: Sequence[Callable[[dict[str, Any]], None]] = (),
) -> RunReport:
    """Trains to `stage.total_tokens`; `mesh` is in use.

    Args:
      stage: what to train.
      workdir: gets metrics.jsonl, tensorboard/, samples/ and loss.png.
      checkpoints: of the workdir.
      state, position: where to start from (`gptjax/stages/start.py`).
      profile: write a trace of a few steps to `<workdir>/profile/`.
      changes: of the config since the run in `workdir` was started; None: there are none.
      callbacks: each is called with every record of metrics.jsonl, by process 0.

    Raises:
      UserError: the disk is full, the data cannot be read, or too many updates in a row were not finite. Checkpoints
        already saved are intact.
      PreemptedError: the run was asked to stop, and is saved up to its last step.
    """
    config = stage.config
    with ExitStack() as stack:
        run = _Run(stage, mesh, workdir, checkpoints, state, position, changes, stack, callbacks)
        try:
            run.begin()
            while not run.finished:
                before = run.tokens
                if profile and run.steps_here == PROFILED_STEPS.start:
                    run.profile_steps()
                else:
                    run.train_step()
                evaluation_due = _due(config.evaluation.every_tokens, before, run.tokens)
                save_due = _due(config.checkpoint.every_tokens, before, run.tokens)
                if evaluation_due or save_due or run.finished:
                    run.read_metrics()
                if (problem := run.take_problem()) is not None:
                    run.recover(problem)
                    continue
                if evaluation_due:
                    run.evaluate()
                if save_due:
                    run.save()
                preemption.check()
            run.save()
        except PreemptedError as request:
            run.stop(request)
        if profile and run.steps_here <= PROFILED_STEPS.start:
            run.say(f"no profile: the run ended before step {PROFILED_STEPS.start + 1} of this process")
        return run.conclude()


def _due(every: int | None, before: int, after: int) -> bool:
    """Whether a multiple of `every` tokens lies in (before, after]."""
    return every is not None and after // every > before // every


class _Run:
    """A run in progress: its evaluations, records and checkpoints. `Stepper` holds the state and takes the steps."""

    def __init__(
        self,
        stage: Stage,
        mesh: Mesh,
        workdir: Path,
        checkpoints: Checkpoints,
        state: TrainState,
        position: Position,
        changes: ConfigChanges | None,
        stack: ExitStack,
        callbacks: Sequence[Callable[[dict[str, Any]], None]],
    ):
        self.stage, self.workdir, self._checkpoints = stage, workdir, checkpoints
        self._mesh, self._changes = mesh, changes
        self.steps_here = 0
        self._stepper = Stepper(stage.objective, mesh, stage.total_tokens, self._compiled)
        self._skipped_examples, self._best = position.skipped_examples, position.best
        self._validation: dict[str, float] = {}
        self._sample: str | None = None
        self._evaluated: int | None = None  # the step that `_validation` and `_sample` are of
        self._owes_evaluation = int(state.step) == 0 or position.owes_evaluation
        self._saved = checkpoints.latest_step()
        self._rewinds = 0  # to the checkpoint `_saved`
        self._start_at(state, position)
        self._writer: MetricsWriter | None = None  # of process 0 alone
        if jax.process_index() == 0:
            header = describe_run(stage.config, mesh, self._stepper.abstract_state, stage.flops_per_token)
            writer = MetricsWriter(workdir, header, stage.config.logging, self._saved, callbacks)
            self._writer = stack.enter_context(writer)
        # Epochs of each source of a mixture after so many training examples.
        self._epochs = lambda n: {} if stage.epochs is None else stage.epochs(n + self._skipped_examples)
        place = (self.tokens, stage.total_tokens, position.progress)
        self._progress = stack.enter_context(Progress(stage, self._writer, *place, self._epochs))

    def _start_at(self, state: TrainState, position: Position) -> None:
        batches = self.stage.batches(position.examples + self._skipped_examples, self)
        self._stepper.start(state, position.examples, position.tokens, batches)

    # --- what the loop and a stage's batches read ---------------------------------------------------------------------

    @property
    def tokens(self) -> int:
        """Number of tokens trained on so far."""
        return self._stepper.tokens

    @property
    def finished(self) -> bool:
        """Whether the run has trained on all its tokens, or evaluations have stopped improving."""
        patience = self.stage.config.evaluation.patience
        stopped_early = patience is not None and self._best.evaluations_since >= patience
        return self.tokens >= self.stage.total_tokens or stopped_early

    @property
    def policy(self) -> Any:
        """All parameters after the last step; not their moving average."""
        return self._join(self._stepper.state.params)

    @property
    def params(self) -> Any:
        """All parameters; the trained ones as their moving average where the run keeps one."""
        state = self._stepper.state
        return self._join(state.params if state.ema is None else state.ema)

    def _join(self, trained: Any) -> Any:
        return self.stage.objective.parameters.join(self._stepper.state.base, trained)

    def say(self, text: str) -> None:
        """Prints above the progress bar."""
        self._progress.say(text)

    def record(self, split: str, text: str | None = None, **values: float) -> None:
        """Writes a record of this step, and a text; once per step, even if a resumed run repeats the step."""
        self._progress.read()
        if self._writer is not None and not self._writer.has(self._stepper.step, split):
            self._writer.write(self._stepper.step, self.tokens, split, **values)
            if text is not None:
                self._show(split, text)

    def _show(self, name: str, text: str) -> None:
        """Writes a text to samples/ and to TensorBoard."""
        assert self._writer is not None
        directory = self.workdir / "samples"
        directory.mkdir(exist_ok=True)
        prefix = "" if name == "sample" else f"{name}_"
        (directory / f"{prefix}step_{self._stepper.step:08d}.txt").write_text(text + "\n")
        self._writer.write_text(self._stepper.step, name, text)

    # --- what the loop does -------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Evaluates the initial parameters, unless that was done before the run stopped."""
        if self._stepper.step > 0:
            self.say(f"resuming from step {self._stepper.step}")
        if self._owes_evaluation:
            self.evaluate()
        if self._stepper.step == 0 and self.stage.config.stability.on_spike == "rewind":
            self.save()  # so that there is always a checkpoint to rewind to

    def train_step(self) -> None:
        """Dispatches one step; its metrics are read once the next one is dispatched."""
        result = self._stepper.take()
        self.steps_here += 1
        self._progress.add(result)

    def _compiled(self, text: str) -> None:
        self.say(text)
        self._progress.restart_clock()

    def profile_steps(self) -> None:
        """Takes the steps of PROFILED_STEPS under the profiler."""
        with written_locally(self.workdir / "profile") as directory, jax.profiler.trace(directory):
            for _ in PROFILED_STEPS:
                if self.tokens < self.stage.total_tokens:
                    self.train_step()
            jax.block_until_ready(self._stepper.state)
        self.say(f"profiled {len(PROFILED_STEPS)} steps: {self.workdir / 'profile'}")

    def read_metrics(self) -> None:
        """Waits for the metrics of the last step."""
        self._progress.read()

    def take_problem(self) -> LossSpike | NotFinite | None:
        """Returns the problem in the metrics read so far that the run must recover from; None: there is none."""
        return self._progress.take_problem()

    def evaluate(self) -> None:
        """Computes the held-out loss and a sample with the current weights, or their moving average if there is one."""
        self._owes_evaluation = True
        params, step = self.params, self._stepper.step
        self._validation = self.stage.evaluate(params)
        self._sample = None if self.stage.sample is None else self.stage.sample(params)
        self._evaluated, self._owes_evaluation = step, False
        score = self._score()  # at step 0 too: a metric that is not measured is found before anything is trained
        if step > 0:
            self._best = self._best.after(score)
        if self._writer is not None and not self._writer.has(step, "validation"):  # a resumed run may have one
            self._writer.write(step, self.tokens, "validation", **self._validation)
            values = ", ".join(f"{shown_name(name)} {value:.3f}" for name, value in self._validation.items())
            self.say(f"step {step}: validation {values}")
            if self._sample is not None:
                self._show("sample", self._sample)
        self._progress.restart_clock()

    def _score(self) -> float | None:
        """Returns `evaluation.metric` of the last validation, negated where lower is better; None if it is not finite.

        Raises:
          UserError: the validation has no such metric.
        """
        name = self.stage.config.evaluation.metric
        if name not in self._validation:
            raise UserError(f"evaluation.metric={name!r} is not measured: one of {', '.join(self._validation)}")
        value = self._validation[name]
        if not math.isfinite(value):
            return None
        return -value if name.partition("/")[0] in LOWER_IS_BETTER else value  # loss/NAME: of a source of a mixture

    def save(self, *, evaluate: bool = True) -> None:
        """Saves this step, once, with its held-out loss, which selects the best checkpoint that is kept.

        Args:
          evaluate: compute that loss if this step has none yet; a checkpoint without one is never the best.
        """
        step = self._stepper.step
        if evaluate and self._evaluated != step:
            self.evaluate()
        if self._saved == step:
            return
        if self._writer is not None:
            self._writer.sync()
        position = Position(
            self._stepper.examples,
            self.tokens,
            self._skipped_examples,
            self._best,
            self._progress.state(),
            self._owes_evaluation,
        )
        score = self._score() if self._evaluated == step else None
        self._checkpoints.save(step, self._stepper.state, position, score)
        self._saved, self._rewinds = step, 0
        self._progress.restart_clock()

    def recover(self, problem: LossSpike | NotFinite) -> None:
        """Rewinds to before a spike; raises UserError if the numbers are not finite."""
        if isinstance(problem, LossSpike):
            self._rewind(problem)
        else:
            self._give_up(problem)

    def _rewind(self, spike: LossSpike) -> None:
        """Restores the newest checkpoint, and continues with the data that follows the spike (`StabilityConfig`).

        Raises:
          UserError: the loss has spiked after this checkpoint too often.
        """
        self._rewinds += 1
        if self._rewinds > MAX_REWINDS:
            raise UserError(
                f"{spike}: it spiked {self._rewinds} times after checkpoint {self._saved}, whatever the data; lower "
                "optimizer.peak_lr or raise stability.spike_deviations, and resume with --allow_config_changes"
            )
        self._checkpoints.wait()
        parameters = self.stage.objective.parameters
        restored, position = resumed_state(parameters, self._mesh, self._checkpoints, self._changes)
        since = spike.examples - position.examples
        rewind_batches = self.stage.config.stability.rewind_batches
        self._skipped_examples += since + rewind_batches * self._stepper.examples_per_batch
        self._best = position.best
        self._start_at(restored.replace(base=self._stepper.state.base), position)
        step = self._stepper.step
        self._progress.go_back(self.tokens, position.progress)
        self._evaluated, self._owes_evaluation = None, False
        self.say(f"{spike}: back to step {step}, continuing with the data after the spike")
        if self._writer is not None:
            self._writer.go_back(step)
            # A record of the next step, so that a run that resumes here and meets the spike again writes it once.
            numbers = {"loss": spike.loss, "usual": spike.usual, "skipped_examples": self._skipped_examples}
            self._writer.write(step + 1, self.tokens, "rewind", spike_step=spike.step, **numbers)

    def _give_up(self, problem: NotFinite) -> NoReturn:
        """Saves the run and a debug bundle of the step whose numbers are not finite; raises UserError."""
        stepper = self._stepper
        bundle = save_bundle(self.workdir, self.stage.objective, stepper.state, stepper.batch, stepper.count)
        self.save(evaluate=False)
        raise UserError(
            f"{problem}: {self.stage.config.stability.max_skipped_updates} updates in a row were skipped; find where "
            f"it began with python -m gptjax.replay --bundle={bundle}, lower optimizer.peak_lr or lengthen "
            "optimizer.warmup_tokens; the same command resumes with the data that follows"
        )

    def stop(self, request: PreemptedError) -> NoReturn:
        """Saves this step; raises PreemptedError."""
        self.read_metrics()
        if (problem := self.take_problem()) is not None:
            self.recover(problem)
        self.save(evaluate=False)
        self._checkpoints.wait()
        raise PreemptedError(f"{request}, step {self._stepper.step} is saved") from None

    def conclude(self) -> RunReport:
        """Plots the loss, and lets the stage report on the best checkpoint."""
        if self._writer is not None:
            self._writer.sync()
            plot_loss(self.workdir)
        conclude, conclusion = self.stage.conclude, None
        if conclude is not None:
            conclusion = conclude(*self._best_params(), self.workdir)
        seconds = 0.0 if self._writer is None else self._writer.seconds
        validation, sample, best = self._validation, self._sample, self._best_value()
        epochs = self._epochs(self._stepper.examples)
        return RunReport(self._stepper.step, self.tokens, validation, sample, conclusion, seconds, best, epochs)

    def _best_value(self) -> tuple[int, str, float] | None:
        """Step, name and value of the metric of the best checkpoint, from its validation record; process 0 only."""
        if self._writer is None:
            return None
        self._checkpoints.wait()
        step, name = self._checkpoints.best_step(), self.stage.config.evaluation.metric
        for record in read_metrics(self.workdir)[1]:
            if (record["step"], record["split"]) == (step, "validation") and record.get(name) is not None:
                return record["step"], name, record[name]
        return None

    def _best_params(self) -> tuple[Any, int]:
        """All parameters of the best checkpoint, and its step."""
        self._checkpoints.wait()
        best = self._checkpoints.best_step()
        if best is None or best == self._stepper.step:
            return self.params, self._stepper.step
        trained, _ = self._checkpoints.restore_params(self._stepper.abstract_state.params, best)
        return self._join(trained), best
