"""The model of stage "finetune": a GPT with a linear head for the task, its loss and its predictions.

Radford et al. 2018, sections 3.2 and 3.3. Batches have the arrays of `gptjax/data/buckets.py`.
"""

import dataclasses
from functools import partial
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config, UserError
from gptjax.data.task_inputs import NAMED, NUM_SPECIAL_TOKENS
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import read_json
from gptjax.losses.cross_entropy import cross_entropy
from gptjax.models.gpt import GPT, head_embedding, hidden_states
from gptjax.models.heads import Head, init_with_head
from gptjax.stages.definition import Definition
from gptjax.stages.finetune.regularisation import (
    adversarial_perturbation,
    mixed,
    regularised,
    sample_mixup,
    smoothed,
)
from gptjax.training.objective import Batch, Measures

TASK_FILE = "task.json"  # in the workdir: the fields of TaskConfig that were determined from the training rows
PER_POSITION = ("tagging", "question_answering")  # kinds whose head is applied at every position


@dataclasses.dataclass(frozen=True)
class TaskModel:
    """A GPT with a linear head; the parameters are those of the GPT, and those of the head under "head".

    Attributes:
      config: complete.
    """

    config: Config

    @property
    def gpt(self) -> GPT:
        model = self.config.model
        if self.config.task.bidirectional:
            model = model.with_attention("full")
        return GPT(model)

    @property
    def head(self) -> Head:
        task = self.config.task
        outputs = {"question_answering": 2}.get(task.kind, len(task.labels) if task.kind in NAMED else 1)
        return Head(self.config.model, outputs, task.head_dropout)

    def init(self, rng: jax.Array) -> Any:
        """Initialises all parameters, boxed with their logical axes."""
        return init_with_head(self.gpt, self.head, rng)

    def loss(self, params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        """Computes the task's loss and, in training, lm_weight times the language-model loss (equation 5).

        The weight of an example is its batch weight times the weight of its label; in tagging the latter is summed
        over the tagged words. The language-model loss of an example is the mean over its tokens and its sequences.
        With an adversarial perturbation the task's loss is the mean of the clean and the perturbed loss; the
        language-model loss stays clean.

        Returns:
          The weighted sum over examples (nats; regression: squared standardised errors), the sum of weights, and under
          "task_loss" the first without the language-model loss.
        """
        settings, mixup = self.config.regularisation, None
        if rng is not None:
            rng, mixup_rng = jax.random.split(rng)
            if settings.mixup_alpha is not None:
                mixup = sample_mixup(mixup_rng, settings.mixup_alpha, batch["weights"])
        task_loss = partial(self._task_loss, params, batch, rng, mixup)
        total, weights_B, x_NTD = task_loss(None)
        if rng is not None and settings.adversarial_epsilon is not None:
            table_VD, size = nn.unbox(params["token_embedding"]["embedding"]), len(weights_B)
            perturbation_NTD = adversarial_perturbation(
                lambda r_NTD: task_loss(r_NTD)[0], x_NTD.shape, size, table_VD, settings.adversarial_epsilon
            )
            total = (total + task_loss(perturbation_NTD)[0]) / 2
        task_total = total
        if rng is not None and self.config.task.lm_weight > 0:
            total += self.config.task.lm_weight * self._language_loss(params, x_NTD, batch, weights_B)
        return total, jnp.sum(weights_B), {"task_loss": task_total}

    def predict(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """Applies the model to a batch, with or without labels.

        Returns:
          examples: int32 (B,), as in the batch.
          losses, counts: float32 (B,), only with labels: the weighted loss of each example and its weight.
          probabilities: float32 (B, labels), or (B, O) over the options of a multiple choice.
          tags: int32 (B, T), tagging: the most probable label at each position.
          values: float32 (B,), regression, in the units of the labels.
          start_nats, stop_nats: float32 (B, T), question answering: log-probabilities that the answer starts and ends
            at each position; minus infinity at padding.
        """
        _, outputs = self._outputs(params, batch, None)
        task, predicted = self.config.task, {"examples": batch["examples"]}
        if (labels := _labels(batch)) is not None:
            losses_B, counts_B = self._task_losses(outputs, labels, smoothing=0.0)
            predicted |= {"losses": batch["weights"] * losses_B, "counts": batch["weights"] * counts_B}
        if task.kind == "regression":
            return predicted | {"values": outputs * task.target_std + task.target_mean}
        if task.kind == "question_answering":
            return predicted | {"start_nats": outputs[0], "stop_nats": outputs[1]}
        if task.kind == "tagging":
            return predicted | {"tags": jnp.argmax(outputs, axis=-1)}
        return predicted | {"probabilities": jax.nn.softmax(outputs, axis=-1)}

    def _task_loss(
        self,
        params: Any,
        batch: Batch,
        rng: jax.Array | None,
        mixup: tuple[jax.Array, jax.Array] | None,
        perturbation_NTD: jax.Array | None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Computes the weighted sum of the task's losses, the weights (B,), and the hidden states (N, T, D)."""
        smoothing = 0.0 if rng is None else self.config.regularisation.label_smoothing
        x_NTD, outputs = self._outputs(params, batch, rng, mixup, perturbation_NTD)
        labels = _labels(batch)
        assert labels is not None, "the loss needs labels"
        losses_B, counts_B = self._task_losses(outputs, labels, smoothing)
        if mixup is not None:
            share_B, partner_B = mixup
            partner_losses_B, partner_counts_B = self._task_losses(outputs, labels[partner_B], smoothing)
            losses_B, counts_B = mixed(losses_B, partner_losses_B, share_B), mixed(counts_B, partner_counts_B, share_B)
        return jnp.sum(batch["weights"] * losses_B), batch["weights"] * counts_B, x_NTD

    def _outputs(
        self,
        params: Any,
        batch: Batch,
        rng: jax.Array | None,
        mixup: tuple[jax.Array, jax.Array] | None = None,
        perturbation_NTD: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Computes the hidden states of all N = B * O sequences and the outputs of the head.

        Args:
          mixup: mixing coefficients and partners, both (B,), for the states that the head reads.
          perturbation_NTD: added to the token embeddings.

        Returns:
          (N, T, D), and logits, values, or the log-probabilities of starts and of stops.
        """
        task, deterministic = self.config.task, rng is None
        gpt_rng, head_rng = (None, None) if rng is None else jax.random.split(rng)
        tokens, ends = batch["tokens"], batch["ends"]
        tokens_NT, ends_N = tokens.reshape(-1, tokens.shape[-1]), ends.reshape(-1)
        # Bidirectional attention must not see padding. Causal attention cannot: padding comes last.
        padding_NT = (jnp.arange(tokens.shape[-1])[None] > ends_N[:, None]).astype(jnp.int32)
        x_NTD = hidden_states(
            self.gpt,
            params,
            tokens_NT,
            padding_NT if task.bidirectional else None,
            deterministic=deterministic,
            perturbation_BTD=perturbation_NTD,
            rngs=None if gpt_rng is None else {"dropout": gpt_rng},
        )
        x_D = x_NTD
        if task.kind not in PER_POSITION:
            x_D = jnp.take_along_axis(x_NTD, ends_N[:, None, None], axis=1)[:, 0]
        if task.kind in ("similarity", "regression") and tokens.ndim == 3:  # the sum over both orders
            x_D = jnp.sum(x_D.reshape(*ends.shape, -1), axis=1)
        if mixup is not None:
            x_BX = x_D.reshape(len(ends), -1)
            x_D = mixed(x_BX, x_BX[mixup[1]], mixup[0]).reshape(x_D.shape)
        rngs = None if head_rng is None else {"dropout": head_rng}
        outputs = cast(jax.Array, self.head.apply({"params": params["head"]}, x_D, deterministic, rngs=rngs))
        if task.kind == "multiple_choice":
            return x_NTD, outputs.reshape(ends.shape)
        if task.kind == "regression":
            return x_NTD, outputs[:, 0]
        if task.kind == "question_answering":
            text_BT = jnp.arange(tokens.shape[-1])[None] <= ends[:, None]
            masked_BT2 = jnp.where(text_BT[..., None], outputs, -jnp.inf)
            nats_BT2 = jax.nn.log_softmax(masked_BT2, axis=1)
            return x_NTD, (nats_BT2[..., 0], nats_BT2[..., 1])
        return x_NTD, outputs

    def _task_losses(self, outputs: Any, labels: jax.Array, smoothing: float) -> tuple[jax.Array, jax.Array]:
        """Computes the weighted loss of each example and its weight, both float32 (B,)."""
        task = self.config.task
        if task.kind == "regression":
            assert task.target_mean is not None
            assert task.target_std is not None
            targets_B = (labels - task.target_mean) / task.target_std
            return (outputs - targets_B) ** 2, jnp.ones_like(targets_B)
        if task.kind == "question_answering":
            starts_BT, stops_BT = outputs
            nats_B = -(_picked(starts_BT, labels[:, 0]) + _picked(stops_BT, labels[:, 1])) / 2
            return nats_B, jnp.ones_like(nats_B)
        nats = -jax.nn.log_softmax(outputs, axis=-1)
        losses = smoothed(nats, _picked(nats, jnp.maximum(labels, 0)), smoothing)
        label_weights = jnp.asarray(task.label_weights or np.ones(outputs.shape[-1]), jnp.float32)
        weights = jnp.where(labels >= 0, label_weights[jnp.maximum(labels, 0)], 0)
        if task.kind == "tagging":
            return jnp.sum(weights * losses, axis=1), jnp.sum(weights, axis=1)
        return weights * losses, weights

    def _language_loss(self, params: Any, x_NTD: jax.Array, batch: Batch, weights_B: jax.Array) -> jax.Array:
        """Computes the sum over examples of weights_B times the language-model loss per token."""
        tokens, ends = batch["tokens"], batch["ends"]
        tokens_NT, ends_N1 = tokens.reshape(-1, tokens.shape[-1]), ends.reshape(-1, 1)
        written = batch.get("written_tokens", tokens)  # the targets, where the inputs are corrupted
        targets_NT = jnp.pad(written.reshape(tokens_NT.shape)[:, 1:], [(0, 0), (0, 1)])
        sequences = ends.size // weights_B.size
        share_N1 = jnp.repeat(weights_B, sequences)[:, None] / (jnp.maximum(ends_N1, 1) * sequences)
        weights_NT = jnp.where(jnp.arange(tokens_NT.shape[1])[None] < ends_N1, share_N1, 0)
        head_VD = nn.unbox(head_embedding(params))
        model = self.config.model
        return cross_entropy(
            x_NTD, head_VD, targets_NT, weights_NT, None, model.precision, soft_cap=model.logit_soft_cap
        )


def _labels(batch: Batch) -> jax.Array | None:
    """Returns a batch's labels: (B,), (B, T) in tagging, (B, 2) in question answering; None without labels."""
    if "starts" in batch:
        return jnp.stack([batch["starts"], batch["stops"]], axis=1)
    return batch.get("labels")


def _picked(values_BX: jax.Array, index_B: jax.Array) -> jax.Array:
    """Returns values_BX[b, index_B[b]], for any number of leading axes."""
    return jnp.take_along_axis(values_BX, index_B[..., None], axis=-1)[..., 0]


def completed(config: Config, vocab_size: int, found: dict[str, Any]) -> Config:
    """Returns the complete config of a fine-tuning run.

    Args:
      vocab_size: of the tokenizer; the special tokens of `task_inputs.Special` are added to it.
      found: fields of `task` that are determined from the training rows, such as its labels.
    """
    config = dataclasses.replace(config, task=dataclasses.replace(config.task, **found))
    return config.completed(vocab_size + NUM_SPECIAL_TOKENS, extends_vocabulary=True)


def _read_task(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
        labels, weights = tuple(map(str, found["labels"])), tuple(map(float, found["label_weights"]))
        mean, std = (None if found[name] is None else float(found[name]) for name in ("target_mean", "target_std"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return {"labels": labels, "label_weights": weights, "target_mean": mean, "target_std": std}


def _complete(config: Config, tokenizer: Tokenizer, workdir: Path) -> Config:
    return completed(config, tokenizer.vocab_size, _read_task(workdir / TASK_FILE))


def _check(config: Config) -> None:
    """Raises UserError when `config` has settings that its task would ignore or that contradict each other."""
    task, smoothing = config.task, config.regularisation.label_smoothing
    if smoothing > 0 and task.kind in ("regression", "question_answering"):
        raise UserError(
            f"regularisation.label_smoothing={smoothing} does not apply to task.kind={task.kind}, which has no label "
            "probabilities: set it to 0"
        )
    if task.balanced_labels and task.kind not in NAMED:
        raise UserError(
            f"task.balanced_labels does not apply to task.kind={task.kind}, which has no classes: set it to false"
        )
    if not task.bidirectional:
        return
    if task.lm_weight > 0:
        raise UserError(
            f"task.bidirectional=true lets a position see the next token, which the language-model loss predicts: set "
            f"task.lm_weight={task.lm_weight} to 0"
        )
    if config.model.attention_backend not in ("auto", "xla"):
        raise UserError(
            f"model.attention_backend={config.model.attention_backend} is causal and task.bidirectional=true is not: "
            "set the backend to auto"
        )


DEFINITION = Definition(
    parameters=lambda config: ParameterSpec(config, TaskModel(config).init),
    loss=lambda config: regularised(config, TaskModel(config).loss),
    complete=_complete,
    check=_check,
    sections=("task", "regularisation"),
    reinitialises_special_tokens=True,
    head="task",
    uses_best_checkpoint=True,
)
