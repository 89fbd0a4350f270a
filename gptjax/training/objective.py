"""The objective of a stage: a pure loss of the parameters and a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config, PeftConfig
from gptjax.models import peft
from gptjax.optim import adalora

Batch = dict[str, jax.Array]
Measures = dict[str, jax.Array]
# (all parameters, microbatch, dropout key or None) -> the loss summed over targets, the sum of their weights, and sums
# of further metrics by name; all float32 scalars. Without a key the loss is deterministic, as in evaluation.
Loss = Callable[[Any, Batch, jax.Array | None], tuple[jax.Array, jax.Array, Measures]]


@dataclasses.dataclass(frozen=True)
class Objective:
    """The parameters of a stage and the loss to minimise over them.

    Attributes:
      stage_loss: the loss as the stage defines it, without low-rank matrices; that of pretraining is
        `next_token_loss` in gptjax/stages/pretrain.py.
    """

    parameters: ParameterSpec
    stage_loss: Loss

    @property
    def config(self) -> Config:
        return self.parameters.config

    @property
    def loss(self) -> Loss:
        """The stage's loss, computed with the low-rank matrices in the parameters if `peft` asks for them.

        Losses of equal objectives are equal, and so share the programs that are compiled from them.
        """
        has_low_rank = self.config.peft.method in ("lora", "adalora")
        return _LowRankLoss(self.config.peft, self.stage_loss) if has_low_rank else self.stage_loss


@dataclasses.dataclass(frozen=True)
class _LowRankLoss:
    """A stage's loss with low-rank matrices."""

    settings: PeftConfig
    stage_loss: Loss

    def __call__(self, params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        """Computes the loss; in training AdaLoRA adds its orthogonality penalty (Zhang et al. 2023, equation 4)."""
        with peft.applied(self.settings, deterministic=rng is None):
            total, weight, measures = self.stage_loss(params, batch, rng)
        if self.settings.method == "adalora" and rng is not None:
            total += weight * self.settings.orthogonality * adalora.penalty(params)
        return total, weight, measures
