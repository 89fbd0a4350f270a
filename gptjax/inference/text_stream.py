"""Incremental detokenisation: sampled tokens to text, in whole characters and without stop strings."""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.data.tokenizers import Tokenizer

# Tokens of the prompt that are decoded together with a completion. A decoder depends on the bytes of a character or on
# the pieces of a word before a token, so a few tokens give the same text as the whole prompt.
CONTEXT_TOKENS = 32


class TextStream:
    """Incremental decoder of one completion.

    The text of a completion is decode(prompt + tokens) without decode(prompt): a tokenizer that marks where words
    begin or end (GPT-1's, SentencePiece's) decodes the tokens alone without the blank between prompt and completion.

    Args:
      stop: strings that end the text. If several occur, the one that is complete first counts, however the text is
        split into tokens.
      prompt: token ids that the completion continues; only those after the last end-of-text are used. Empty: the
        completion is a separate text, such as a turn of a conversation.

    Attributes:
      tokens: ids pushed so far.
      text: concatenation of the results of `push` and `flush`.
      stopped: whether a stop string occurred; `text` ends before it.

    Raises:
      UserError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = (), prompt: npt.ArrayLike = ()) -> None:
        if "" in stop:
            raise UserError("a stop string is empty, which would end every completion at once: give it some text")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self._context = _context(tokenizer, prompt)
        self._context_text = tokenizer.decode(self._context) if self._context else ""
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, token: int, decode: bool = True) -> str:
        """Appends one token and returns the new text that later tokens cannot change, often "".

        Bytes of an incomplete character, and a suffix that may begin a stop string, are held back. With decode=False
        all text is held back.
        """
        self.tokens.append(token)
        if not decode:
            return ""
        return self._emit(self._decode(complete=True), last=False)

    def flush(self) -> str:
        """Returns the text held back so far; to be called after the last token."""
        return self._emit(self._decode(complete=False), last=True)

    def _decode(self, complete: bool) -> str:
        """Returns the text of all tokens so far; with `complete`, without an incomplete character at its end."""
        whole = self._tokenizer.decode([*self._context, *self.tokens])
        start = len(self._context_text)
        if not whole.startswith(self._context_text):  # the first token completes a character of the prompt
            both = zip(whole, self._context_text, strict=False)
            start = next((i for i, (one, other) in enumerate(both) if one != other), len(whole))
        return (whole.rstrip("\ufffd") if complete else whole)[start:]

    def _emit(self, text: str, last: bool) -> str:
        if self.stopped:
            return ""
        found = [(at + len(stop), at) for stop in self._stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            text = text[: min(found)[1]]
        elif not last:
            text = text[: len(text) - max((_overlap(text, stop) for stop in self._stop), default=0)]
        new = text[len(self.text) :]
        self.text += new
        return new


def _context(tokenizer: Tokenizer, prompt: npt.ArrayLike) -> list[int]:
    """Returns the last tokens of a prompt's last document."""
    ids = np.asarray(prompt, np.int64).ravel()[-CONTEXT_TOKENS:]
    ends = np.flatnonzero(ids == tokenizer.end_of_text) if tokenizer.end_of_text is not None else ids[:0]
    return ids[ends[-1] + 1 if len(ends) else 0 :].tolist()


def _overlap(text: str, stop: str) -> int:
    """Returns the length of the longest suffix of `text` that is a prefix of `stop`."""
    return next(length for length in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:length]))
