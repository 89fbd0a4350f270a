"""What a run shows while it trains: the progress bar, and the training records of metrics.jsonl."""

import sys
import time
from types import TracebackType
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from gptjax.config import Config
from gptjax.scaling import flops
from gptjax.training.loss_monitor import Watch
from gptjax.training.metrics_file import MetricsWriter


class Progress:
    """Reads each step's metrics when the next one is under way, so that logging never stalls the devices.

    Every `logging.every_steps` steps it writes a training record: `loss` (nats a token) and what else the stage
    measures, as means over the steps since the last record whose updates were not skipped; `grad_norm` and
    `learning_rate` of the step, `skipped_updates` (of the run, so far), `tokens_per_second` and `mfu` (share of the
    devices' peak FLOP/s) of the time spent training since then, evaluations and saves excluded. A spike of the loss is
    a record of its own, of split "spike".
    """

    def __init__(
        self, config: Config, writer: MetricsWriter | None, tokens: int, total_tokens: int, state: dict[str, Any]
    ):
        """Args: state: what `state()` returned, of a run that goes on; empty: of none."""
        self._writer = writer
        self._stability = config.stability
        self._every = config.logging.every_steps
        self._flops_per_token = flops.flops_per_token(config.model)
        peak = flops.peak_flops(jax.devices()[0], config.model.dtype)
        self._peak_flops = None if peak is None else peak * jax.device_count()
        self._bar = tqdm(
            total=total_tokens,
            initial=tokens,
            unit="tok",
            unit_scale=True,
            dynamic_ncols=True,
            mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file gets a line now and then
            disable=writer is None,
        )
        self.go_back(tokens, state)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def state(self) -> dict[str, Any]:
        """What the records of a run that goes on depend on, as JSON can hold it; all steps must have been read."""
        return {"losses": self._losses, "measured": self._measured, "watch": self._watch.state()}

    def go_back(self, tokens: int, state: dict[str, Any]) -> None:
        """Goes on from an earlier place in the run, and the state it had there; steps not read yet are forgotten."""
        self._pending: tuple[int, int, int, float, dict[str, jax.Array]] | None = None
        self._tokens = tokens  # trained by the steps whose metrics have been read
        self._losses: list[float] = list(state.get("losses", []))  # since the last record
        # What the stage measures besides
        self._measured: dict[str, list[float]] = {name: list(of) for name, of in state.get("measured", {}).items()}
        self._watch = Watch(self._stability, state.get("watch"))
        self._bar.update(tokens - self._bar.n)
        self.restart()

    def restart(self) -> None:
        """Starts the clock anew, after compiling, evaluating or saving."""
        self._clock, self._clock_tokens = time.perf_counter(), self._tokens

    def add(self, step: int, tokens: int, examples: int, lr: float, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step just dispatched, and reads those of the one before.

        Raises:
          NotFiniteError, LossSpikeError: see `gptjax.training.loss_monitor`; no step after the former's is dispatched.
        """
        self.flush()
        self._pending = (step, tokens, examples, lr, metrics)
        if self._watch.next_may_stop:
            self.flush()

    def flush(self) -> None:
        """Reads the metrics of the last step, waiting for it; raises as `add` does."""
        if self._pending is None:
            return
        step, tokens, examples, lr, metrics = self._pending
        self._pending = None
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        loss, grad_norm, skipped = (values.pop(name) for name in ("loss", "grad_norm", "skipped"))
        usual = self._watch.add(step, examples, loss, grad_norm, skipped > 0)
        self._bar.update(tokens - self._tokens)
        self._bar.set_postfix_str(f"step {step} loss {loss:.3f}", refresh=False)
        self._tokens = tokens
        if skipped:
            self.say(f"step {step}: loss {loss}, gradient norm {grad_norm}: the update was skipped")
        else:
            self._losses.append(loss)
            for name, value in values.items():
                self._measured.setdefault(name, []).append(value)
        if usual is not None:
            self.say(f"step {step}: the loss spikes, {loss:.3f} after {usual:.3f}")
            if self._writer is not None:
                self._writer.write(step, tokens, "spike", loss=loss, usual=usual)
        if step % self._every == 0:
            if self._writer is not None:
                self._write(self._writer, step, tokens, lr, grad_norm)
            self._losses, self._measured = [], {}
            self.restart()

    def _write(self, writer: MetricsWriter, step: int, tokens: int, lr: float, grad_norm: float) -> None:
        speed = (tokens - self._clock_tokens) / (time.perf_counter() - self._clock)
        writer.write(
            step,
            tokens,
            "train",
            loss=sum(self._losses) / len(self._losses) if self._losses else None,
            **{name: sum(of) / len(of) for name, of in self._measured.items()},
            grad_norm=grad_norm,
            learning_rate=lr,
            skipped_updates=self._watch.skipped,
            tokens_per_second=speed,
            mfu=None if self._peak_flops is None else speed * self._flops_per_token / self._peak_flops,
        )

    def say(self, text: str) -> None:
        """Prints above the bar."""
        if self._writer is not None:
            self._bar.write(text)
