"""Conversion of task heads to classes of transformers such as GPT2ForSequenceClassification.

A sequence classifier of transformers applies a linear layer `score` without bias to the hidden state of the last token
that is not padding. The gptjax head reads the same token, the extract token, but with a bias c. The bias is folded into
the bias b of the layer norm before the head: W (b + d) = W b + c with the d of least norm, which exists if the rows of
W are linearly independent. The classes for token classification and question answering have a bias.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import Config, GPTConfig, UserError
from gptjax.data.task_inputs import special_tokens
from gptjax.data.tokenizers import Tokenizer
from gptjax.interop.family import Family
from gptjax.models import peft
from gptjax.stages import registry

PREDICTIONS_FILE = "predictions.jsonl"  # examples and predictions of a finished run's report

# Kind of task: end of transformers' class, its linear layer, PEFT's task_type.
_CLASSES = {
    "classification": ("ForSequenceClassification", "score", "SEQ_CLS"),
    "entailment": ("ForSequenceClassification", "score", "SEQ_CLS"),
    "regression": ("ForSequenceClassification", "score", "SEQ_CLS"),
    "tagging": ("ForTokenClassification", "classifier", "TOKEN_CLS"),
    "question_answering": ("ForQuestionAnswering", "qa_outputs", "QUESTION_ANS"),
}
_PREFIXES = {"gpt2": "GPT2", "gpt_neo": "GPTNeo", "openai-gpt": "OpenAIGPT"}
_TOLERANCE = 1e-5  # relative error of an output after folding a bias


@dataclasses.dataclass(frozen=True)
class Head:
    """The linear output layer of a class of transformers.

    Attributes:
      architecture: class of transformers.
      task_type: PEFT's name of the task.
      module: name of the layer in that class.
      tensors: weight (outputs, inputs), and bias (outputs,) if the class has one.
      settings: keys of config.json: labels, problem type, special tokens.
      is_folded: whether the bias is folded into that of the last layer norm.
    """

    architecture: str
    task_type: str
    module: str
    tensors: dict[str, np.ndarray]
    settings: dict[str, Any]
    is_folded: bool


def check(workdir: Path, family: Family, config: Config) -> None:
    """Raises UserError if no class of transformers has the head of a run; does nothing for a run without a head.

    Args:
      config: the run's complete config.
    """
    head = registry.definition(config).head
    if head == "reward":
        raise UserError(
            f"{workdir} is of stage reward: its score is read at the token that ends a turn, and a sequence classifier "
            "of transformers reads the last token of its chat template, which is another: evaluate with it here"
        )
    if head is None:
        return
    if family.model_type not in _PREFIXES:
        raise UserError(
            f"{workdir}: the head of a task over a {family.model_type} cannot be exported, only over "
            f"{', '.join(_PREFIXES)}: use gptjax.predict"
        )
    if config.task.bidirectional:
        raise UserError(
            f"{workdir} attends in both directions (task.bidirectional=true), which no {family.model_type} class of "
            "transformers does: use gptjax.predict"
        )
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
    """Whether the examples of a regression have two texts; UserError if the run has not written its report yet."""
    path = workdir / PREDICTIONS_FILE
    try:
        with path.open(encoding="utf-8") as file:
            return json.loads(file.readline()).get("second") is not None
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"cannot determine from {path} whether this regression reads one text or two, which decides whether "
            f"transformers has a class for it ({error}): finish the training run first"
        ) from None


def split_head(family: Family, config: Config, tokenizer: Tokenizer, params: Any) -> tuple[Head, dict[str, Any]]:
    """Splits the parameters of a fine-tuned run, already checked by `check`, into its head and the other leaves.

    Args:
      config: the run's complete config.
      params: nested parameters of the run, with the head under "head".

    Returns:
      The head; and the other leaves by path, with a sequence classifier's bias folded into the last layer norm.

    Raises:
      UserError: the head's bias cannot be folded.
    """
    task = config.task
    suffix, module, task_type = _CLASSES[task.kind]
    leaves = peft.flatten(params)
    kernel_DN, bias_N = (np.asarray(leaves.pop(f"head/linear/{name}")) for name in ("kernel", "bias"))
    dtype = kernel_DN.dtype
    weight_ND, bias_N = kernel_DN.T.astype(np.float64), bias_N.astype(np.float64)
    if task.kind == "regression":
        assert task.target_std is not None
        weight_ND, bias_N = task.target_std * weight_ND, task.target_std * bias_N + (task.target_mean or 0.0)
    tensors, is_folded = {"weight": weight_ND.astype(dtype)}, module == "score"
    if is_folded:
        path, row = last_norm(config.model)
        bias = np.array(leaves[f"{path}/bias"])
        bias_D = bias if row is None else bias[row]  # a view
        bias_D[...] = _folded(tensors["weight"], weight_ND, bias_N, bias_D)
        leaves[f"{path}/bias"] = bias
    else:
        tensors["bias"] = bias_N.astype(dtype)
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
    """Returns the path of the layer norm before the head, and its index on the layers' axis, if any."""
    if model.norm_position == "pre":
        return "final_norm", None
    row, block = divmod(model.num_layers - 1, len(model.attention_pattern))
    return f"layers/block_{block}/mlp_norm", row


def _folded(stored_ND: np.ndarray, weight_ND: np.ndarray, bias_N: np.ndarray, norm_bias: np.ndarray) -> np.ndarray:
    """Computes the layer norm's bias (D,) with which the stored weight alone gives the outputs of weight and bias."""
    before_D = norm_bias.astype(np.float64)
    wanted_N = weight_ND @ before_D + bias_N
    exact_ND = stored_ND.astype(np.float64)
    change_D, *_ = np.linalg.lstsq(exact_ND, wanted_N - exact_ND @ before_D, rcond=None)
    folded_D = (before_D + change_D).astype(np.float32)
    error = np.abs(exact_ND @ folded_D.astype(np.float64) - wanted_N).max()
    if not error <= _TOLERANCE * max(1.0, np.abs(wanted_N).max()):
        raise UserError(
            f"the bias of the task's head cannot be expressed: the score layer of transformers has none, and folding "
            f"it into the layer norm before it changes an output by {error:.2g}, as the weights of the outputs are "
            "linearly dependent: use gptjax.predict"
        )
    return folded_D
