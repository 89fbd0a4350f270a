"""Log-probabilities of tokens, in the forms of chat completions and of completions."""

from collections.abc import Sequence
from typing import Any

from gptjax.inference.requests import SampledToken
from gptjax.serving.served_models import GenerativeModel

LEAST_LOGPROB = -9999.0  # JSON has no infinity


def chat_logprobs(model: GenerativeModel, tokens: Sequence[SampledToken], top: int) -> list[dict[str, Any]]:
    """Returns the entries of a chat completion's tokens, each with the `top` most probable tokens in its place."""
    entries = []
    for sampled in tokens:
        likeliest = [_entry(model, token, logprob) for token, logprob in sampled.top[:top]]
        entries.append({**_entry(model, sampled.token, sampled.logprob), "top_logprobs": likeliest})
    return entries


def _entry(model: GenerativeModel, token: int, logprob: float) -> dict[str, Any]:
    piece = model.piece(token)
    text = piece.decode(errors="replace")
    return {"token": text, "bytes": list(piece), "logprob": max(logprob, LEAST_LOGPROB)}


class TextLogprobs:
    """Log-probabilities of a completion, as lists over its tokens.

    Args:
      top: number of most probable tokens that are reported in each place; the token itself is reported too.
      offset: characters before the first token.
    """

    def __init__(self, model: GenerativeModel, top: int, offset: int = 0) -> None:
        self._model, self._top, self._offset = model, top, offset
        self.clear()

    def clear(self) -> None:
        """Removes the tokens, and keeps the offset."""
        self._tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._likeliest: list[dict[str, float] | None] = []
        self._offsets: list[int] = []

    def add(self, token: int, logprob: float | None, top: Sequence[tuple[int, float]]) -> None:
        """Appends a token; `logprob` is None for the first token of a prompt, which nothing precedes."""
        name, piece = self._name(token), self._model.piece(token)
        self._tokens.append(name)
        self._offsets.append(self._offset)
        # A byte that continues a character of UTF-8 adds none to the text.
        self._offset += sum(byte & 0xC0 != 0x80 for byte in piece)
        self._logprobs.append(None if logprob is None else max(logprob, LEAST_LOGPROB))
        if logprob is None or self._top == 0:
            self._likeliest.append(None)
            return
        found = {self._name(other): max(value, LEAST_LOGPROB) for other, value in reversed(top[: self._top])}
        self._likeliest.append({**found, name: max(logprob, LEAST_LOGPROB)})

    def as_json(self) -> dict[str, Any]:
        """Returns the lists by name."""
        return {
            "tokens": self._tokens,
            "token_logprobs": self._logprobs,
            "top_logprobs": self._likeliest if self._top else None,
            "text_offset": self._offsets,
        }

    def _name(self, token: int) -> str:
        """The token's text; its bytes where they are no whole characters, so that no two tokens share a name."""
        piece = self._model.piece(token)
        if not piece:
            return f"token_id:{token}"
        try:
            return piece.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in piece)
