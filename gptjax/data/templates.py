"""Chat templates: encode conversations as tokens, with a loss mask over the assistant's completions."""

import dataclasses
import re
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptjax.config import ChatConfig, UserError
from gptjax.data.conversations import Message
from gptjax.data.tokenizers import END_OF_TEXT, Tokenizer

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
    "chatml": Template(*(f"<|im_start|>{role}\n{{content}}<|im_end|>\n" for role in ("system", "user", "assistant"))),
}


@dataclasses.dataclass(frozen=True)
class EncodedConversation:
    """A tokenised conversation.

    Attributes:
      tokens: int32 (T,).
      loss_mask: bool (T,): True for the tokens of completions, including the token that ends the turn.
    """

    tokens: npt.NDArray[np.int32]
    loss_mask: npt.NDArray[np.bool_]

    def __len__(self) -> int:
        return len(self.tokens)


def with_completion(prompt: npt.NDArray[np.int32], completion: npt.NDArray[np.int32]) -> EncodedConversation:
    """Concatenates a prompt and its completion; all tokens of the completion contribute to the loss."""
    tokens = np.concatenate([prompt, completion])
    return EncodedConversation(tokens, np.arange(len(tokens)) >= len(prompt))


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

    Attributes:
      template: the template.
      vocab_size: size of the tokenizer's vocabulary with the special tokens of the template.
      special_tokens: ids of the special tokens appended to the vocabulary, by name.
      end_of_turn: id of the token that ends an assistant's turn.
      end_tokens: ids of all tokens that end a completion, `end_of_turn` first.

    Raises:
      UserError: the template has <|endoftext|>, but the tokenizer has no such token.
    """

    def __init__(self, template: Template, tokenizer: Tokenizer) -> None:
        self.template, self._tokenizer = template, tokenizer
        self.special_tokens = {name: tokenizer.vocab_size + i for i, name in enumerate(template.special_tokens)}
        self._ids = dict(self.special_tokens)
        if tokenizer.end_of_text is not None:
            self._ids[END_OF_TEXT] = tokenizer.end_of_text
        elif END_OF_TEXT in template.system + template.user + template.assistant:
            raise UserError(
                f"the chat template has {END_OF_TEXT}, but this tokenizer does not: choose another template"
            )
        self.vocab_size = tokenizer.vocab_size + len(template.special_tokens)
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
        parts = [self._message(message) for message in messages]
        if messages and messages[-1].role == "assistant":
            tokens, loss_mask = parts[-1]
            stop = len(tokens) - len(self._around["assistant"][1]) + 1
            parts[-1] = (tokens[:stop], loss_mask[:stop])
        return self._joined(messages, parts, max_tokens, place)

    def encode_prompt(
        self, messages: Sequence[Message], max_tokens: int | None = None, *, place: str = ""
    ) -> npt.NDArray[np.int32]:
        """Encodes a prompt, int32 (T,), up to where the completion begins. Arguments and errors as in `encode`."""
        before = self._around["assistant"][0]
        parts = [self._message(message) for message in messages]
        parts[-1] = (parts[-1][0] + before, [*parts[-1][1], *[False] * len(before)])
        return self._joined(messages, parts, max_tokens, place).tokens

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
        content = self._tokenizer.encode(message.content).tolist()
        is_answer = message.role == "assistant"
        loss_mask = [False] * len(before) + [is_answer] * (len(content) + 1) + [False] * (len(after) - 1)
        return before + content + after, loss_mask[: len(before) + len(content) + len(after)]

    def _joined(
        self,
        messages: Sequence[Message],
        parts: list[tuple[list[int], list[bool]]],
        max_tokens: int | None,
        place: str,
    ) -> EncodedConversation:
        kept = 1 if messages and messages[0].role == "system" else 0
        head, turns = parts[:kept], parts[kept:]
        need = len(self._start) + sum(len(tokens) for tokens, _ in parts)
        while max_tokens is not None and need > max_tokens:
            if len(turns) <= 2:
                raise TooLongError.of(need, max_tokens, place)
            need -= sum(len(tokens) for tokens, _ in turns[:2])
            turns = turns[2:]
        tokens = [*self._start, *(token for part, _ in (*head, *turns) for token in part)]
        loss_mask = [*[False] * len(self._start), *(flag for _, part in (*head, *turns) for flag in part)]
        return EncodedConversation(np.array(tokens, np.int32), np.array(loss_mask, bool))


def chat_format(chat: ChatConfig, tokenizer: Tokenizer) -> ChatFormat:
    """Returns the format that a config describes; raises UserError as `Template` and `ChatFormat` do."""
    if chat.template == "harmony":
        from gptjax.data.harmony import HarmonyFormat  # imports this module

        return HarmonyFormat(chat, tokenizer)
    if chat.template == "custom":
        template = Template(chat.system_format, chat.user_format, chat.assistant_format)
    else:
        template = TEMPLATES[chat.template]
    return ChatFormat(template, tokenizer)
