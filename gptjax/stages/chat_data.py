"""What the stages of chat share: conversations, the format they are read in, and where they come from."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from absl import logging
from jax.sharding import Mesh

from gptjax.config import Config, DataConfig, UserError
from gptjax.data import conversations
from gptjax.data.chat_batches import PackedConversations, PackedRankings
from gptjax.data.conversations import Conversation, Prompt, Ranking
from gptjax.data.pipeline import PackedExamples, open_corpus
from gptjax.data.templates import ChatFormat, TooLongError, chat_format
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import processes
from gptjax.models import low_precision
from gptjax.models.attention_backends import check_backend
from gptjax.parallel.mesh import check_fit
from gptjax.stages.reading import find_tokenizer, refuse_settings_of_pretraining

T = TypeVar("T", Conversation, Ranking, Prompt)
E = TypeVar("E")
Split: TypeAlias = tuple[list[T], list[T]]  # to learn from, and held out


@dataclasses.dataclass(frozen=True)
class ChatData(Generic[T]):
    """What a stage learns from.

    Attributes:
      config: complete.
    """

    config: Config
    tokenizer: Tokenizer
    chat_format: ChatFormat
    train: list[T]
    validation: list[T]


def open_chat(
    config: Config, mesh: Mesh, tokenizer: Tokenizer | None, read: Callable[[Config], Split[T]]
) -> ChatData[T]:
    """The data of a stage of chat on `mesh`.

    Args:
      tokenizer: of the run that goes on; None: that of the weights to start from, or the one that the config names.
      read: `conversations_of`, `rankings_of` or `prompts_of`.

    Raises:
      UserError: conversations that cannot be read or are malformed, settings that are of other stages, sizes that do
        not divide over the mesh.
    """
    refuse_settings_of_pretraining(config, mesh, "conversation")
    check_backend(config.model, mesh.devices.flat[0].platform, has_segments=True)
    low_precision.check_device(config.model, mesh.devices.flat[0].platform)
    for spec in filter(None, (config.data.source, config.data.validation_source)):
        conversations.check_spec(spec)
    train, validation = processes.first_then_others(lambda: read(config))
    if tokenizer is None:
        tokenizer = find_tokenizer(config, [text for item in train for text in _texts(item)])
    form = chat_format(config.chat, tokenizer)
    config = config.completed(form.vocab_size)
    check_fit(config, mesh)
    return ChatData(config, tokenizer, form, train, validation)


def conversations_of(config: Config) -> Split[Conversation]:
    """Conversations to learn from, and those held out."""

    def read(spec: str) -> list[Conversation]:
        return conversations.read_conversations(spec, invalid_utf8=config.data.invalid_utf8)

    return _split(config, read)


def rankings_of(config: Config) -> Split[Ranking]:
    """Rankings to learn from, and those held out: of the source, or made of its conversations.

    Random answers come from the same side. Were they drawn from all, the true answers that are held out would be met in
    training as wrong ones alone, and the model would learn them by heart as such.
    """
    if config.chat.random_answers == 0:
        return _split(config, lambda spec: conversations.read_rankings(spec, invalid_utf8=config.data.invalid_utf8))
    chat, (train, validation) = config.chat, conversations_of(config)
    return (
        conversations.random_rankings(train, chat.random_answers, config.seed, chat.random_draws),
        conversations.random_rankings(validation, chat.random_answers, config.seed),
    )


def prompts_of(config: Config) -> Split[Prompt]:
    """Prompts to answer, and those held out."""
    return _split(config, lambda spec: conversations.read_prompts(spec, invalid_utf8=config.data.invalid_utf8))


def _split(config: Config, read: Callable[[str], list[T]]) -> Split[T]:
    train = read(config.data.source)
    if config.data.validation_source is not None:
        return train, read(config.data.validation_source)
    return conversations.hold_out(train, config.data.validation_fraction)


def _texts(item: Conversation | Ranking | Prompt) -> list[str]:
    """All that a model reads of it."""
    if not isinstance(item, Ranking):
        return [message.content for message in item.messages]
    return [*(message.content for message in item.prompt), *item.answers]


def fitting(config: Config, items: Sequence[T], encode: Callable[[T], E]) -> list[E]:
    """What `encode` makes of the items, without those too long for the context where chat.on_too_long says so.

    Raises:
      UserError: one is too long, or all are.
    """
    encoded, left_out = [], []
    for item in items:
        try:
            encoded.append(encode(item))
        except TooLongError as error:
            if config.chat.on_too_long == "error":
                raise UserError(f"{error}, or set chat.on_too_long=skip") from None
            left_out.append(error)
    if not encoded:
        raise UserError(str(left_out[0]))
    if left_out:
        logging.warning("left out: %d of %d; the first: %s", len(left_out), len(items), left_out[0])
    return encoded


def pretraining_text(data: ChatData[Any]) -> PackedExamples | None:
    """Rows of the text that chat.pretraining_source names; None: it names none."""
    config = data.config
    if config.chat.pretraining_source is None:
        return None
    text = DataConfig(source=config.chat.pretraining_source, cache_dir=config.data.cache_dir)
    return processes.first_then_others(
        lambda: open_corpus(
            text, context_length=config.model.context_length, seed=config.seed, tokenizer=data.tokenizer
        )
    ).train


def positions(config: Config, rows: PackedConversations | PackedRankings) -> tuple[int, int]:
    """Positions in an epoch of `rows` and in all training; a position counts whether a token is there or not."""
    per_epoch, batch = rows.rows_per_epoch * rows[0]["tokens"].size, config.batch
    return per_epoch, batch.total_tokens or math.ceil((batch.epochs or 0) * per_epoch)
