"""Numbers that go wrong: updates that were skipped as their numbers are not finite, and spikes of the loss."""

import math
import statistics
from collections import deque
from typing import Any

from gptjax.config import StabilityConfig


class LossSpikeError(Exception):
    """The loss of a step is far above what it was: `stability.on_spike` says to go back."""

    def __init__(self, step: int, examples: int, loss: float, usual: float):
        super().__init__(f"the loss of step {step} is {loss:.3f}, after {usual:.3f}")
        self.step, self.examples, self.loss, self.usual = step, examples, loss, usual


class NotFiniteError(Exception):
    """`stability.max_skipped_updates` in a row were skipped."""

    def __init__(self, step: int, loss: float, grad_norm: float):
        super().__init__(f"the loss of step {step} is {loss}, the norm of its gradient {grad_norm}")
        self.step, self.loss, self.grad_norm = step, loss, grad_norm


class Watch:
    """Looks at the loss of every step.

    Attributes:
      skipped: updates skipped so far.
    """

    def __init__(self, config: StabilityConfig, state: dict[str, Any] | None = None):
        """Args: state: what `state()` returned, of a run that goes on; None: of none."""
        state = {"skipped": 0, "in_a_row": 0, "spiking": False, "losses": []} if state is None else state
        self._config = config
        self.skipped, self._in_a_row = state["skipped"], state["in_a_row"]
        self._spiking = state["spiking"]  # steps of high loss that follow each other are one spike
        self._losses: deque[float] = deque(state["losses"], maxlen=config.spike_window)

    def state(self) -> dict[str, Any]:
        """What a run must know to go on as if it had not stopped, as JSON can hold it."""
        return {
            "skipped": self.skipped,
            "in_a_row": self._in_a_row,
            "spiking": self._spiking,
            "losses": list(self._losses),
        }

    @property
    def next_may_stop(self) -> bool:
        """Whether the next step is the last if it is skipped: none is to be dispatched after it before it is seen."""
        return self._in_a_row + 1 >= self._config.max_skipped_updates

    def add(self, step: int, examples: int, loss: float, grad_norm: float, skipped: bool) -> float | None:
        """Takes the numbers of a step, after which the run has read so many examples.

        Returns:
          The mean loss of the steps before, if this one's is a spike and the first of it; None otherwise.

        Raises:
          NotFiniteError: too many updates in a row were skipped.
          LossSpikeError: the loss is a spike, and `on_spike` is "rewind".
        """
        self._in_a_row = self._in_a_row + 1 if skipped else 0
        self.skipped += skipped
        if self._in_a_row >= self._config.max_skipped_updates:
            self._in_a_row = 0  # the run that goes on with other data may skip as many
            raise NotFiniteError(step, loss, grad_norm)
        if not math.isfinite(loss) or self._config.spike_deviations is None:
            return None
        usual = statistics.fmean(self._losses) if len(self._losses) == self._config.spike_window else math.inf
        # A loss that hardly moves, as that of a text learned by heart, must not make a spike of nothing.
        deviation = max(statistics.pstdev(self._losses), 0.01 * usual) if math.isfinite(usual) else math.inf
        spiking = loss > usual + self._config.spike_deviations * deviation
        first = spiking and not self._spiking
        if first and self._config.on_spike == "rewind":
            raise LossSpikeError(step, examples, loss, usual)
        self._losses.append(loss)
        self._spiking = spiking
        return usual if first else None
