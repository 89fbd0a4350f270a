"""What a trained reward model says of answers."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.data.chat_batches import lay_out
from gptjax.data.conversations import Message
from gptjax.data.templates import Encoded, chat_format
from gptjax.inference.engine import bucket, power_of_two
from gptjax.parallel.mesh import batch_shards, constrain, use_mesh
from gptjax.stages.preference.reward_model import RewardModel
from gptjax.stages.saved_weights import load_reward_weights
from gptjax.stages.trained_model import predicting


class RewardScorer:
    """Scores answers, each with the conversation before it; see `load_reward_model`."""

    def __init__(self, model: RewardModel, params: Any, encode: Any, mesh: Mesh, batch_size: int) -> None:
        self._model, self._params, self._encode = model, params, encode
        self._mesh, self._batch_size = mesh, batch_size

    def __call__(self, answered: Sequence[tuple[Sequence[Message], str]]) -> npt.NDArray[np.float64]:
        """The rewards (N,), on the scale on which the best answers of the run's data have 0 on average.

        Args:
          answered: messages, the last a user's, and an answer to them. The oldest turns are left out of what is too
            long.

        Raises:
          UserError: a last exchange alone is longer than the reward model's context.
        """
        encoded = [self._encode([*messages, Message("assistant", answer)]) for messages, answer in answered]
        rewards = np.zeros(len(encoded))
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        for first in range(0, len(order), self._batch_size):
            indices = order[first : first + self._batch_size]
            rewards[indices] = self._score([encoded[i] for i in indices])
        return rewards

    def _score(self, encoded: Sequence[Encoded]) -> npt.NDArray[np.float32]:
        """One batch, the longest first; few different shapes."""
        shards = batch_shards(self._mesh)
        rows = shards * power_of_two(-(-len(encoded) // shards))
        length = min(bucket(len(encoded[0])), self._model.config.model.context_length)
        elements = [lay_out([encoded[i % len(encoded)]], 1, length, pack=False) for i in range(rows)]
        batch = {name: np.stack([element[name] for element in elements]) for name in elements[0]}
        with use_mesh(self._mesh):
            return np.asarray(_scores(self._model, self._params, batch))[: len(encoded), 0]


@partial(jax.jit, static_argnums=0)
def _scores(model: RewardModel, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """(B, 1), whole on every device: any process reads it."""
    batch = {name: constrain(array, "batch", *[None] * (array.ndim - 1)) for name, array in batch.items()}
    return constrain(model.scores(params, batch), None, None)


def load_reward_model(workdir: Path, mesh: Mesh, batch_size: int = 8) -> RewardScorer:
    """The reward model of a workdir, laid out over `mesh`.

    Args:
      batch_size: answers at once, rounded up to what the mesh needs.

    Raises:
      UserError: not a workdir, not one of stage "reward", or without a checkpoint.
    """
    with use_mesh(mesh):
        weights = load_reward_weights(workdir, mesh)
    config = predicting(weights.config)
    encode = partial(
        chat_format(config.chat, weights.tokenizer).encode,
        max_tokens=config.model.context_length,
        place="an answer to be rewarded",
    )
    params = {**weights.gpt, "head": weights.head}
    return RewardScorer(RewardModel(config), params, encode, mesh, batch_size)
