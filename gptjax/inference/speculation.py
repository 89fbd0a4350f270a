"""Speculative decoding: a call of the decoding program checks several proposed tokens of a request at once.

A token is sampled in the place of each proposal and after the last one, by the request's own random key and settings,
from logits that depend on the proposals before it. A proposal is accepted if it is the token that was sampled in its
place, and the first token that differs takes the place of its proposal. A completion thus consists of the tokens that
are sampled without proposals, for any sampling settings. Leviathan et al. (2023), algorithm 1, accept more proposals,
but the tokens of a seed then depend on them.

Keys and values of rejected proposals stay in the cache behind the last token, where no row looks until the tokens that
are read there overwrite them.
"""

import weakref
from typing import NamedTuple

import numpy as np

from gptjax.config import UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.batch_programs import MOST_PROPOSALS, ChunkRows
from gptjax.inference.row_sampling import History
from gptjax.inference.sequences import Run, Sequence

LONGEST_NGRAM, SHORTEST_NGRAM = 4, 2
_ITEM = np.dtype(np.int32).itemsize


class EngineShape(NamedTuple):
    """What a proposer has to know of its engine.

    Attributes:
      num_pages: pages that requests may have, numbered from 1.
      page_size: positions of a page.
      pages_of_row: pages of a text of the whole context.
    """

    tokenizer: Tokenizer
    vocab_size: int
    rows: int
    num_pages: int
    page_size: int
    pages_of_row: int


class Proposer:
    """Proposes the next tokens of requests; this base class none. Belongs to one engine, which calls its methods."""

    def page_bytes(self, page_size: int) -> int:
        """Returns the memory that a page of `page_size` positions needs here, in addition to that of the engine."""
        return 0

    def start(self, shape: EngineShape) -> None:
        """Prepares for an engine; UserError if the proposer cannot serve it."""

    def compile(self) -> None:
        """Compiles the programs of `propose`."""

    def read(self, chunks: ChunkRows) -> None:
        """Called for the chunks of prompts that the engine reads."""

    def propose(self, sequences: list[Sequence], most: list[int], history: History) -> list[list[int]]:
        """Returns for each sequence at most so many tokens that may follow its last one.

        Args:
          history: what penalties depend on; not donated.
        """
        return [[] for _ in sequences]


class NgramProposer(Proposer):
    """Proposes what followed the last n tokens where they occurred before, in the prompt or the completion.

    The longest n of LONGEST_NGRAM to SHORTEST_NGRAM that occurred counts, and its last occurrence ("prompt lookup",
    Saxena 2023).
    """

    def __init__(self) -> None:
        self._texts: weakref.WeakKeyDictionary[Sequence, bytearray] = weakref.WeakKeyDictionary()

    def propose(self, sequences: list[Sequence], most: list[int], history: History) -> list[list[int]]:
        return [
            continuation(self._text(sequence), number) if number else []
            for sequence, number in zip(sequences, most, strict=True)
        ]

    def _text(self, sequence: Sequence) -> bytearray:
        """The tokens of prompt and completion, int32."""
        text = self._texts.get(sequence)
        if text is None:
            text = self._texts[sequence] = bytearray()
        text += np.array(sequence.tokens(len(text) // _ITEM), np.int32).tobytes()
        return text


def continuation(text: bytes | bytearray, number: int) -> list[int]:
    """Returns `number` tokens that followed the last n-gram of a text where it occurred before; empty if it did not.

    Args:
      text: the tokens, int32. Where what followed ends with the text, it is repeated.
    """
    for n in range(LONGEST_NGRAM, SHORTEST_NGRAM - 1, -1):
        found = last_occurrence(text, n * _ITEM)
        if found is not None:
            tokens = np.frombuffer(bytes(text[found + n * _ITEM :]), np.int32)
            return np.resize(tokens, number).tolist()
    return []


def last_occurrence(text: bytes | bytearray, size: int) -> int | None:
    """The place of the last `size` bytes of a text where they occur before, at a multiple of an item."""
    ngram, end = text[-size:], len(text) - _ITEM
    while len(ngram) == size and (found := text.rfind(ngram, 0, end)) >= 0:
        if found % _ITEM == 0:
            return found
        end = found + size - 1
    return None


class Speculation:
    """Chooses the proposals of a call.

    Args:
      proposer: None: there are no proposals.
      tokens: the most proposals of a request in a call, 1 to MOST_PROPOSALS.
      free: rows without a request cost nothing. Otherwise a request whose proposals were rejected gets as many as were
        accepted, at least one, and twice as many when all were accepted.

    Attributes:
      proposed, accepted: numbers of tokens.

    Raises:
      UserError: `tokens` is out of range.
    """

    def __init__(self, proposer: Proposer | None, tokens: int, *, free: bool) -> None:
        if not 1 <= tokens <= MOST_PROPOSALS:
            raise UserError(f"speculative_tokens={tokens} must be in 1 to {MOST_PROPOSALS}")
        self.proposer, self.tokens = (Proposer(), 0) if proposer is None else (proposer, tokens)
        self.proposed = self.accepted = 0
        self._free = free
        self._limits: weakref.WeakKeyDictionary[Sequence, int] = weakref.WeakKeyDictionary()

    def runs(self, sequences: list[Sequence], spare: int, history: History) -> list[Run]:
        """Returns the sequences with their proposals, at most `spare` together.

        A request under a constraint gets none: what the constraint allows depends on the tokens before.
        """
        most = [min(self._limits.get(s, self.tokens), s.left - 1) for s in sequences]
        most = [0 if s.request.constraint is not None else number for s, number in zip(sequences, most, strict=True)]
        if spare < 1 or not any(most):
            return [Run(sequence) for sequence in sequences]
        proposals = self.proposer.propose(sequences, most, history)
        numbers = shares([len(tokens) for tokens in proposals], spare)
        return [Run(s, tuple(p[:number])) for s, p, number in zip(sequences, proposals, numbers, strict=True)]

    def note(self, run: Run, accepted: int) -> None:
        """Notes how many proposals of a run were accepted."""
        number = len(run.proposals)
        if number == 0:
            return
        self.proposed, self.accepted = self.proposed + number, self.accepted + accepted
        if not self._free:
            self._limits[run.sequence] = min(self.tokens, 2 * number) if accepted == number else max(1, accepted)


def shares(wanted: list[int], spare: int) -> list[int]:
    """Distributes `spare` rows: all requests get one before any gets two."""
    given = [0] * len(wanted)
    for size in range(max(wanted)):
        for i, number in enumerate(wanted):
            if size < number and spare > 0:
                given[i], spare = given[i] + 1, spare - 1
    return given
