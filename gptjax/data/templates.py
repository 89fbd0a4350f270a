"""Chat templates: encode conversations as tokens, with a loss mask over the assistant's completions."""

import dataclasses
import re
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from gptjax.config import ChatConfig, UserError, VisionConfig
from gptjax.data.conversations import Message
from gptjax.data.images.image_references import IMAGE, ImageReference
from gptjax.data.tokenizers import END_OF_TEXT, Tokenizer

_Unit: TypeAlias = tuple[list[int], bool, tuple[ImageReference, ...]]

TEXT_ALONE = VisionConfig()
_SPECIAL = re.compile(r"<\|[^|<>]+\|>")


@dataclasses.dataclass(frozen=True)
class Template:
    """Text around the {content} of a message, for each role.

    <|name|> in a format is a special token: <|endoftext|> is the tokenizer's, any other is appended to the tokenizer's
    vocabulary. The content of a message is always plain text and never becomes a special token. The special token right
    after the assistant's {content} ends its turn.

    Raises:
      UserError: a format has no {content} or several, or no token ends the assistant's turn.
    """

    system: str
    user: str
    assistant: str

    def __post_init__(self) -> None:
        for role, text in dataclasses.asdict(self).items():
            if text.count("{content}") != 1:
                raise UserError(f"chat.{role}_format={text!r} does not have one {{content}}")
        if not _SPECIAL.match(self.assistant.partition("{content}")[2]):
            raise UserError(
                f"chat.assistant_format={self.assistant!r} has no special token right after {{content}} to end the "
                f"turn: write {{content}}{END_OF_TEXT}, for example"
            )

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Names of the special tokens appended to the tokenizer's vocabulary, in the order of their ids."""
        names = _SPECIAL.findall(self.system + self.user + self.assistant)
        return tuple(name for name in dict.fromkeys(names) if name != END_OF_TEXT)


