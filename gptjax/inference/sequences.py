"""Requests in progress, and the arguments of the decoding program for a batch of them."""

import dataclasses
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from gptjax.inference.batch_programs import Rows
from gptjax.inference.page_pool import Digest
from gptjax.inference.requests import MOST_ENDS, GenerationRequest, TopLogprobs
from gptjax.inference.row_sampling import row_settings
from gptjax.inference.sampling import Sampling

UNUSED = (Sampling(temperature=0), 0)  # sampling settings and seed of an unused row


@dataclasses.dataclass(eq=False)
class Sequence:
    """A request in the engine.

    Attributes:
      digests: hashes of the whole pages of the prompt.
      slot: row of the history.
      pages: pages of the cache, in the order of the positions.
      read: tokens whose keys and values are in the cache.
    """

    number: int
    request: GenerationRequest
    digests: list[Digest]
    slot: int = -1
    pages: list[int] = dataclasses.field(default_factory=list)
    read: int = 0
    sampled: list[int] = dataclasses.field(default_factory=list)
    prompt_logprobs: list[float] = dataclasses.field(default_factory=list)
    prompt_top: list[TopLogprobs] = dataclasses.field(default_factory=list)

    @property
    def last_token(self) -> int:
        return self.sampled[-1] if self.sampled else self.request.tokens[-1]

    @property
    def position(self) -> int:
        """The position of the last token, which is read next."""
        return len(self.request.tokens) + len(self.sampled) - 1

    @property
    def left(self) -> int:
        return self.request.max_new_tokens - len(self.sampled)


def page_table(sequences: list[Sequence], rows: int, pages_of_row: int) -> npt.NDArray[np.int32]:
    """The pages of the sequences, (rows, pages_of_row); 0 where there is none."""
    table_BN = np.zeros((rows, pages_of_row), np.int32)
    for row, sequence in enumerate(sequences):
        table_BN[row, : len(sequence.pages)] = sequence.pages
    return table_BN


def row_arguments(sequences: list[Sequence], rows: int, pages_of_row: int, adapters: Mapping[str | None, int]) -> Rows:
    """The rows of a call of the decoding program; those beyond the sequences are unused."""

    def column(values: list[int]) -> npt.NDArray[np.int32]:
        return np.array(values + [0] * (rows - len(values)), np.int32)

    ends_BN = np.full((rows, MOST_ENDS), -1, np.int32)
    for row, sequence in enumerate(sequences):
        ends_BN[row, : len(sequence.request.end_tokens)] = sequence.request.end_tokens
    settings = [(s.request.sampling, s.request.seed) for s in sequences]
    return Rows(
        column([s.slot for s in sequences]),
        page_table(sequences, rows, pages_of_row),
        column([s.last_token for s in sequences]),
        column([s.position for s in sequences]),
        column([len(s.sampled) for s in sequences]),
        column([s.left for s in sequences]),
        ends_BN,
        column([s.request.top_logprobs for s in sequences]) > 0,
        column([adapters[s.request.adapter] for s in sequences]),
        row_settings(settings + [UNUSED] * (rows - len(sequences))),
    )


def allowed_tokens(sequences: list[Sequence], rows: int, vocab_size: int) -> npt.NDArray[np.bool_]:
    """The tokens that the constraints of the sequences allow, (rows, vocab_size)."""
    allowed_BV = np.ones((rows, vocab_size), bool)
    for row, sequence in enumerate(sequences):
        if sequence.request.constraint is not None:
            allowed_BV[row] = sequence.request.constraint.allowed()
    return allowed_BV


def top_tokens(tokens_C: npt.NDArray[np.int32], logprobs_C: npt.NDArray[np.float32], number: int) -> TopLogprobs:
    """The first `number` of the most probable tokens."""
    return tuple(zip(tokens_C[:number].tolist(), logprobs_C[:number].tolist(), strict=True))
