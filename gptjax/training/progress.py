"""What a run shows while it trains: the progress bar, and the training records of metrics.jsonl."""

import math
import sys
import time
from types import TracebackType

import jax
import numpy as np
from tqdm import tqdm

from gptjax.config import Config, UserError
from gptjax.scaling import flops
from gptjax.training.metrics import MetricsWriter


class Progress:
    """Reads each step's metrics when the next one is under way, so that logging never stalls the devices.

    Every `logging.every_steps` steps it writes a training record: `loss` (mean over the steps since the last record,
    nats a token), `grad_norm` and `learning_rate` of the step, `tokens_per_second` and `mfu` (share of the devices'
    peak FLOP/s) of the time spent training since then, evaluations and saves excluded.
    """

    def __init__(self, config: Config, writer: MetricsWriter | None, tokens: int, total_tokens: int):
        self._writer = writer
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
        self._pending: tuple[int, int, float, dict[str, jax.Array]] | None = None
        self._tokens = tokens  # trained by the steps whose metrics have been read
        self._losses: list[float] = []
        self.restart()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.close()

    def restart(self) -> None:
        """Starts the clock anew, after compiling, evaluating or saving."""
        self._clock, self._clock_tokens = time.perf_counter(), self._tokens

    def add(self, step: int, tokens: int, lr: float, metrics: dict[str, jax.Array]) -> None:
        """Takes the metrics of the step just dispatched, and reads those of the one before.

        Raises:
          UserError: that step's loss is not finite.
        """
        self.flush()
        self._pending = (step, tokens, lr, metrics)

    def flush(self) -> None:
        """Reads the metrics of the last step, waiting for it; raises as `add` does."""
        if self._pending is None:
            return
        step, tokens, lr, metrics = self._pending
        self._pending = None
        loss, grad_norm = (float(np.asarray(metrics[name])) for name in ("loss", "grad_norm"))
        if not math.isfinite(loss):
            raise UserError(
                f"the loss is {loss} at step {step}: lower optimizer.peak_lr or lengthen optimizer.warmup_tokens; "
                "the same command goes on from the last checkpoint"
            )
        self._bar.update(tokens - self._tokens)
        self._bar.set_postfix_str(f"step {step} loss {loss:.3f}", refresh=False)
        self._tokens = tokens
        self._losses.append(loss)
        if step % self._every == 0 and self._writer is not None:
            speed = (tokens - self._clock_tokens) / (time.perf_counter() - self._clock)
            self._writer.write(
                step,
                tokens,
                "train",
                loss=sum(self._losses) / len(self._losses),
                grad_norm=grad_norm,
                learning_rate=lr,
                tokens_per_second=speed,
                mfu=None if self._peak_flops is None else speed * self._flops_per_token / self._peak_flops,
            )
            self._losses = []
            self.restart()

    def say(self, text: str) -> None:
        """Prints above the bar."""
        if self._writer is not None:
            self._bar.write(text)
