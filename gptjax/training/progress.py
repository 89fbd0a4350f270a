"""The progress bar of a run, and the training records of metrics.jsonl."""

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import jax
import numpy as np
from absl import logging
from tqdm import tqdm

from gptjax.scaling import devices
from gptjax.training.loss_monitor import LossMonitor, LossSpike, NotFinite
from gptjax.training.metrics_file import MetricsWriter
from gptjax.training.stage import Stage
from gptjax.training.step import StepResult


class Progress:
    """Reads each step's metrics after the next step is dispatched, so that logging never stalls the devices.

    Every `logging.every_steps` steps it writes a training record: `loss` (nats per token) and the stage's other
    measures, averaged over the steps since the last record whose updates were not skipped; `grad_norm` and
    `learning_rate` of the step; `skipped_updates` of the run so far; `tokens_per_second` and `mfu` (model FLOPs
    utilisation) since the last record, without the time of compilation, evaluations and saves; `epochs/NAME` of each
    source of a mixture. A loss spike is a record of its own, with split "spike". Log lines of libraries are written
    above the bar while it is shown.
    """

    def __init__(
        self,
        stage: Stage,
        writer: MetricsWriter | None,
        tokens: int,
        total_tokens: int,
        state: dict[str, Any],
        epochs: Callable[[int], dict[str, float]] = lambda examples: {},
    ):
        """Sets the place in training.

        Args:
          state: the result of `state()` before a run stopped; empty: a new run.
          epochs: number of training examples of the run -> the number of epochs of each source of a mixture.
        """
        config = stage.config
        self._writer, self._epochs = writer, epochs
        self._stability = config.stability
        self._every = config.logging.every_steps
        self._flops_per_token = stage.flops_per_token
        peak = devices.peak_flops(jax.devices()[0], config.model.dtype)
        self._peak_flops = None if peak is None else peak * jax.device_count()
        self._bar = tqdm(
            total=total_tokens,
            initial=tokens,
            unit_scale=True,
            bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} tokens [{elapsed}<{remaining}{postfix}]",
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; each is a line in a log file
            disable=writer is None,
        )
        self.go_back(tokens, state)

    def __enter__(self) -> "Progress":
        logging.get_absl_handler().python_handler.addFilter(self._clear_bar)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        logging.get_absl_handler().python_handler.removeFilter(self._clear_bar)
        self._bar.close()

    def _clear_bar(self, record: Any) -> bool:
        """A filter of log records that erases the bar before each; the bar is drawn again below the lines."""
        self._bar.clear()
        return True

    def state(self) -> dict[str, Any]:
        """Returns the JSON-serialisable state that a resumed run continues from; all metrics must have been read."""
        return {"losses": self._losses, "measured": self._measured, "watch": self._monitor.state()}

    def go_back(self, tokens: int, state: dict[str, Any]) -> None:
        """Resets to an earlier step of the run and its state there; metrics not read yet are dropped."""
        self._pending: StepResult | None = None
        self._problem: LossSpike | NotFinite | None = None
        self._tokens = tokens  # trained on by the steps whose metrics have been read
        self._losses: list[float] = list(state.get("losses", []))  # since the last record
        # The stage's further measures
        self._measured: dict[str, list[float]] = {name: list(of) for name, of in state.get("measured", {}).items()}
        self._monitor = LossMonitor(self._stability, state.get("watch"))
        self._move_bar(tokens)
        self.restart_clock()

    def restart_clock(self) -> None:
        """Excludes the time spent compiling, evaluating or saving from the rate of the next record."""
        self._clock, self._clock_tokens = time.perf_counter(), self._tokens

    def add(self, result: StepResult) -> None:
        """Takes the step just dispatched, and reads the metrics of the one before."""
        self.read()
        self._pending = result
        if self._monitor.next_may_stop:
            self.read()

    def read(self) -> None:
        """Reads the metrics of the last step, waiting for it."""
        if self._pending is None:
            return
        result, self._pending = self._pending, None
        step, tokens = result.step, result.tokens
        values = {name: float(np.asarray(value)) for name, value in result.metrics.items()}
        loss, grad_norm, skipped = (values.pop(name) for name in ("loss", "grad_norm", "skipped"))
        found = self._monitor.add(step, result.examples, loss, grad_norm, skipped > 0)
        if isinstance(found, NotFinite) or (found is not None and self._stability.on_spike == "rewind"):
            self._problem = found
            return
        self._move_bar(tokens)
        self._tokens = tokens
        speed = (tokens - self._clock_tokens) / (time.perf_counter() - self._clock)
        self._bar.set_postfix_str(f"step {step} loss {loss:.3f} {speed:,.0f} tokens/s", refresh=False)
        if skipped:
            self.say(f"step {step}: loss {loss}, gradient norm {grad_norm}: the update was skipped")
        else:
            self._losses.append(loss)
            for name, value in values.items():
                self._measured.setdefault(name, []).append(value)
        if found is not None:
            self.say(f"step {step}: the loss spikes, {loss:.3f} after {found.usual:.3f}")
            if self._writer is not None:
                self._writer.write(step, tokens, "spike", loss=loss, usual=found.usual)
        if step % self._every == 0:
            if self._writer is not None:
                self._write(self._writer, result, grad_norm)
            self._losses, self._measured = [], {}
            self.restart_clock()

    def take_problem(self) -> LossSpike | NotFinite | None:
        """Returns the problem that the run must act upon: a spike to rewind, or too many skipped updates; or None."""
        problem, self._problem = self._problem, None
        return problem

    def _move_bar(self, tokens: int) -> None:
        """Moves the bar to `tokens`; the last batch may reach past the total, where tqdm would drop the percentage."""
        self._bar.update(min(tokens, self._bar.total) - self._bar.n)

    def _write(self, writer: MetricsWriter, result: StepResult, grad_norm: float) -> None:
        speed = (result.tokens - self._clock_tokens) / (time.perf_counter() - self._clock)
        writer.write(
            result.step,
            result.tokens,
            "train",
            loss=sum(self._losses) / len(self._losses) if self._losses else None,
            **{name: sum(of) / len(of) for name, of in self._measured.items()},
            grad_norm=grad_norm,
            learning_rate=result.lr,
            skipped_updates=self._monitor.skipped,
            tokens_per_second=speed,
            mfu=None if self._peak_flops is None else speed * self._flops_per_token / self._peak_flops,
            **{f"epochs/{source}": number for source, number in self._epochs(result.examples).items()},
        )

    def say(self, text: str) -> None:
        """Prints above the bar."""
        if self._writer is not None:
            self._bar.write(text)
