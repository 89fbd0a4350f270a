"""Constrained decoding by llguidance: which tokens may come next under a grammar."""

import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.data.token_bytes import token_bytes
from gptjax.data.tokenizers import Tokenizer
from gptjax.serving.api_errors import ApiError, invalid


class GrammarCompiler:
    """Makes constraints for one vocabulary. Thread-safe.

    Args:
      vocab_size: of the model, at least the tokenizer's.
      specials: ids of special tokens that a grammar may name, and of tokens that end completions.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, specials: Sequence[int]) -> None:
        self._tokenizer, self._vocab_size, self._specials = tokenizer, vocab_size, tuple(specials)
        self._lock = threading.Lock()
        self._vocabulary: Any = None

    def constraint(self, grammar: str, ends: Sequence[int], param: str) -> "GrammarConstraint":
        """Compiles a grammar, which takes milliseconds; the first call takes seconds for a large vocabulary.

        Args:
          grammar: llguidance's JSON form.
          ends: tokens that end a completion.
          param: the request's parameter that gives the grammar.

        Raises:
          ApiError: 400: the grammar or schema is malformed or not supported; or no token ends a completion.
        """
        import llguidance

        if not ends:
            raise invalid("this model has no token that ends a completion, so its form cannot be constrained", param)
        with self._lock:
            if self._vocabulary is None:
                self._vocabulary = llguidance.LLTokenizer(llguidance.TokenizerWrapper(self._wrapped()))
        try:
            matcher = llguidance.LLMatcher(self._vocabulary, grammar, log_level=0)
        except (ValueError, RuntimeError) as error:
            raise invalid(f"{param} cannot be compiled: {_short(str(error))}", param) from None
        if matcher.is_error():
            raise invalid(f"{param} cannot be compiled: {_short(matcher.get_error())}", param)
        return GrammarConstraint(matcher, self._vocab_size, ends, self._specials[0])

    def _wrapped(self) -> "_Vocabulary":
        pieces = token_bytes(self._tokenizer)
        return _Vocabulary([*pieces, *[b""] * (self._vocab_size - len(pieces))], self._specials, self._tokenizer)


class _Vocabulary:
    """A vocabulary as llguidance reads it."""

    bos_token_id = None

    def __init__(self, pieces: list[bytes], specials: tuple[int, ...], tokenizer: Tokenizer) -> None:
        self.tokens = [f"<special{i}>".encode() if i in specials else piece for i, piece in enumerate(pieces)]
        self.special_token_ids = list(specials)
        self.eos_token_id = specials[0]
        self._tokenizer = tokenizer

    def __call__(self, text: bytes | str) -> list[int]:
        whole = text.decode(errors="replace") if isinstance(text, bytes) else text
        return self._tokenizer.encode(whole).tolist()


class GrammarConstraint:
    """The state of one completion under a grammar: a `TokenConstraint` of the engine.

    Attributes:
      error: why the grammar could not be followed any further, such as a limit of the parser; None: no error.
    """

    def __init__(self, matcher: Any, vocab_size: int, ends: Sequence[int], end_of_grammar: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size
        self._ends, self._end_of_grammar = list(ends), end_of_grammar
        self.error: str | None = None

    def allowed(self) -> npt.NDArray[np.bool_]:
        """Returns the tokens that may come next, bool (V,); only ends after the last one that the grammar allows."""
        bits = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed_V = np.unpackbits(bits, bitorder="little")[: self._vocab_size].astype(bool)
        if self._matcher.is_error():
            self.error = _short(self._matcher.get_error())
            allowed_V[:] = False
        allowed_V[self._end_of_grammar] = False
        allowed_V[self._ends] = self._matcher.is_accepting()
        if not allowed_V.any():
            allowed_V[self._ends] = True
        return allowed_V

    def accept(self, token: int) -> None:
        """Appends a token of the completion."""
        if token not in self._ends and not self._matcher.consume_token(token):
            self.error = _short(self._matcher.get_error())

    def check(self) -> None:
        """Raises ApiError 500 if the completion left the grammar because of a limit."""
        if self.error is not None:
            raise ApiError(500, f"the constraint of the completion failed: {self.error}")


def _short(message: str) -> str:
    lines = [line.strip() for line in message.strip().splitlines() if line.strip()]
    return " ".join(lines)[:300]
