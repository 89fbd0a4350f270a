"""Where a run is, besides its arrays: what a checkpoint keeps of it beside them."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validation so far.

    Attributes:
      score: the higher the better; None: there was none.
      evaluations_since: how many were no better.
    """

    score: float | None = None
    evaluations_since: int = 0

    def after(self, score: float | None) -> "Best":
        """With the score of one more evaluation; None: it is not finite."""
        if score is not None and (self.score is None or score > self.score):
            return Best(score)
        return Best(self.score, self.evaluations_since + 1)


@dataclasses.dataclass(frozen=True)
class Position:
    """Where a run is, besides its arrays.

    Attributes:
      examples: that the run was trained on.
      tokens: in them, padding left out.
      skipped_examples: that it passed over, where it went back before a spike of the loss.
      progress: what the numbers it shows go on from, as JSON can hold it.
      owes_evaluation: the run was asked to stop before the held-out loss due at this step was there.
    """

    examples: int = 0
    tokens: int = 0
    skipped_examples: int = 0
    best: Best = Best()
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    owes_evaluation: bool = False
