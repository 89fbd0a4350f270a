"""Reads a completion token by token: what is content, what is reasoning, and what calls a tool."""

import abc
import dataclasses
import json
import re
from collections.abc import Sequence
from typing import Literal

import numpy.typing as npt

from gptjax.data.conversation_forms import Message
from gptjax.data.harmony import HarmonyFormat
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.text_stream import TextStream
from gptjax.serving.grammars import CALL_BEGINS, CALL_ENDS

_HEAD = re.compile(r'\s*\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')


@dataclasses.dataclass(frozen=True)
class Delta:
    """A piece of a completion.

    Attributes:
      kind: "content", "reasoning", "call" (a call begins; `text` is the function's name) or "arguments" (of the call).
      index: of the call, from 0.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    index: int = 0


class CompletionReader(abc.ABC):
    """Incremental reader of one completion.

    Attributes:
      stopped: whether a stop string occurred: tokens from here on are not part of the completion.
      is_content: whether the last token is part of the content, which log-probabilities are reported for.
      is_reasoning: whether it is part of the reasoning.
      calls: number of calls so far.
    """

    stopped = False
    is_content = True
    is_reasoning = False
    calls = 0

    @abc.abstractmethod
    def push(self, token: int) -> list[Delta]:
        """Appends a token other than an end token; returns the pieces that later tokens cannot change."""

    @abc.abstractmethod
    def finish(self) -> list[Delta]:
        """Returns what was held back; to be called after the last token."""


class TextReader(CompletionReader):
    """Reads a completion that is content only.

    Args:
      stop: texts that end the completion.
      prompt: tokens that the completion continues; empty: it is a separate text.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str], prompt: npt.ArrayLike = ()) -> None:
        self._stream = TextStream(tokenizer, stop, prompt)

    def push(self, token: int) -> list[Delta]:
        text = self._stream.push(token)
        self.stopped = self._stream.stopped
        return [Delta("content", text)] if text else []

    def finish(self) -> list[Delta]:
        text = self._stream.flush()
        self.stopped = self._stream.stopped
        return [Delta("content", text)] if text else []


class CallTextReader(CompletionReader):
    """Reads a completion that may have calls in the text form of `grammars`."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._stream = TextStream(tokenizer, stop)
        self._held = ""
        self._inside: Literal["text", "head", "arguments"] = "text"

    def push(self, token: int) -> list[Delta]:
        self._held += self._stream.push(token)
        self.stopped = self._stream.stopped
        deltas = self._read()
        self.is_content = self._inside == "text"
        return deltas

    def finish(self) -> list[Delta]:
        self._held += self._stream.flush()
        self.stopped = self._stream.stopped
        deltas = self._read()
        if self._inside == "head":  # the completion ended before the arguments
            self._held = CALL_BEGINS + self._held
        if self._inside == "arguments" and self._held.startswith(CALL_ENDS[:2]):  # in the middle of the end
            self._held = ""
        if self._held and not (self.calls and self._inside == "text" and self._held.isspace()):
            rest = Delta("arguments", self._held, self.calls - 1)
            deltas.append(rest if self._inside == "arguments" else Delta("content", self._held))
        return deltas

    def _read(self) -> list[Delta]:
        deltas: list[Delta] = []
        while True:
            if self._inside == "head":
                match = _HEAD.match(self._held)
                if match is None:
                    return deltas
                deltas.append(Delta("call", json.loads(match[1]), self.calls))
                self._held, self._inside, self.calls = self._held[match.end() :], "arguments", self.calls + 1
            elif self._inside == "text":
                text, found = self._until(CALL_BEGINS)
                if self.calls and not text.strip():  # the newline between two calls
                    text = ""
                deltas += [Delta("content", text)] if text else []
                if not found:
                    return deltas
                self._inside = "head"
            else:
                text, found = self._until(CALL_ENDS)
                deltas += [Delta("arguments", text, self.calls - 1)] if text else []
                if not found:
                    return deltas
                self._inside = "text"

    def _until(self, marker: str) -> tuple[str, bool]:
        """Takes the held text up to a marker, or up to what may begin one; and whether the marker was found."""
        text, found, rest = self._held.partition(marker)
        if found:
            self._held = rest
            return text, True
        length = next(n for n in range(min(len(text), len(marker)), -1, -1) if text.endswith(marker[:n]))
        self._held = text[len(text) - length :]
        return text[: len(text) - length], False


class HarmonyReader(CompletionReader):
    """Reads a completion in the harmony format; stop strings end it in the channels that are content."""

    def __init__(self, form: HarmonyFormat, tokenizer: Tokenizer, stop: Sequence[str]) -> None:
        self._parser, self._tokenizer, self._stop = form.parser(), tokenizer, tuple(stop)
        self._header: Message | None = None
        self._stream = TextStream(tokenizer)
        self._num_read = 0  # messages that are complete

    def push(self, token: int) -> list[Delta]:
        before = len(self._parser.content)
        self._parser.push(token)
        deltas = self._read()
        kind = self._kind(self._header) if len(self._parser.content) > before else "arguments"
        self.is_content, self.is_reasoning = kind == "content", kind == "reasoning"
        return deltas

    def finish(self) -> list[Delta]:
        self._parser.finish()
        return self._read()

    def _read(self) -> list[Delta]:
        if self.stopped:
            return []
        parser, deltas = self._parser, list[Delta]()
        if parser.header is not self._header or (parser.header is None and len(parser.messages) > self._num_read):
            if self._header is not None:
                deltas += self._pieces(self._stream.flush())
                self._header = None
            else:
                malformed = parser.messages[self._num_read :]  # without <|message|>: the text is the content
                deltas += [Delta("content", message.content) for message in malformed if message.role == "assistant"]
            if parser.header is not None:
                deltas += self._begin(parser.header)
        self._num_read = len(parser.messages)
        if self._header is not None and not self.stopped:
            for token in parser.content[len(self._stream.tokens) :]:
                deltas += self._pieces(self._stream.push(token))
        self.stopped = self.stopped or self._stream.stopped
        return deltas

    def _begin(self, header: Message) -> list[Delta]:
        if header.role != "assistant":  # a model should not write the messages of others
            self.stopped = True
            return []
        self._header = header
        self._stream = TextStream(self._tokenizer, self._stop if self._kind(header) == "content" else ())
        if not header.is_call:
            return []
        self.calls += 1
        return [Delta("call", str(header.recipient).removeprefix("functions."), self.calls - 1)]

    def _pieces(self, text: str) -> list[Delta]:
        if not text:
            return []
        kind = self._kind(self._header)
        return [Delta(kind, text, self.calls - 1 if kind == "arguments" else 0)]

    def _kind(self, header: Message | None) -> Literal["content", "reasoning", "arguments"]:
        if header is None or header.is_call:
            return "arguments"
        return "reasoning" if header.channel == "analysis" else "content"
