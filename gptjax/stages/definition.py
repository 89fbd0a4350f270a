"""What a stage is, as far as its config alone decides: before there is data, and on any machine."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config
from gptjax.data.tokenizers import Tokenizer
from gptjax.training.objective import Loss


@dataclasses.dataclass(frozen=True)
class Definition:
    """A stage's networks, its loss, and what other code must know about the weights it trains.

    Low-rank matrices and frozen pretrained weights are added to any stage's parameters by `stages.registry`.

    Attributes:
      parameters: complete config -> the networks, which of them are frozen, and what they start from.
      loss: complete config -> the pure loss.
      complete: config, tokenizer, workdir -> the config that the run computes with: vocabulary size, labels.
      check: raises UserError when the config asks for what this stage cannot do.
      conversational: it reads conversations through a chat template.
      chats: its model can be talked with.
      adds_tokens: its vocabulary may extend that of the weights it starts from.
      reinitialises_special_tokens: embeddings behind the tokenizer's vocabulary are initialised anew, whatever the
        weights it starts from have there.
      head: what the head of its model is for, a supervised task or a scalar reward; None: it has none.
      uses_best_checkpoint: its results are those of the best checkpoint, not of the newest.
    """

    parameters: Callable[[Config], ParameterSpec]
    loss: Callable[[Config], Loss]
    complete: Callable[[Config, Tokenizer, Path], Config]
    check: Callable[[Config], None] = lambda config: None
    conversational: bool = False
    chats: bool = False
    adds_tokens: bool = True
    reinitialises_special_tokens: bool = False
    head: Literal["task", "reward"] | None = None
    uses_best_checkpoint: bool = False
