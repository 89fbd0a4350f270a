"""Heads of fine-tuned runs as the classes of transformers have them: GPT2ForSequenceClassification and its siblings.

A sequence classifier of transformers reads the hidden state of the last token that is not padding, by a linear layer
`score` without bias. Ours reads the extract token, which is that token, with a bias c. The bias goes into that of the
layer norm right before the head: W (b + d) = W b + c for the d of least norm, which is there where the outputs' rows of
W are linearly independent. Token classifiers and models of question answering have a bias of their own.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import Config, GPTConfig, UserError
from gptjax.data.task_inputs import special_tokens
from gptjax.data.tokenizers import Tokenizer
from gptjax.interop.families import Family
from gptjax.models import peft
from gptjax.stages import registry

PREDICTIONS_FILE = "predictions.jsonl"  # of a run that has ended: the rows of its report, with all that it read of them

# Kind of task: end of transformers' class, its linear layer, PEFT's task_type.
_CLASSES = {
    "classification": ("ForSequenceClassification", "score", "SEQ_CLS"),
    "entailment": ("ForSequenceClassification", "score", "SEQ_CLS"),
    "regression": ("ForSequenceClassification", "score", "SEQ_CLS"),
    "tagging": ("ForTokenClassification", "classifier", "TOKEN_CLS"),
    "question_answering": ("ForQuestionAnswering", "qa_outputs", "QUESTION_ANS"),
}
_PREFIXES = {"gpt2": "GPT2", "gpt_neo": "GPTNeo", "openai-gpt": "OpenAIGPT"}
_TOLERANCE = 1e-5  # of an output, where a bias is folded


@dataclasses.dataclass(frozen=True)
class Head:
    """A linear layer over hidden states, in transformers' terms.

    Attributes:
      architecture: class of transformers.
      task_type: PEFT's name of the task.
      module: name of the layer in that class.
      tensors: of the layer: weight (outputs, inputs), and bias (outputs,) where the class has one.
      settings: keys of config.json: labels, kind of problem, special tokens.
      is_folded: the bias is in that of the last layer norm.
    """

    architecture: str
    task_type: str
    module: str
    tensors: dict[str, np.ndarray]
    settings: dict[str, Any]
    is_folded: bool


def check(workdir: Path, family: Family, config: Config) -> None:
    """Raises UserError when no class of transformers has the head of a run; for a run without a head nothing is done.

    Args:
      config: complete.
    """
    head = registry.definition(config).head
    if head == "reward":
        raise UserError(
            f"{workdir} is of stage reward: its score is read at the token that ends a turn, and a sequence classifier "
            "of transformers reads the last token of its chat template, which is another: evaluate with it here"
        )
    if head is None:
        return
    kind = config.task.kind
    reads = {
        "similarity": "reads the sum of the hidden states of both orders of two texts",
        "multiple_choice": "scores each choice by itself and compares the scores",
    }
    if kind not in _CLASSES:
        raise UserError(
            f"{workdir}: the head of task.kind={kind} {reads[kind]}, which no {family.model_type} class of "
            "transformers does: use gptjax.predict"
        )
    if kind == "regression" and _reads_pairs(workdir):
        raise UserError(
            f"{workdir}: the head of this regression {reads['similarity']}, which no {family.model_type} class of "
            "transformers does: use gptjax.predict"
        )
    suffix, module, _ = _CLASSES[kind]
    if family.model_type == "openai-gpt" and module != "score":
        raise UserError(f"{workdir}: transformers has no {_PREFIXES[family.model_type]}{suffix} for task.kind={kind}")


def _reads_pairs(workdir: Path) -> bool:
    """Whether the rows of a regression have two texts; UserError when the run has not come to its report."""
    path = workdir / PREDICTIONS_FILE
    try:
        with path.open(encoding="utf-8") as file:
            return json.loads(file.readline()).get("second") is not None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"cannot tell from {path} whether this regression reads one text or two, which decides whether "
            f"transformers has a class for it ({error}): train to the end first"
        ) from None


def split_head(family: Family, config: Config, tokenizer: Tokenizer, params: Any) -> tuple[Head, dict[str, Any]]:
    """The head of a fine-tuned run that `check` has passed, and the other leaves by path.

    Args:
      config: complete.
      params: of the run, nested, the head's under "head".

    Returns:
      The head; and the leaves, among them the bias of the last layer norm with a sequence classifier's bias in it.

    Raises:
      UserError: the head's bias cannot be folded.
    """
    task = config.task
    suffix, module, task_type = _CLASSES[task.kind]
    leaves = peft.flatten(params)
    kernel_DK, bias_K = (np.asarray(leaves.pop(f"head/linear/{name}")) for name in ("kernel", "bias"))
    dtype = kernel_DK.dtype
    weight_KD, bias_K = kernel_DK.T.astype(np.float64), bias_K.astype(np.float64)
    if task.kind == "regression":
        assert task.target_std is not None
        weight_KD, bias_K = task.target_std * weight_KD, task.target_std * bias_K + (task.target_mean or 0.0)
    tensors, is_folded = {"weight": weight_KD.astype(dtype)}, module == "score"
    if is_folded:
        path, row = last_norm(config.model)
        bias = np.array(leaves[f"{path}/bias"])
        bias_D = bias if row is None else bias[row]  # a view
        bias_D[...] = _folded(tensors["weight"], weight_KD, bias_K, bias_D)
        leaves[f"{path}/bias"] = bias
    else:
        tensors["bias"] = bias_K.astype(dtype)
    special = special_tokens(tokenizer)
    settings: dict[str, Any] = {
        "bos_token_id": special.start,
        "eos_token_id": special.extract,
        "sep_token_id": special.delimiter,
        "pad_token_id": special.blank,
    }
    if task.kind != "question_answering":
        labels = task.labels or ("value",)
        settings["id2label"] = {str(i): label for i, label in enumerate(labels)}
        settings["label2id"] = {label: i for i, label in enumerate(labels)}
    if module == "score":
        settings["problem_type"] = "regression" if task.kind == "regression" else "single_label_classification"
    return Head(_PREFIXES[family.model_type] + suffix, task_type, module, tensors, settings, is_folded), leaves


def last_norm(model: GPTConfig) -> tuple[str, int | None]:
    """Path of the layer norm whose output the head reads, and its row where layers are stacked."""
    if model.norm_position == "pre":
        return "final_norm", None
    row, block = divmod(model.num_layers - 1, len(model.attention_pattern))
    return f"layers/block_{block}/mlp_norm", row


def _folded(stored_KD: np.ndarray, weight_KD: np.ndarray, bias_K: np.ndarray, norm_bias: np.ndarray) -> np.ndarray:
    """The norm's bias with which the stored weight alone gives what weight and bias gave, (D,)."""
    before_D = norm_bias.astype(np.float64)
    wanted_K = weight_KD @ before_D + bias_K
    exact_KD = stored_KD.astype(np.float64)
    change_D, *_ = np.linalg.lstsq(exact_KD, wanted_K - exact_KD @ before_D, rcond=None)
    folded_D = (before_D + change_D).astype(np.float32)
    error = np.abs(exact_KD @ folded_D.astype(np.float64) - wanted_K).max()
    if not error <= _TOLERANCE * max(1.0, np.abs(wanted_K).max()):
        raise UserError(
            f"the bias of the task's head cannot be expressed: the score layer of transformers has none, and folding "
            f"it into the layer norm before it changes an output by {error:.2g}, as the weights of the outputs are "
            "linearly dependent: use gptjax.predict"
        )
    return folded_D
