"""The interface between a stage and the training loop: `Stage`, and `Run`, which batches may read."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from gptjax.config import Config
from gptjax.data.pipeline import Microbatch
from gptjax.data.tokenizers import Tokenizer
from gptjax.training.objective import Objective


class Run(Protocol):
    """A run in progress, as far as batches may depend on it: a policy's batches are completions it sampled itself."""

    workdir: Path

    @property
    def policy(self) -> Any:
        """All parameters after the last step; not their moving average."""

    def record(self, split: str, text: str | None = None, **values: float) -> None:
        """Writes a record of this step to metrics.jsonl, and a text to samples/."""

    def say(self, text: str) -> None:
        """Prints above the progress bar."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage on a mesh: objective, batches, evaluation and reports, as the training loop uses them.

    Attributes:
      objective: the parameters and the loss.
      total_tokens: length of training, padding excluded.
      batches: (examples consumed so far, run) -> the microbatches that follow; a policy, which samples its own,
        needs a run.
      evaluate: all parameters -> {"loss": ..., ...} on held-out data.
      sample: all parameters -> text; None: there are no samples.
      conclude: (parameters of the best checkpoint, its step, workdir) -> text to print; called at the end by all
        processes.
      files: name -> content of further files of the workdir: values that were determined from the data.
      description: name -> text about the data, such as the numbers of documents and tokens, printed at the start.
      epochs: training examples read so far -> the number of epochs of each source of a mixture, by name, for training
        records and the report at the end; None: there is one source.
      images_per_token: mean number of images that the model encodes for a token of a batch, padding included.
    """

    objective: Objective
    tokenizer: Tokenizer
    total_tokens: int
    batches: Callable[[int, Run | None], Iterator[Microbatch]]
    evaluate: Callable[[Any], dict[str, float]]
    sample: Callable[[Any], str] | None
    conclude: Callable[[Any, int, Path], str] | None = None
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)
    description: Mapping[str, str] = dataclasses.field(default_factory=dict)
    epochs: Callable[[int], dict[str, float]] | None = None
    images_per_token: float = 0.0

    @property
    def config(self) -> Config:
        return self.objective.config

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of a training step per token, with those of the images that are encoded for it."""
        parameters = self.objective.parameters
        return parameters.flops_per_token + self.images_per_token * parameters.flops_per_image


def describe_data(units: str, train: int, held_out: int, tokens_per_epoch: float, total_tokens: int) -> dict[str, str]:
    """The `description` of a stage that trains on `train` documents, examples or the like, called `units`."""
    share = held_out / (train + held_out)
    return {
        "data": f"{train:,} {units}, {tokens_per_epoch:,.0f} tokens; the run reads them "
        f"{total_tokens / tokens_per_epoch:.3g} times (epochs)",
        "held out": f"{held_out:,} {units} ({100 * share:.2g} % of all)",
    }
