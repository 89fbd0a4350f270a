"""The harmony format of gpt-oss: conversations with channels of reasoning, tool calls and final messages as tokens.

A message is `<|start|>HEADER<|message|>CONTENT<|end|>`. The assistant writes reasoning into the channel analysis, calls
of tools and remarks about them into commentary, and what is for the user into final. A completion ends in `<|return|>`
or, after a call, in `<|call|>`. The format is described in docs/format.md of https://github.com/openai/harmony; tokens
are those of its renderer, the package openai-harmony 0.0.8.
"""

import json
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptjax.config import ChatConfig, UserError, VisionConfig
from gptjax.data.conversation_forms import Message, RequestOptions
from gptjax.data.harmony_parser import CompletionParser
from gptjax.data.harmony_schema import compact_json, declarations
from gptjax.data.templates import ChatFormat, EncodedConversation, TooLongError, check_images
from gptjax.data.tokenizers import Tokenizer

SPECIAL_TOKENS = ("<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>")


def system_text(chat: ChatConfig, options: RequestOptions) -> str:
    """Returns the content of the system message: identity, dates, reasoning effort and channels."""
    lines = [options.model_identity or chat.model_identity, f"Knowledge cutoff: {chat.knowledge_cutoff}"]
    lines += [f"Current date: {chat.current_date}"] if chat.current_date is not None else []
    channels = "# Valid channels: analysis, commentary, final. Channel must be included for every message."
    if options.tools:
        channels += "\nCalls to these tools must go to the commentary channel: 'functions'."
    effort = options.reasoning_effort or chat.reasoning_effort
    return "\n\n".join(["\n".join(lines), f"Reasoning: {effort}", channels])


def developer_text(instructions: str, options: RequestOptions) -> str:
    """Returns the content of the developer message: instructions, tools and response format; empty without any."""
    sections = ["# Instructions", instructions] if instructions else []
    if options.tools:
        sections += ["# Tools", f"## functions\n\n{declarations('functions', json.loads(options.tools))}"]
    if options.response_format:
        form = json.loads(options.response_format)
        comment = "".join(f"// {line}\n" for line in form["description"].splitlines())
        sections += ["# Response Formats", f"## {form['name']}\n\n{comment}{compact_json(form['schema'])}"]
    return "\n\n".join(sections)


