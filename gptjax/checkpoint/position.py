"""Progress of a run: the state in a checkpoint that is not arrays."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Best:
    """The best validation so far.

    Attributes:
      score: validation score, the higher the better; None: no finite score yet.
      evaluations_since: number of evaluations since then, none of which was better.
    """

    score: float | None = None
    evaluations_since: int = 0

    def after(self, score: float | None) -> "Best":
        """Returns the best validation after one more evaluation; score None: not finite."""
        if score is not None and (self.score is None or score > self.score):
            return Best(score)
        return Best(self.score, self.evaluations_since + 1)


@dataclasses.dataclass(frozen=True)
class Position:
    """Position of a run in its data, and its progress.

    Attributes:
      examples: training examples consumed.
      tokens: tokens in them, without padding.
      skipped_examples: examples skipped after returning to a checkpoint before a loss spike.
      best: the best validation so far.
      progress: JSON-serialisable state of the reported metrics.
      owes_evaluation: the run was stopped before the validation due at this step was finished.
    """

    examples: int = 0
    tokens: int = 0
    skipped_examples: int = 0
    best: Best = Best()
    progress: dict[str, Any] = dataclasses.field(default_factory=dict)
    owes_evaluation: bool = False
