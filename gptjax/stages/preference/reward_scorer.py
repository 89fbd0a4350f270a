"""Scores completions with a trained reward model."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt
from absl import logging
from jax.sharding import Mesh

from gptjax.config import DataConfig
from gptjax.data.chat_batches import lay_out
from gptjax.data.conversations import Message, Prompt
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.square_images import padded
from gptjax.data.templates import ChatFormat, EncodedConversation, TooLongError, chat_format, with_completion
from gptjax.inference.engine import bucket, power_of_two
from gptjax.parallel.mesh import batch_shards, constrain, use_mesh
from gptjax.stages.preference.reward_model import RewardModel
from gptjax.stages.registry import completed_config
from gptjax.stages.saved_weights import load_reward_weights
from gptjax.stages.trained_model import predicting


class RewardScorer:
    """Scores completions, each given the conversation before it; see `load_reward_model`."""

    def __init__(
        self,
        model: RewardModel,
        params: Any,
        chat_format: ChatFormat,
        mesh: Mesh,
        batch_size: int,
        images: ImageFiles | None = None,
    ) -> None:
        self._model, self._params, self._format = model, params, chat_format
        self._mesh, self._batch_size, self._images = mesh, batch_size, images

    def __call__(
        self, pairs: Sequence[tuple[Sequence[Message], str]], ended: Sequence[bool] | None = None
    ) -> npt.NDArray[np.float64]:
        """Returns the rewards (N,), on the scale on which the best completions of the run's data have mean 0.

        Args:
          pairs: messages, the last a user's, and a completion. The oldest turns of a conversation that is longer than
            the reward model's context are dropped; a completion that is still too long is truncated, with a warning.
          ended: whether each completion ended by itself. The reward of one that was cut off is read at its last token,
            without the token that ends a turn, which the policy did not write. None: all ended.

        Raises:
          UserError: a last user message alone is longer than the reward model's context; or there is an image that
            cannot be read, or the reward model reads none.
        """
        ended = [True] * len(pairs) if ended is None else ended
        encoded, num_truncated = [], 0
        for (messages, text), end in zip(pairs, ended, strict=True):
            sequence, truncated = self._encode(messages, text, end)
            encoded.append(sequence)
            num_truncated += truncated
        if num_truncated:
            logging.warning(
                "%d of %d completions exceed the context of the reward model, which scores what fits",
                *(num_truncated, len(pairs)),
            )
        rewards = np.zeros(len(encoded))
        order = sorted(range(len(encoded)), key=lambda i: -len(encoded[i]))
        for first in range(0, len(order), self._batch_size):
            indices = order[first : first + self._batch_size]
            rewards[indices] = self._score([encoded[i] for i in indices])
        return rewards

    def _encode(self, messages: Sequence[Message], text: str, ended: bool) -> tuple[EncodedConversation, bool]:
        """Returns a prompt with its completion, and whether the completion was truncated."""
        context = self._model.config.model.context_length
        completion = self._format.encode_completion(text)
        if not ended:
            completion = completion[:-1]
        encode = self._format.encode_prompt_with_images
        try:
            prompt = encode(messages, context - len(completion))
            return with_completion(prompt.tokens, completion, prompt.images), False
        except TooLongError:
            prompt = encode(messages, context - 1, place="a prompt of the reward model")
            return with_completion(prompt.tokens, completion[: context - len(prompt)], prompt.images), True

    def _score(self, encoded: Sequence[EncodedConversation]) -> npt.NDArray[np.float32]:
        """Scores one batch, the longest sequence first; shapes are rounded up, so that few programs are compiled."""
        shards = batch_shards(self._mesh)
        rows = shards * power_of_two(-(-len(encoded) // shards))
        length = min(bucket(len(encoded[0])), self._model.config.model.context_length)
        elements = [lay_out([encoded[i % len(encoded)]], 1, length, pack=False) for i in range(rows)]
        batch = {name: np.stack([element[name] for element in elements]) for name in elements[0]}
        if most := max(len(sequence.images) for sequence in encoded):
            batch["images"] = self._images_of(encoded, rows, power_of_two(most))
        with use_mesh(self._mesh):
            return np.asarray(_scores(self._model, self._params, batch))[: len(encoded), 0]

    def _images_of(self, encoded: Sequence[EncodedConversation], rows: int, count: int) -> npt.NDArray[np.uint8]:
        """The images of elements of one row, uint8 (rows, 1, count, X); those after `encoded` repeat it."""
        assert self._images is not None, "the format refuses images for a model that reads none"
        read = [self._images.read_all(sequence.images) for sequence in encoded]
        return padded([read[row % len(read)] for row in range(rows)], count, self._images.vision)[:, None]


@partial(jax.jit, static_argnums=0)
def _scores(model: RewardModel, params: Any, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the scores (B, 1), replicated, so that any process can read them."""
    batch = {name: constrain(array, "batch", *[None] * (array.ndim - 1)) for name, array in batch.items()}
    return constrain(model.scores(params, batch), None, None)


def load_reward_model(workdir: Path, mesh: Mesh, batch_size: int = 8, data: DataConfig | None = None) -> RewardScorer:
    """Loads the reward model of a workdir, laid out over `mesh`.

    Args:
      batch_size: completions scored at once, rounded up to what the mesh needs.
      data: where the images of the conversations are; None: as in a new config.

    Raises:
      UserError: not a workdir, not one of stage "reward", or without a checkpoint.
    """
    with use_mesh(mesh):
        weights = load_reward_weights(workdir, mesh)
    config = predicting(weights.config)
    params = {**weights.gpt, "head": weights.head}
    form = chat_format(config.chat, weights.tokenizer, config.model.vision)
    images = ImageFiles(config.model.vision, data or DataConfig()) if config.model.reads_images else None
    return RewardScorer(RewardModel(config), params, form, mesh, batch_size, images)


def check_prompts_fit(workdir: Path, prompts: Sequence[Prompt]) -> None:
    """Raises UserError when the last message of a prompt alone exceeds the context of a workdir's reward model."""
    config, tokenizer = completed_config(workdir)
    form = chat_format(config.chat, tokenizer, config.model.vision)
    for prompt in prompts:
        form.encode_prompt(prompt.messages, config.model.context_length - 1, place=f"{workdir}: {prompt.place}")
