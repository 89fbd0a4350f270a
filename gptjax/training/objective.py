"""The objective of a stage: a pure loss of the parameters and a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config
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

    def loss(self, params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        """The stage's loss, computed with the low-rank matrices in `params`; arguments and results are those of `Loss`.

        In training AdaLoRA adds its orthogonality penalty (Zhang et al. 2023, equation 4).
        """
        settings = self.config.peft
        if settings.method not in ("lora", "adalora"):
            return self.stage_loss(params, batch, rng)
        with peft.applied(settings, deterministic=rng is None):
            total, weight, measures = self.stage_loss(params, batch, rng)
        if settings.method == "adalora" and rng is not None:
            total += weight * settings.orthogonality * adalora.penalty(params)
        return total, weight, measures
