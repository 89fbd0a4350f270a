"""Generates a completion in the harmony format, and shows its channels while they are written."""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from gptjax.data.conversations import Message
from gptjax.data.harmony import HarmonyFormat, assistants
from gptjax.data.harmony_parser import CompletionParser
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.engine import STREAMED_TOKENS, Engine
from gptjax.inference.sampling import Sampling
from gptjax.inference.text_stream import TextStream

DIM, RESET = "\x1b[2m", "\x1b[0m"  # of terminals


class ChannelDisplay:
    """Text to show of a completion: final messages and remarks, calls behind the name of their tool, analysis if asked.

    Args:
      analysis: "hide"; "show", each message on lines of its own behind "analysis: "; or "dim", the same in dim letters.
    """

    def __init__(self, tokenizer: Tokenizer, analysis: str = "hide") -> None:
        self._tokenizer, self._analysis = tokenizer, analysis
        self._header: Message | None = None
        self._stream = TextStream(tokenizer)
        self._num_shown = 0  # messages that are complete

    def push(self, parser: CompletionParser) -> str:
        """Returns the new text after the parser has read a token or has finished, often ""."""
        if parser.header is None:
            has_header, text = self._header is not None, self._flush()
            malformed = [] if has_header else parser.messages[self._num_shown :]
            self._num_shown = len(parser.messages)
            return text + "".join(message.content for message in malformed if self._is_shown(message))
        text = ""
        if parser.header is not self._header:
            self._header, self._stream = parser.header, TextStream(self._tokenizer)
            text = self._begin(parser.header)
        content = parser.content[len(self._stream.tokens) :]
        pieces = [self._stream.push(token) for token in content]
        return text + "".join(pieces) if self._is_shown(self._header) else ""

    def _flush(self) -> str:
        """Returns the rest of the message in progress."""
        if self._header is None:
            return ""
        header, text = self._header, self._stream.flush()
        self._header = None
        if not self._is_shown(header):
            return ""
        if header.is_final:
            return text
        return text + (RESET if header.channel == "analysis" and self._analysis == "dim" else "") + "\n"

    def _is_shown(self, header: Message) -> bool:
        return header.role == "assistant" and (header.channel != "analysis" or self._analysis != "hide")

    def _begin(self, header: Message) -> str:
        if header.is_call:
            return f"{header.recipient} "
        if header.channel == "analysis":
            return (DIM if self._analysis == "dim" else "") + "analysis: "
        return ""


def generate(
    engine: Engine,
    form: HarmonyFormat,
    prompt: npt.NDArray[np.int32],
    max_new_tokens: int,
    sampling: Sampling,
    *,
    seed: int,
    analysis: str = "hide",
    on_text: Callable[[str], None] = lambda _: None,
) -> list[Message]:
    """Generates the messages of one completion.

    Args:
      prompt: int32 (T,), up to `<|start|>assistant`.
      analysis: as in `ChannelDisplay`.
      on_text: called after each token with the new text to show, often "".

    Returns:
      The assistant's messages; the last may be a call, or unfinished after `max_new_tokens`.
    """
    parser, display = form.parser(), ChannelDisplay(engine.tokenizer, analysis)
    ends = list(dict.fromkeys([*form.end_tokens, *engine.tokenizer.ends]))
    sampled = engine.stream([prompt], max_new_tokens, sampling, seeds=[seed], ends=ends, at_once=STREAMED_TOKENS)
    for tokens_B, _ in sampled:
        if (token := int(tokens_B[0])) in ends:
            break
        parser.push(token)
        on_text(display.push(parser))
    parser.finish()
    on_text(display.push(parser))
    return assistants(parser.messages)
