"""What a stage supplies to the one training loop, and what it may know of the run."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from gptjax.checkpoint.state import Program
from gptjax.config import Config
from gptjax.data.pipeline import Microbatch
from gptjax.data.tokenizers import Tokenizer


class Learner(Protocol):
    """A run, as far as what makes its batches of what the model writes has to do with it."""

    workdir: Path
    step: int

    @property
    def policy(self) -> Any:
        """All parameters as the last step left them, not their average."""

    def record(self, split: str, text: str | None = None, **values: float) -> None:
        """A record of this step in metrics.jsonl, and a text in samples/."""

    def say(self, text: str) -> None:
        """Prints above the progress bar."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """What a stage supplies."""

    program: Program
    tokenizer: Tokenizer
    total_tokens: int  # to train on, padding left out
    batches: Callable[[int], Iterator[Microbatch]]  # examples consumed -> what follows
    evaluate: Callable[[Any], dict[str, float]]  # all parameters -> {"loss": ..., ...} on held-out data
    sample: Callable[[Any], str] | None  # all parameters -> text
    # Parameters of the best checkpoint, its step, workdir -> text: what all processes do at the end
    conclude: Callable[[Any, int, Path], str] | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of the workdir, by name: what the data decided
    attach: Callable[[Learner], None] | None = None  # before `batches`, where they depend on the run

    @property
    def config(self) -> Config:
        return self.program.config
