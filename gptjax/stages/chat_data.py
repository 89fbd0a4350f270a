"""The data of the chat stages: conversations, rankings or prompts, and their chat format."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeAlias, TypeVar

from absl import logging
from jax.sharding import Mesh

from gptjax.config import Config, DataConfig, UserError, naming
from gptjax.data import conversations
from gptjax.data.chat_batches import PackedConversations, PackedRankings
from gptjax.data.conversations import Conversation, Prompt, Ranking
from gptjax.data.images.image_files import ImageFiles
from gptjax.data.images.image_references import IMAGE, ImageReference
from gptjax.data.pipeline import PackedExamples, open_corpus
from gptjax.data.sources import open_source
from gptjax.data.templates import ChatFormat, TooLongError, chat_format
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import processes
from gptjax.models import low_precision
from gptjax.models.attention_backends import check_backend
from gptjax.parallel.mesh import check_fit
from gptjax.stages.reading import find_tokenizer, refuse_settings_of_pretraining

T = TypeVar("T", Conversation, Ranking, Prompt)
E = TypeVar("E")
Split: TypeAlias = tuple[list[T], list[T]]  # training and held-out items


@dataclasses.dataclass(frozen=True)
class ChatData(Generic[T]):
    """The data of a stage.

    Attributes:
      config: complete.
      images: reads the images of the items; None: the model reads none.
    """

    config: Config
    tokenizer: Tokenizer
    chat_format: ChatFormat
    train: list[T]
    validation: list[T]
    images: ImageFiles | None = None


def open_chat(
    config: Config, mesh: Mesh, tokenizer: Tokenizer | None, read: Callable[[Config], Split[T]]
) -> ChatData[T]:
    """Reads the data of a chat stage.

    Args:
      tokenizer: of the run that resumes; None: that of the weights to start from, or the one that the config names.
      read: `conversations_of`, `rankings_of` or `prompts_of`.

    Raises:
      UserError: conversations that cannot be read or are malformed, settings of other stages, sizes that do not divide
        over the mesh.
    """
    refuse_settings_of_pretraining(config, mesh, "conversation")
    check_backend(config.model, mesh.devices.flat[0].platform, has_segments=True)
    low_precision.check_device(config.model, mesh.devices.flat[0].platform)
    for field in ("source", "validation_source"):
        if (spec := getattr(config.data, field)) is not None:
            with naming(f"data.{field}"):
                conversations.check_spec(spec)
    split: Split[T] = processes.first_then_others(lambda: read(config))
    train, validation = split
    if tokenizer is None:
        tokenizer = find_tokenizer(config, [text for item in train for text in _texts(item)])
    form = chat_format(config.chat, tokenizer, config.model.vision)
    # The config of imported weights has their vocabulary size, which the template's tokens extend.
    extends = config.init_from is not None
    config = config.completed(form.vocab_size, extends_vocabulary=extends, image_token=form.image_token)
    check_fit(config, mesh)
    images = None
    if config.model.reads_images:
        images = ImageFiles(config.model.vision, config.data)
        train, validation = ([_with_frames(item, images) for item in split] for split in (train, validation))
        images.check([image for split in (train, validation) for item in split for image in _images(item)])
    return ChatData(config, tokenizer, form, train, validation, images)


def conversations_of(config: Config) -> Split[Conversation]:
    """Reads the training and the held-out conversations."""
    harmony = config.chat.template == "harmony"
    return _split(config, lambda spec: conversations.read_conversations(spec, harmony=harmony, **_reading(config)))


def rankings_of(config: Config) -> Split[Ranking]:
    """Reads the training and the held-out rankings, or makes them from conversations with chat.random_answers.

    The random completions of a training ranking come from the training conversations, those of a held-out ranking from
    the held-out ones. Otherwise the model would be trained to score held-out completions low.
    """
    if config.chat.random_answers == 0:
        return _split(config, lambda spec: conversations.read_rankings(spec, **_reading(config)))
    chat, (train, validation) = config.chat, conversations_of(config)
    return (
        conversations.random_rankings(train, chat.random_answers, config.seed, chat.random_draws),
        conversations.random_rankings(validation, chat.random_answers, config.seed),
    )


def prompts_of(config: Config) -> Split[Prompt]:
    """Reads the training and the held-out prompts."""
    harmony = config.chat.template == "harmony"
    return _split(config, lambda spec: conversations.read_prompts(spec, harmony=harmony, **_reading(config)))


def _reading(config: Config) -> dict[str, Any]:
    """What happens to damaged data."""
    return {"invalid_utf8": config.data.invalid_utf8, "skip_damaged": config.data.on_corrupt == "skip"}


def _split(config: Config, read: Callable[[str], list[T]]) -> Split[T]:
    train = read(config.data.source)
    if config.data.validation_source is not None:
        return train, read(config.data.validation_source)
    return conversations.hold_out(train, config.data.validation_fraction)


def _texts(item: Conversation | Ranking | Prompt) -> list[str]:
    """Returns all texts of an item, without the places of images."""
    messages = item.prompt if isinstance(item, Ranking) else item.messages
    texts = [m.content.replace(IMAGE, "") if m.images else m.content for m in messages]
    return [*texts, *item.completions] if isinstance(item, Ranking) else texts


def _images(item: Conversation | Ranking | Prompt) -> list[ImageReference]:
    """Returns all images of an item."""
    messages = item.prompt if isinstance(item, Ranking) else item.messages
    return [image for message in messages for image in message.images]


def _with_frames(item: T, files: ImageFiles) -> T:
    """An item whose videos are replaced by their frames."""
    field = "prompt" if isinstance(item, Ranking) else "messages"
    changed: dict[str, Any] = {field: tuple(map(files.divided, getattr(item, field)))}
    return dataclasses.replace(item, **changed)


def fitting(config: Config, items: Sequence[T], encode: Callable[[T], E]) -> list[E]:
    """Encodes the items; with chat.on_too_long=skip without those that are too long for the context.

    Raises:
      UserError: an item is too long and may not be skipped, or all are; or there are no items.
    """
    if not items:
        raise UserError("no conversation has a completion in the loss: set chat.loss_mask=assistant")
    encoded, skipped = [], []
    for item in items:
        try:
            encoded.append(encode(item))
        except TooLongError as error:
            if config.chat.on_too_long == "error":
                raise UserError(f"{error}, or set chat.on_too_long=skip") from None
            skipped.append(error)
    if not encoded:
        raise UserError(str(skipped[0]))
    if skipped:
        logging.warning("skipped %d of %d; the first: %s", len(skipped), len(items), skipped[0])
    return encoded


def pretraining_text(data: ChatData[Any]) -> PackedExamples | None:
    """Returns rows of the text that chat.pretraining_source names; None if it is unset."""
    config = data.config
    if config.chat.pretraining_source is None:
        return None
    with naming("chat.pretraining_source"):
        open_source(config.chat.pretraining_source)
    text = DataConfig(source=config.chat.pretraining_source, cache_dir=config.data.cache_dir)
    return processes.first_then_others(
        lambda: open_corpus(
            text, context_length=config.model.context_length, seed=config.seed, tokenizer=data.tokenizer
        )
    ).train


def positions(config: Config, rows: PackedConversations | PackedRankings) -> tuple[int, int]:
    """Returns the number of positions in an epoch of `rows` and in all training, padding included."""
    per_epoch, batch = rows.rows_per_epoch * rows[0]["tokens"].size, config.batch
    if batch.total_tokens is not None:
        return per_epoch, batch.total_tokens
    return per_epoch, math.ceil((batch.epochs or 0) * per_epoch)
