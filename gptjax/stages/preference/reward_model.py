"""The reward model of stage "reward" and its loss: a GPT that scores completions (Ouyang et al. 2022, section 3.5).

A batch has the arrays of `gptjax/data/chat_batches.py`: an element is P prompts with G completions each, best first,
laid out in R rows of T positions; X = R T.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config
from gptjax.losses import preference
from gptjax.models.gpt import GPT
from gptjax.models.heads import Head, init_with_head
from gptjax.stages import policy
from gptjax.stages.definition import Definition
from gptjax.stages.policy import element_hidden_states
from gptjax.training.objective import Batch, Measures

SCALE_FILE = "reward.json"  # in the workdir of a run of stage "reward": the mean score of the best completions


@dataclasses.dataclass(frozen=True)
class RewardModel:
    """A GPT with a head whose output at a completion's last token is the completion's score.

    The parameters are the GPT's, and the head's under "head".

    Args:
      config: complete.
    """

    config: Config

    @property
    def gpt(self) -> GPT:
        return GPT(self.config.model)

    @property
    def head(self) -> Head:
        return Head(self.config.model, outputs=1, dropout=0.0)

    def init(self, rng: jax.Array) -> Any:
        """Initialises all parameters, boxed."""
        return init_with_head(self.gpt, self.head, rng)

    def values(self, params: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
        """The head's output at every position, float32 (B, R, T)."""
        x_BRTD = element_hidden_states(self.gpt, params, batch, rng)
        return cast(jax.Array, self.head.apply({"params": params["head"]}, x_BRTD, deterministic=True))[..., 0]

    def scores(self, params: Any, batch: Batch, rng: jax.Array | None = None) -> jax.Array:
        """Scores of the completions, float32 in the shape of `ends`; arbitrary where there is no completion."""
        return at_ends(self.values(params, batch, rng), batch["ends"])

    def loss(self, params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        """Equation 1 of the paper, summed over the prompts; each counts once, however many pairs its completions make.

        Returns:
          The loss, the number of prompts, and `accuracy`: the share of a prompt's pairs that are ranked correctly.
        """
        ranks_BPG = batch["ranks"]
        losses_BP, accuracies_BP = preference.ranking_loss(self.scores(params, batch, rng), ranks_BPG)
        # An element may have fewer prompts than others, or be padding of the batch.
        count = jnp.sum(jnp.any(ranks_BPG > 0, axis=-1), dtype=jnp.float32)
        return jnp.sum(losses_BP), count, {"accuracy": jnp.sum(accuracies_BP)}


def at_ends(values_BRT: jax.Array, ends: jax.Array) -> jax.Array:
    """Returns the values at the last tokens of completions, in the shape of `ends`."""
    flat_BX, ends_BN = values_BRT.reshape(len(ends), -1), ends.reshape(len(ends), -1)
    return jnp.take_along_axis(flat_BX, ends_BN, axis=1).reshape(ends.shape)


DEFINITION = Definition(
    parameters=lambda config: ParameterSpec(config, RewardModel(config).init),
    loss=lambda config: RewardModel(config).loss,
    complete=policy.complete,
    check=policy.check_no_pretraining_text,
    sections=("chat",),
    conversational=True,
    head="reward",
)
