"""Published rules for the batch size and the learning rate of a run.

Power laws of compute (DeepSeek), of parameters and tokens (Step Law), or of the loss (Kaplan). They were measured on
particular data and architectures: a starting point for a sweep of the learning rate, not a replacement for it.
"""

import math
from typing import NamedTuple

from gptjax.config import UserError


class Rates(NamedTuple):
    """The recommendation of a rule."""

    peak_lr: float
    tokens_per_batch: float


def deepseek(parameters: float, tokens: float, loss: float) -> Rates:
    """Bi et al. 2024 (DeepSeek LLM), equation 1: C is the training compute."""
    flops = 6 * parameters * tokens
    return Rates(0.3118 * flops**-0.1250, 0.2920 * flops**0.3271)


def step_law(parameters: float, tokens: float, loss: float) -> Rates:
    """Li et al. 2025 (Predictable Scale, Part I), equation 1: N without embeddings."""
    return Rates(1.79 * parameters**-0.713 * tokens**0.307, 0.58 * tokens**0.571)


def kaplan(parameters: float, tokens: float, loss: float) -> Rates:
    """Kaplan et al. 2020, equations 5.3 (critical batch size of a loss) and D.1 (learning rate of N).

    Raises:
      UserError: the learning rate would be 0 or less, which it is from 12 billion parameters on.
    """
    if parameters >= 1.2e10:
        raise UserError(f"the rule kaplan has no learning rate for {parameters:.3g} parameters: use another --rule")
    return Rates(0.003239 - 0.0001395 * math.log(parameters), 2e8 / loss ** (1 / 0.21))


RULES = {"deepseek": deepseek, "step": step_law, "kaplan": kaplan}