def shown_messages(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages that the model reads: without the analysis before the last final message of earlier turns.

    The analysis of the last turn, which follows the last message of the user, remains: it is part of an unfinished loop
    of tool calls, or is trained on. Given several turns at once, openai-harmony 0.0.8 leaves out only what comes before
    the first final message, and nothing if the last turn is unfinished; the specification has no such exceptions.
    """
    asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=0)
    finals = [i for i, message in enumerate(messages[:asked]) if message.is_final]
    cut = finals[-1] if finals else -1
    return [message for i, message in enumerate(messages) if i > cut or message.channel != "analysis"]


class HarmonyFormat(ChatFormat):
    """Encodes conversations in the harmony format.

    Content never becomes a special token. A system message is written as instructions in the developer message, as
    OpenAI's API does; the system message of the format comes from the config and the request options. A sequence has no
    token before its first message. Special tokens that the tokenizer lacks are appended to its vocabulary.

    Attributes:
      config: the settings of the format.
      vocab_size, special_tokens, end_of_turn, end_tokens: as in `ChatFormat`.

    Raises:
      UserError: the tokenizer has some of the special tokens, but not all.
    """

    def __init__(self, chat: ChatConfig, tokenizer: Tokenizer) -> None:
        self.config, self._tokenizer, self._vision, self.image_token = chat, tokenizer, VisionConfig(), None
        own = {name: token for name in SPECIAL_TOKENS if (token := tokenizer.id_of(name)) is not None}
        missing = [name for name in SPECIAL_TOKENS if name not in own]
        if own and missing:
            raise UserError(
                f"the tokenizer has {next(iter(own))}, but not {missing[0]} of chat.template=harmony: use "
                "o200k_harmony, or a tokenizer with all or none of its special tokens"
            )
        self.special_tokens = {name: tokenizer.vocab_size + i for i, name in enumerate(missing)}
        self.vocab_size = tokenizer.vocab_size + len(missing)
        self._ids = own | self.special_tokens
        self.end_of_turn = self._ids["<|return|>"]
        self.end_tokens = (self.end_of_turn, self._ids["<|call|>"])

    def training_conversations(self, messages: Sequence[Message]) -> list[Sequence[Message]]:
        """Returns a conversation for each turn of the assistant: it and what comes before it.

        `encode` has only the last turn in the loss, as the earlier ones lack their analysis. With chat.loss_mask=final
        without turns that do not end in a final message.
        """
        starts = [i for i, message in enumerate(messages) if message.role == "user"]
        prefixes = [messages[:end] for end in (*starts[1:], len(messages))]
        needs_final = self.config.loss_mask == "final"
        return [p for p in prefixes if p and p[-1].role == "assistant" and (p[-1].is_final or not needs_final)]

    def encode(
        self, messages: Sequence[Message], max_tokens: int | None = None, *, place: str = ""
    ) -> EncodedConversation:
        """Encodes a conversation, with the assistant's messages of the last turn in the loss.

        The loss covers what the assistant writes, headers included, and not the results of tools; with
        chat.loss_mask=final the content of the final message and the token that ends it.

        Args and Raises: as in `ChatFormat.encode`. Longer conversations lose their oldest turns.
        """
        check_images(messages, self._vision, place)
        shown = shown_messages(messages)
        asked = max((i for i, message in enumerate(shown) if message.role == "user"), default=0)
        parts = []
        for i, message in enumerate(shown):
            is_last = i == len(shown) - 1
            part = self._encoded(message, "<|return|>" if is_last and message.is_final else None)
            loss_mask = [i > asked and message.role == "assistant"] * sum(map(len, part))
            if i > asked and self.config.loss_mask == "final":
                loss_mask = [False] * (len(part[0]) + len(part[1])) + [message.is_final] * len(part[2])
            elif not _continues(shown[i - 1]):
                loss_mask[: len(part[0])] = [False] * len(part[0])
            parts.append(([token for tokens in part for token in tokens], loss_mask))
        return self._fitted(shown, parts, max_tokens, place)

    def encode_prompt(
        self, messages: Sequence[Message], max_tokens: int | None = None, *, place: str = ""
    ) -> npt.NDArray[np.int32]:
        """Encodes a prompt, int32 (T,), up to `<|start|>assistant`. Arguments and errors as in `encode`."""
        return self.encode_prompt_with_images(messages, max_tokens, place=place).tokens

    def encode_prompt_with_images(
        self, messages: Sequence[Message], max_tokens: int | None = None, *, place: str = ""
    ) -> EncodedConversation:
        """`encode_prompt`; the format has no images, and messages with some are refused."""
        check_images(messages, self._vision, place)
        shown = shown_messages(messages)
        parts = [[token for tokens in self._encoded(message) for token in tokens] for message in shown]
        parts[-1] += self._begin("assistant")
        return self._fitted(shown, [(part, [False] * len(part)) for part in parts], max_tokens, place)

    def encode_completion(self, text: str) -> npt.NDArray[np.int32]:
        """Encodes a completion without analysis, int32 (T,): the header of a final message, it, and `<|return|>`."""
        _, header, content = self._encoded(Message("assistant", text, "final"), "<|return|>")
        return np.array(header + content, np.int32)

    def decode(self, tokens: npt.ArrayLike) -> str:
        """Decodes the final message of a completion; empty if it has none."""
        return final_text(self.parse(tokens))

    def parse(self, tokens: npt.ArrayLike) -> list[Message]:
        """Parses a completion, with or without the token that ended it, into the assistant's messages."""
        parser = self.parser()
        for token in np.asarray(tokens).tolist():
            parser.push(token)
        parser.finish()
        return assistants(parser.messages)

    def parser(self) -> CompletionParser:
        """Returns a parser of a completion."""
        return CompletionParser(self._ids, self._tokenizer)

    def id_of(self, name: str) -> int:
        """Returns the id of a special token of the format."""
        return self._ids[name]

    # --- tokens -------------------------------------------------------------------------------------------------------

    def _text(self, text: str) -> list[int]:
        return self._tokenizer.encode(text).tolist()

    def _begin(self, role: str) -> list[int]:
        return [self._ids["<|start|>"], *self._text(role)]

    def _encoded(self, message: Message, end: str | None = None) -> tuple[list[int], list[int], list[int]]:
        """Encodes a message, in three parts: start and role; the rest of the header; content and end.

        Args:
          end: name of the token that ends it; None: `<|call|>` or `<|end|>`.
        """
        if message.role == "system":
            options = message.options or RequestOptions()
            texts = {"system": system_text(self.config, options), "developer": developer_text(message.content, options)}
            tokens = [
                [*self._begin(role), self._ids["<|message|>"], *self._text(text), self._ids["<|end|>"]]
                for role, text in texts.items()
                if text
            ]
            return [token for part in tokens for token in part], [], []
        is_assistant = message.role == "assistant"
        start = self._begin(message.name or "tool" if message.role == "tool" else message.role)
        if message.name is not None and message.role != "tool":
            start += self._text(f":{message.name}")
        header: list[int] = []
        if message.recipient is not None:
            header += self._text(f" to={message.recipient}")
        channel = message.channel or ("final" if is_assistant else None)
        if channel is not None:
            header += [self._ids["<|channel|>"], *self._text(channel)]
        if message.content_type is not None:
            constrained = message.content_type.startswith("<|constrain|>")
            rest = message.content_type.removeprefix("<|constrain|>")
            header += [*self._text(" "), self._ids["<|constrain|>"]] if constrained else []
            header += self._text(rest if constrained else f" {rest}")
        header.append(self._ids["<|message|>"])
        last = self._ids[end or ("<|call|>" if message.is_call else "<|end|>")]
        return start, header, [*self._text(message.content), last]

    def _fitted(
        self,
        messages: Sequence[Message],
        parts: list[tuple[list[int], list[bool]]],
        max_tokens: int | None,
        place: str,
    ) -> EncodedConversation:
        """Joins the parts of messages, without the oldest turns if they exceed `max_tokens`."""
        if not messages or messages[0].role != "system":
            tokens = self._encoded(Message("system", ""))[0]
            head, messages = (tokens, [False] * len(tokens)), [Message("system", ""), *messages]
            parts = [head, *parts]
        starts = [i for i, message in enumerate(messages) if message.role == "user"] or [1]
        lengths = [len(tokens) for tokens, _ in parts]
        first = starts[0]
        for first in starts:
            need = lengths[0] + sum(lengths[first:])
            if max_tokens is None or need <= max_tokens:
                break
        else:
            raise TooLongError.of(need, max_tokens or 0, place)
        kept = [parts[0], *parts[first:]]
        return EncodedConversation(
            np.array([token for tokens, _ in kept for token in tokens], np.int32),
            np.array([flag for _, flags in kept for flag in flags], bool),
        )


def assistants(messages: Sequence[Message]) -> list[Message]:
    """Returns the messages before the first one that is not the assistant's, which a model should not write."""
    others = [i for i, message in enumerate(messages) if message.role != "assistant"]
    return list(messages[: others[0]] if others else messages)


def final_text(messages: Sequence[Message]) -> str:
    """Returns the text for the user among the assistant's messages of a turn."""
    return "".join(message.content for message in messages if message.is_final)


def _continues(message: Message) -> bool:
    """Whether the assistant writes the next message in the same completion."""
    return message.role == "assistant" and not message.is_call