TEMPLATES = {
    "plain": Template("{content}\n\n", "User:\n{content}\n\n", f"Assistant:\n{{content}}{END_OF_TEXT}"),
    "none": Template("{content}", "{content}", f"{{content}}{END_OF_TEXT}"),
    "chatml": Template(*(f"<|im_start|>{role}\n{{content}}<|im_end|>\n" for role in ("system", "user", "assistant"))),
}


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """A tokenised conversation.

    Attributes:
      tokens: int32 (T,).
      loss_mask: bool (T,): True for the tokens of completions, including the token that ends the turn.
      images: in the order of their tokens.
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]
    images: tuple[ImageReference, ...] = ()

    def __len__(self) -> int:
        return len(self.tokens)


def with_completion(
    prompt: npt.NDArray[np.int32], completion: npt.NDArray[np.int32], images: tuple[ImageReference, ...] = ()
) -> EncodedConversation:
    """Concatenates a prompt and its completion; all tokens of the completion contribute to the loss.

    Args:
      images: of the prompt.
    """
    tokens = np.concatenate([prompt, completion])
    return EncodedConversation(tokens, np.arange(len(tokens)) >= len(prompt), images)


class TooLongError(UserError):
    """The last exchange of a conversation does not fit into the context."""

    @classmethod
    def of(cls, need: int, max_tokens: int, place: str) -> "TooLongError":
        """Returns the error of a last exchange of `need` tokens."""
        return cls(
            f"{f'{place}: ' if place else ''}its last exchange has {need} tokens, but {max_tokens} fit: shorten it, or "
            "increase model.context_length"
        )


class ChatFormat:
    """Encodes conversations with a template and a tokenizer.

    Each `<image>` in a user's message becomes `vision.tokens_per_image` image tokens.

    Args:
      vision: the images that the model reads.

    Attributes:
      template: the template.
      vocab_size: size of the tokenizer's vocabulary with the special tokens of the template and the image token.
      image_token: id of the image token; None: the model reads no images.
      special_tokens: ids of the special tokens appended to the vocabulary, by name.
      end_of_turn: id of the token that ends an assistant's turn.
      end_tokens: ids of all tokens that end a completion, `end_of_turn` first.

    Raises:
      UserError: the template has <|endoftext|>, but the tokenizer has no such token; or a special token would have the
        id of the image token of a run before.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer, vision: VisionConfig = TEXT_ALONE) -> None:
        self.template, self._tokenizer, self._vision = template, tokenizer, vision
        self.special_tokens = {name: tokenizer.vocab_size + i for i, name in enumerate(template.special_tokens)}
        self._ids = dict(self.special_tokens)
        if tokenizer.end_of_text is not None:
            self._ids[END_OF_TEXT] = tokenizer.end_of_text
        elif END_OF_TEXT in template.system + template.user + template.assistant:
            raise UserError(
                f"the chat template has {END_OF_TEXT}, but this tokenizer does not: choose another template"
            )
        self.image_token: int | None = None
        if vision.encoder != "none":
            self.image_token = vision.image_token
            if self.image_token is None:
                self.image_token = tokenizer.vocab_size + len(self.special_tokens)
            if self.image_token in self.special_tokens.values():
                raise UserError(
                    f"the tokens of the chat template, {', '.join(self.special_tokens)}, would take the place of the "
                    "image token of init_from: keep the template of that run, or choose one without special tokens"
                )
            if self.image_token >= tokenizer.vocab_size:
                self.special_tokens[IMAGE] = self.image_token
        self.vocab_size = max(tokenizer.vocab_size, *(token + 1 for token in self.special_tokens.values()), 0)
        formats = dataclasses.asdict(template).items()
        self._around = {role: [self._written(part) for part in text.split("{content}")] for role, text in formats}
        self._start = [] if tokenizer.end_of_text is None else [tokenizer.end_of_text]  # as documents begin
        self.end_of_turn = self._around["assistant"][1][0]
        self.end_tokens: tuple[int, ...] = (self.end_of_turn,)

    def encode(
        self, messages: Sequence[Message], max_tokens: int | None = None, *, place: str = ""
    ) -> EncodedConversation:
        """Encodes a conversation; a last message of the assistant is encoded up to the end of its turn.

        Args:
          messages: the conversation.
          max_tokens: longer conversations lose their oldest exchanges, but not the system message; the remaining turns
            begin with a user's.
          place: where the conversation is from, for error messages.

        Raises:
          TooLongError: the last exchange alone is longer than `max_tokens`.
        """
        check_images(messages, self._vision, place)
        parts = [self._message(message) for message in messages]
        if messages and messages[-1].role == "assistant":
            tokens, loss_mask = parts[-1]
            stop = len(tokens) - len(self._around["assistant"][1]) + 1
            parts[-1] = (tokens[:stop], loss_mask[:stop])
        return self._joined(messages, parts, max_tokens, place)

    def encode_document(self, document: Message, max_tokens: int, *, place: str = "") -> list[EncodedConversation]:
        """Encodes a text with images as in pretraining: all its text is in the loss, and so is end-of-text behind it.

        Returns:
          The document, in several pieces if it has more than `max_tokens` tokens; none of them cuts an image.

        Raises:
          TooLongError: an image has more tokens than `max_tokens`.
        """
        check_images([document], self._vision, place)
        first, *others = (self._tokenizer.encode(text).tolist() for text in document.content.split(IMAGE))
        image_tokens = self._vision.tokens_per_image if document.images else 0
        if image_tokens > max_tokens:
            raise TooLongError.of(image_tokens, max_tokens, place)
        # Tokens that may not be cut, whether they are in the loss, and their image.
        units: list[_Unit] = [(self._start, False, ()), *(([token], True, ()) for token in first)]
        for image, text in zip(document.images, others, strict=True):
            assert self.image_token is not None, "check_images refuses images that the model does not read"
            units += [([self.image_token] * image_tokens, False, (image,)), *(([token], True, ()) for token in text)]
        pieces: list[list[_Unit]] = [[]]
        room = max_tokens
        for unit in (*units, (self._start, True, ())):
            if len(unit[0]) > room:
                pieces.append([])
                room = max_tokens
            pieces[-1].append(unit)
            room -= len(unit[0])
        found = [_joined_units(piece) for piece in pieces]
        return [piece for piece in found if piece.loss_mask[1:].any()]  # nothing predicts the first token

    def encode_prompt(
        self, messages: Sequence[Message], max_tokens: int | None = None, *, place: str = ""
    ) -> npt.NDArray[np.int32]:
        """Encodes a prompt, int32 (T,), up to where the completion begins. Arguments and errors as in `encode`."""
        return self.encode_prompt_with_images(messages, max_tokens, place=place).tokens

    def encode_prompt_with_images(
        self, messages: Sequence[Message], max_tokens: int | None = None, *, place: str = ""
    ) -> EncodedConversation:
        """`encode_prompt`, with the images of the messages that are kept."""
        check_images(messages, self._vision, place)
        before = self._around["assistant"][0]
        parts = [self._message(message) for message in messages]
        parts[-1] = (parts[-1][0] + before, [*parts[-1][1], *[False] * len(before)])
        return self._joined(messages, parts, max_tokens, place)

    def encode_completion(self, text: str) -> npt.NDArray[np.int32]:
        """Encodes a completion, int32 (T,), including the token that ends the turn."""
        return np.array([*self._tokenizer.encode(text).tolist(), self.end_of_turn], np.int32)

    def training_conversations(self, messages: Sequence[Message]) -> list[Sequence[Message]]:
        """Returns the conversations to `encode`, so that each token to train on is in the loss once."""
        return [messages]

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Decodes a completion to the text for the user, without end-of-turn and end-of-text tokens."""
        ids = np.asarray(tokens)
        return self._tokenizer.decode(ids[(ids != self.end_of_turn) & (ids != self._tokenizer.end_of_text)])

    def _written(self, text: str) -> list[int]:
        """Tokenises a part of a format."""
        ids: list[int] = []
        for part in re.split(f"({_SPECIAL.pattern})", text):
            ids += [self._ids[part]] if _SPECIAL.fullmatch(part) else self._tokenizer.encode(part).tolist()
        return ids

    def _message(self, message: Message) -> tuple[list[int], list[bool]]:
        before, after = self._around[message.role]
        content = self._content(message)
        is_answer = message.role == "assistant"
        loss_mask = [False] * len(before) + [is_answer] * (len(content) + 1) + [False] * (len(after) - 1)
        return before + content + after, loss_mask[: len(before) + len(content) + len(after)]

    def _content(self, message: Message) -> list[int]:
        if self.image_token is None or not message.images:
            return self._tokenizer.encode(message.content).tolist()
        first, *others = (self._tokenizer.encode(text).tolist() for text in message.content.split(IMAGE))
        image = [self.image_token] * self._vision.tokens_per_image
        return [*first, *(token for text in others for token in (*image, *text))]

    def _joined(
        self,
        messages: Sequence[Message],
        parts: list[tuple[list[int], list[bool]]],
        max_tokens: int | None,
        place: str,
    ) -> EncodedConversation:
        kept = 1 if messages and messages[0].role == "system" else 0
        head, turns = parts[:kept], parts[kept:]
        rest = list(messages[kept:])
        need = len(self._start) + sum(len(tokens) for tokens, _ in parts)
        while max_tokens is not None and need > max_tokens:
            if len(turns) <= 2:
                raise TooLongError.of(need, max_tokens, place)
            need -= sum(len(tokens) for tokens, _ in turns[:2])
            turns, rest = turns[2:], rest[2:]
        tokens = [*self._start, *(token for part, _ in (*head, *turns) for token in part)]
        loss_mask = [*[False] * len(self._start), *(flag for _, part in (*head, *turns) for flag in part)]
        images = tuple(image for message in rest for image in message.images)
        return EncodedConversation(np.array(tokens, np.int32), np.array(loss_mask, bool), images)


def _joined_units(units: Sequence[_Unit]) -> EncodedConversation:
    tokens = np.array([token for unit, _, _ in units for token in unit], np.int32)
    loss_mask = np.array([in_loss for unit, in_loss, _ in units for _ in unit], bool)
    return EncodedConversation(tokens, loss_mask, tuple(image for _, _, images in units for image in images))


def check_images(messages: Sequence[Message], vision: VisionConfig, place: str) -> None:
    """Raises UserError for images that the model cannot read, and for an `<image>` without an image."""
    before = f"{place}: " if place else ""
    for message in messages:
        if message.images and vision.encoder == "none":
            raise UserError(
                f"{before}there is an image, but this model reads text alone: train one with model.vision.encoder"
            )
        if vision.encoder != "none" and message.content.count(IMAGE) != len(message.images):
            raise UserError(
                f"{before}a message of role {message.role} has {message.content.count(IMAGE)} {IMAGE} for "
                f"{len(message.images)} images: they must be equally many"
            )


def chat_format(chat: ChatConfig, tokenizer: Tokenizer, vision: VisionConfig = TEXT_ALONE) -> ChatFormat:
    """Returns the format that a config describes; raises UserError as `Template` and `ChatFormat` do."""
    if chat.template == "harmony":
        if vision.encoder != "none":
            raise UserError("chat.template=harmony has no images: choose another chat.template")
        from gptjax.data.harmony import HarmonyFormat  # imports this module

        return HarmonyFormat(chat, tokenizer)
    if chat.template == "custom":
        template = Template(chat.system_format, chat.user_format, chat.assistant_format)
    else:
        template = TEMPLATES[chat.template]
    return ChatFormat(template, tokenizer, vision)
