"""Detects non-finite updates, which are skipped, and loss spikes."""

import dataclasses
import math
import statistics
from collections import deque
from typing import Any

from gptjax.config import StabilityConfig


@dataclasses.dataclass(frozen=True)
class LossSpike:
    """The loss of a step is far above the mean of the steps before.

    Attributes:
      examples: number trained on up to and including the step.
      usual: mean loss of the steps before.
    """

    step: int
    examples: int
    loss: float
    usual: float

    def __str__(self) -> str:
        return f"the loss of step {self.step} is {self.loss:.3f}, after {self.usual:.3f}"


@dataclasses.dataclass(frozen=True)
class NotFinite:
    """`stability.max_skipped_updates` consecutive updates were skipped; the numbers are those of the last."""

    step: int
    loss: float
    grad_norm: float

    def __str__(self) -> str:
        return f"the loss of step {self.step} is {self.loss}, the norm of its gradient {self.grad_norm}"


class LossMonitor:
    """Watches the loss of every step.

    Attributes:
      skipped: updates skipped so far.
    """

    def __init__(self, config: StabilityConfig, state: dict[str, Any] | None = None):
        """Args: state: what `state()` returned before a run stopped; None: a new run."""
        state = {"skipped": 0, "in_a_row": 0, "spiking": False, "losses": []} if state is None else state
        self._config = config
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._spiking = state["spiking"]  # consecutive steps of high loss are one spike
        self._losses: deque[float] = deque(state["losses"], maxlen=config.spike_window)

    def state(self) -> dict[str, Any]:
        """Returns the JSON-serialisable state, with which a resumed run decides as if it had never stopped."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "spiking": self._spiking,
            "losses": list(self._losses),
        }

    @property
    def next_may_stop(self) -> bool:
        """Whether the run stops if the next update is skipped; its numbers are then read before the next dispatch."""
        return self._in_a_row + 1 >= self._config.max_skipped_updates

    def add(
        self, step: int, examples: int, loss: float, grad_norm: float, skipped: bool
    ) -> LossSpike | NotFinite | None:
        """Adds the numbers of a step; returns the problem they show, a spike only at its first step."""
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self.skipped += skipped
        if self._in_a_row >= self._config.max_skipped_updates:
            self._in_a_row = 0  # the resumed run, which reads other data, may skip as many
            return NotFinite(step, loss, grad_norm)
        if not math.isfinite(loss) or self._config.spike_deviations is None:
            return None
        usual = statistics.fmean(self._losses) if len(self._losses) == self._config.spike_window else math.inf
        # A loss that hardly changes, as on memorised text, must not turn noise into a spike.
        deviation = max(statistics.pstdev(self._losses), 0.01 * usual) if math.isfinite(usual) else math.inf
        spiking = loss > usual + self._config.spike_deviations * deviation
        spike = LossSpike(step, examples, loss, usual) if spiking and not self._spiking else None
        if spike is not None and self._config.on_spike == "rewind":
            return spike  # the run goes back, and its state with it
        self._losses.append(loss)
        self._spiking = spiking
        return spike
