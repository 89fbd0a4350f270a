"""The definition of a stage: the parts that depend on the config alone, not on data or devices."""

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
    """A stage's networks, its loss, and the properties of its weights that other code reads.

    Low-rank matrices and frozen pretrained weights are added to any stage's parameters by `stages.registry`.

    Attributes:
      parameters: complete config -> the networks, which of them are frozen, and the weights they start from.
      loss: complete config -> the pure loss.
      complete: config, tokenizer, workdir -> the config with the fields that data decides: vocabulary size, labels.
      check: raises UserError when the config has settings that this stage does not support.
      sections: names of the config's sections that this stage reads and not every stage does.
      conversational: whether it reads conversations through a chat template.
      chats: whether its model is a chat model.
      adds_tokens: whether its vocabulary may extend that of the weights it starts from.
      reinitialises_special_tokens: whether the embeddings of special tokens are initialised, not restored from the
        weights it starts from.
      head: what the head of its model is for, a supervised task or a scalar reward; None: it has no head.
      uses_best_checkpoint: whether its results are those of the best checkpoint, not of the newest.
      rows_of_context: whether its batches are rows of model.context_length positions, whatever the data.
    """

    parameters: Callable[[Config], ParameterSpec]
    loss: Callable[[Config], Loss]
    complete: Callable[[Config, Tokenizer, Path], Config]
    check: Callable[[Config], None] = lambda config: None
    sections: tuple[str, ...] = ()
    conversational: bool = False
    chats: bool = False
    adds_tokens: bool = True
    reinitialises_special_tokens: bool = False
    head: Literal["task", "reward"] | None = None
    uses_best_checkpoint: bool = False
    rows_of_context: bool = False
