"""The model of stage "finetune": a GPT with a head for the task, its loss, and what it predicts.

Radford et al. 2018, sections 3.2 and 3.3. A batch has the arrays of `gptjax/data/buckets.py`.
"""

import dataclasses
from pathlib import Path
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config, UserError
from gptjax.data.task_inputs import NUM_SPECIAL_TOKENS
from gptjax.data.tokenizers import Tokenizer
from gptjax.files import read_json
from gptjax.losses.cross_entropy import cross_entropy
from gptjax.models.gpt import GPT, head_embedding, hidden_states
from gptjax.models.heads import Head, init_with_head
from gptjax.stages.definition import Definition
from gptjax.stages.finetune.regularisation import draw_mixup, mixed, regularised, smoothed
from gptjax.training.objective import Batch, Measures

TASK_FILE = "task.json"  # in the workdir of a fine-tuning run: what its training rows decided of TaskConfig
PER_LABEL = ("classification", "entailment", "similarity", "tagging")  # kinds with an output for each label
PER_POSITION = ("tagging", "question_answering")


@dataclasses.dataclass(frozen=True)
class TaskModel:
    """A GPT and a head; the parameters are the GPT's, and the head's under "head".

    Args:
      config: complete.
    """

    config: Config

    @property
    def gpt(self) -> GPT:
        return GPT(self.config.model)

    @property
    def head(self) -> Head:
        task = self.config.task
        outputs = {"question_answering": 2}.get(task.kind, len(task.labels) if task.kind in PER_LABEL else 1)
        return Head(self.config.model, outputs, task.head_dropout)

    def init(self, rng: jax.Array) -> Any:
        """All parameters, boxed."""
        return init_with_head(self.gpt, self.head, rng)

    def loss(self, params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        """The task's loss and, while training, lm_weight times the language model's (equation 5).

        An example counts `weights` times the weight of its label, in tagging once for each tagged word. The language
        model's loss of an example is the mean over its tokens, and over its sequences.

        Returns:
          The weighted sum over the examples in nats (regression: squared deviations), the sum of the weights, and
          under "task_loss" the sum without the language model's part.
        """
        regularisation, mixup, smoothing = self.config.regularisation, None, 0.0
        if rng is not None:
            smoothing = regularisation.label_smoothing
            rng, mixup_rng = jax.random.split(rng)
            if regularisation.mixup_alpha is not None:
                mixup = draw_mixup(mixup_rng, regularisation.mixup_alpha, batch["weights"])
        x_NTD, outputs = self._outputs(params, batch, rng, mixup)
        labels = _labels(batch)
        assert labels is not None, "rows without labels can be predicted, and not learned"
        losses_B, counts_B = self._task_losses(outputs, labels, smoothing)
        if mixup is not None:
            share_B, partner_B = mixup
            of_partners = self._task_losses(outputs, labels[partner_B], smoothing)
            losses_B, counts_B = mixed(losses_B, of_partners[0], share_B), mixed(counts_B, of_partners[1], share_B)
        weights_B = batch["weights"] * counts_B
        task_total = total = jnp.sum(batch["weights"] * losses_B)
        if rng is not None and self.config.task.lm_weight > 0:
            total += self.config.task.lm_weight * self._language_loss(params, x_NTD, batch, weights_B)
        return total, jnp.sum(weights_B), {"task_loss": task_total}

    def predict(self, params: Any, batch: Batch) -> dict[str, jax.Array]:
        """What the head says of a batch, with or without labels.

        Returns:
          examples: int32 (B,), of the batch.
          losses, counts: float32 (B,), where there are labels: the task's loss, summed over what counts, and how much
            that is.
          probabilities: float32 (B, labels) or (B, choices).
          tags: int32 (B, T), of tagging: the likeliest.
          values: float32 (B,), of regression, in the labels' own units.
          start_nats, stop_nats: float32 (B, T), of question answering: log-probabilities that the answer begins and
            ends there; minus infinity behind the text.
        """
        _, outputs = self._outputs(params, batch, None)
        task, found = self.config.task, {"examples": batch["examples"]}
        if (labels := _labels(batch)) is not None:
            losses_B, counts_B = self._task_losses(outputs, labels, smoothing=0.0)
            found |= {"losses": batch["weights"] * losses_B, "counts": batch["weights"] * counts_B}
        if task.kind == "regression":
            return found | {"values": outputs * task.target_std + task.target_mean}
        if task.kind == "question_answering":
            return found | {"start_nats": outputs[0], "stop_nats": outputs[1]}
        if task.kind == "tagging":
            return found | {"tags": jnp.argmax(outputs, axis=-1)}
        return found | {"probabilities": jax.nn.softmax(outputs, axis=-1)}

    def _outputs(
        self, params: Any, batch: Batch, rng: jax.Array | None, mixup: tuple[jax.Array, jax.Array] | None = None
    ) -> tuple[jax.Array, Any]:
        """Hidden states of all N = B x C sequences, and what the head says: logits, values, or starts and stops.

        Args:
          mixup: how much of each example's state, both (B,), stays what it is, and with which the rest is mixed.
        """
        task, deterministic = self.config.task, rng is None
        gpt_rng, head_rng = (None, None) if rng is None else jax.random.split(rng)
        tokens, ends = batch["tokens"], batch["ends"]
        tokens_NT, ends_N = tokens.reshape(-1, tokens.shape[-1]), ends.reshape(-1)
        rngs = None if gpt_rng is None else {"dropout": gpt_rng}
        x_NTD = hidden_states(self.gpt, params, tokens_NT, deterministic=deterministic, rngs=rngs)
        x_D = x_NTD
        if task.kind not in PER_POSITION:
            x_D = jnp.take_along_axis(x_NTD, ends_N[:, None, None], axis=1)[:, 0]
        if task.kind in ("similarity", "regression") and tokens.ndim == 3:  # the two orders, summed
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
        """The loss of each example, summed over what counts in it, and how much that is; both (B,)."""
        task = self.config.task
        if task.kind == "regression":
            assert task.target_mean is not None
            assert task.target_std is not None
            wanted_B = (labels - task.target_mean) / task.target_std
            return (outputs - wanted_B) ** 2, jnp.ones_like(wanted_B)
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
        """The sum over the examples of weights_B times the loss a token."""
        tokens, ends = batch["tokens"], batch["ends"]
        tokens_NT, ends_N1 = tokens.reshape(-1, tokens.shape[-1]), ends.reshape(-1, 1)
        written = batch.get("written_tokens", tokens)  # where some of them were changed to be read
        targets_NT = jnp.pad(written.reshape(tokens_NT.shape)[:, 1:], [(0, 0), (0, 1)])
        sequences = ends.size // weights_B.size
        share_N1 = jnp.repeat(weights_B, sequences)[:, None] / (jnp.maximum(ends_N1, 1) * sequences)
        weights_NT = jnp.where(jnp.arange(tokens_NT.shape[1])[None] < ends_N1, share_N1, 0)
        head_VD = nn.unbox(head_embedding(params))
        return cross_entropy(x_NTD, head_VD, targets_NT, weights_NT, None, self.config.model.precision)


def _labels(batch: Batch) -> jax.Array | None:
    """What a batch has of labels: (B,), (B, T) in tagging, (B, 2) in question answering; None: nothing."""
    if "starts" in batch:
        return jnp.stack([batch["starts"], batch["stops"]], axis=1)
    return batch.get("labels")


def _picked(values_BK: jax.Array, index_B: jax.Array) -> jax.Array:
    """values_BK[b, index_B[b]], for any number of leading axes."""
    return jnp.take_along_axis(values_BK, index_B[..., None], axis=-1)[..., 0]


def completed(config: Config, vocab_size: int, found: dict[str, Any]) -> Config:
    """The complete config of a fine-tuning run.

    Args:
      vocab_size: of the tokenizer; the special tokens of `task_inputs.Special` follow it.
      found: fields of `task` that the training rows decide, such as its labels.
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


DEFINITION = Definition(
    parameters=lambda config: ParameterSpec(config, TaskModel(config).init),
    loss=lambda config: regularised(config, TaskModel(config).loss),
    complete=_complete,
    reinitialises_special_tokens=True,
    head="task",
    uses_best_checkpoint=True,
)
