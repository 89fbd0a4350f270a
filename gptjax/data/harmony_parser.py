"""Parses a completion in the harmony format into messages, token by token.

The grammar is that of OpenAI's parser (the package openai-harmony 0.0.8). It refuses malformed completions; here they
become messages too, since an untrained model writes little else.
"""

from collections.abc import Mapping
from typing import cast, get_args

from gptjax.data.conversation_forms import Channel, Message, Role
from gptjax.data.tokenizers import Tokenizer

_ROLES: tuple[Role, ...] = ("user", "assistant", "system", "tool")


class CompletionParser:
    """Incremental parser of a completion, which begins behind `<|start|>assistant`.

    Attributes:
      messages: the messages that are complete.
      header: the message in progress, without content; None: its header is not complete.
      content: tokens of its content.
    """

    def __init__(self, ids: Mapping[str, int], tokenizer: Tokenizer) -> None:
        """Sets the ids of the special tokens, by name."""
        self._ids, self._tokenizer = ids, tokenizer
        self._names = {token: name for name, token in ids.items()}
        self._ends = {ids[name] for name in ("<|end|>", "<|return|>", "<|call|>")}
        self._in_header: list[int] = []
        self.messages: list[Message] = []
        self.header: Message | None = None
        self.content: list[int] = []

    def push(self, token: int) -> None:
        """Appends a token."""
        if token in self._ends:
            self.finish()
        elif self.header is not None:
            self.content.append(token)
        elif token == self._ids["<|message|>"]:
            self.header, self._in_header = parse_header(self._text(self._in_header)), []
        else:
            self._in_header.append(token)

    def finish(self) -> None:
        """Ends the message in progress, which may be incomplete; one without any content is left out."""
        header, text = self.header, self._text(self.content)
        if header is None:  # no <|message|> so far: the text behind the channel is the content
            header = parse_header(self._text(self._in_header), malformed=True)
            text = header.content
        if text:
            self.messages.append(Message(**{**vars(header), "content": text}))
        self.header, self._in_header, self.content = None, [], []

    def _text(self, tokens: list[int]) -> str:
        """Decodes tokens, special tokens to their names."""
        text, run = "", list[int]()
        for token in tokens:
            if token in self._names:
                text += self._tokenizer.decode(run) + self._names[token]
                run = []
            else:
                run.append(token)
        return text + self._tokenizer.decode(run)


def parse_header(text: str, *, malformed: bool = False) -> Message:
    """Parses a header: role, channel, recipient and content type.

    Args:
      text: such as "<|channel|>commentary to=functions.add <|constrain|>json", or "<|start|>assistant<|channel|>final".
      malformed: the text behind the channel is the content.

    Returns:
      The message; its content is empty unless `malformed`.
    """
    begins = text.startswith("<|start|>")
    text = text.removeprefix("<|start|>")
    before, marker, rest = text.partition("<|channel|>")
    name = ""
    if marker:
        end = next((i for i, letter in enumerate(rest) if letter.isspace() or letter == "<"), len(rest))
        name, text = rest[:end], before + rest[end:]
    channel = cast(Channel, name) if name in get_args(Channel) else None
    if malformed:
        return Message("assistant", text.strip().removeprefix("assistant").strip(), channel)
    parts = text.replace("<|constrain|>", " <|constrain|>").split()
    parts = [part for part in parts if part.startswith("<|constrain|>") or "<|" not in part]
    role: Role = "assistant"
    author = None
    if parts and parts[0] in _ROLES:
        role = cast(Role, parts.pop(0))
    elif begins and len(parts) > 1:  # a tool is named instead of its role
        role, author = "tool", parts.pop(0)
    recipient = content_type = None
    if parts and (parts[-1].startswith("<|constrain|>") or (len(parts) > 1 and not parts[-1].startswith("to="))):
        content_type = parts.pop()
    if parts:
        recipient = parts[-1].removeprefix("to=")
    return Message(role, "", channel, recipient, content_type, author)
