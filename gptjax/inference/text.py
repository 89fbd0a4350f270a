"""From sampled tokens to text while they come: whole characters only, and nothing of a stop string."""

from collections.abc import Sequence

from gptjax.config import UserError
from gptjax.data.tokenizers import Tokenizer


class TextStream:
    """The text of one completion, token by token.

    Attributes:
      tokens: taken so far.
      text: what `push` has returned so far, joined.
      stopped: a stop string came; `text` ends before it. Of several, the one that is complete first counts, however
        the text is cut into tokens.

    Raises:
      UserError: an empty stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        if "" in stop:
            raise UserError("a stop string is empty, and would stop every text before it starts")
        self._tokenizer = tokenizer
        self._stop = tuple(stop)
        self.tokens: list[int] = []
        self.text = ""
        self.stopped = False

    def push(self, token: int, decode: bool = True) -> str:
        """Takes one token; returns the text that is certain now, often empty, never to be taken back.

        Held back are the bytes of a character that is not complete, and an end that a stop string may begin with.
        Without `decode` all text is held back.
        """
        self.tokens.append(token)
        if not decode:
            return ""
        text = self._tokenizer.decode(self.tokens)
        return self._emit(text.rstrip("\ufffd"), last=False)

    def flush(self) -> str:
        """The text held back so far; nothing comes after it."""
        return self._emit(self._tokenizer.decode(self.tokens), last=True)

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


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next(length for length in range(min(len(text), len(stop)), -1, -1) if text.endswith(stop[:length]))
