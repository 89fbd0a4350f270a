"""Requests in progress, and the arguments of the decoding program for a batch of them."""

import dataclasses
from collections.abc import Mapping
from typing import NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from gptjax.inference.batch_programs import MOST_PROPOSALS, Rows
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
      image_tokens: of the prompt's images, from its first chunk to its last.
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
    image_tokens: jax.Array | None = None

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

    def tokens(self, start: int) -> list[int]:
        """The tokens of prompt and completion from a position on."""
        prompt = self.request.tokens
        return [*prompt[start:], *self.sampled[max(0, start - len(prompt)) :]]


class Run(NamedTuple):
    """The rows of one request in a call of the decoding program: of its last token, and of those proposed after it."""

    sequence: Sequence
    proposals: tuple[int, ...] = ()


def padded_tokens(texts: list[tuple[int, ...]], rows: int, length: int) -> npt.NDArray[np.int32]:
    """Tokens of a text in each row, int32 (rows, length); zeros follow them."""
    tokens_BT = np.zeros((rows, length), np.int32)
    for row, tokens in enumerate(texts):
        tokens_BT[row, : len(tokens)] = tokens
    return tokens_BT


def page_table(sequences: list[Sequence], rows: int, pages_of_row: int) -> npt.NDArray[np.int32]:
    """The pages of the sequences, (rows, pages_of_row); 0 where there is none."""
    table_BN = np.zeros((rows, pages_of_row), np.int32)
    for row, sequence in enumerate(sequences):
        table_BN[row, : len(sequence.pages)] = sequence.pages
    return table_BN


def row_arguments(runs: list[Run], rows: int, pages_of_row: int, adapters: Mapping[str | None, int]) -> Rows:
    """The rows of a call of the decoding program; those beyond the runs are unused."""

    def column(values: list[int]) -> npt.NDArray[np.int32]:
        return np.array(values + [0] * (rows - len(values)), np.int32)

    sequences = [run.sequence for run in runs for _ in range(1 + len(run.proposals))]
    tokens = [token for run in runs for token in (run.sequence.last_token, *run.proposals)]
    index = [i for run in runs for i in range(1 + len(run.proposals))]  # of a row within its run
    ends_BN, earlier_BN = np.full((rows, MOST_ENDS), -1, np.int32), np.full((rows, MOST_PROPOSALS), -1, np.int32)
    for row, sequence in enumerate(sequences):
        ends_BN[row, : len(sequence.request.end_tokens)] = sequence.request.end_tokens
        earlier_BN[row, : index[row]] = tokens[row - index[row] + 1 : row + 1]
    settings = [(s.request.sampling, s.request.seed) for s in sequences]
    return Rows(
        column([s.slot for s in sequences]),
        page_table(sequences, rows, pages_of_row),
        column(tokens),
        column([s.position + i for s, i in zip(sequences, index, strict=True)]),
        column([len(s.sampled) + i for s, i in zip(sequences, index, strict=True)]),
        column([s.left - i for s, i in zip(sequences, index, strict=True)]),
        ends_BN,
        column([s.request.top_logprobs for s in sequences]) > 0,
        column([adapters[s.request.adapter] for s in sequences]),
        earlier_BN,
        row_settings(settings + [UNUSED] * (rows - len(sequences))),
    )


def sampled_places(runs: list[Run], count: int) -> list[list[tuple[int, int]]]:
    """Where a call of `count` steps returns the tokens of each run, as (step, row)."""
    places, first = [], 0
    for _, proposals in runs:
        size = 1 + len(proposals)
        # Either one step of several rows, or several steps of one row.
        places.append([(0, first + i) for i in range(size)] if proposals else [(i, first) for i in range(count)])
        first += size
    return places


def start_history(sequence: Sequence, vocab_size: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """The tokens of the prompt, and the biases of the logits, (vocab_size,) each."""
    seen_V, bias_V = np.zeros(vocab_size, bool), np.zeros(vocab_size, np.float32)
    seen_V[list(sequence.request.tokens)] = True
    for token, bias in sequence.request.sampling.logit_bias:
        bias_V[token] += bias
    return seen_V, bias_V


def allowed_tokens(runs: list[Run], rows: int, vocab_size: int) -> npt.NDArray[np.bool_]:
    """The tokens that the constraints of the requests allow, (rows, vocab_size)."""
    allowed_BV, row = np.ones((rows, vocab_size), bool), 0
    for sequence, proposals in runs:
        if sequence.request.constraint is not None:
            allowed_BV[row] = sequence.request.constraint.allowed()
        row += 1 + len(proposals)
    return allowed_BV


def top_tokens(tokens_C: npt.NDArray[np.int32], logprobs_C: npt.NDArray[np.float32], number: int) -> TopLogprobs:
    """The first `number` of the most probable tokens."""
    return tuple(zip(tokens_C[:number].tolist(), logprobs_C[:number].tolist(), strict=True))
