"""A small model that proposes the next tokens of a larger one, for speculative decoding.

It samples each token with the random key and the settings that the larger model uses in that place. Both then choose
the largest sum of a logit and the same Gumbel noise, so that similar distributions mostly give equal tokens, also at
high temperatures (Daliri, Musco and Suresh 2024, "Coupling without communication and drafter-invariant speculative
decoding").

It has pages of its own, which are numbered as those of the larger model, and reads the prompts with it. So what the
prefix cache finds for one is in the pages of the other.
"""

import collections
import dataclasses
import weakref
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import UserError
from gptjax.data.token_bytes import token_bytes
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.batch_programs import (
    BatchState,
    ChunkRows,
    batch_sizes,
    decode_rows,
    empty_state,
    read_chunks,
)
from gptjax.inference.engine import bucket, power_of_two
from gptjax.inference.page_pool import page_bytes
from gptjax.inference.row_sampling import History, replicated
from gptjax.inference.sequences import Run, Sequence, padded_tokens, page_table, row_arguments
from gptjax.inference.speculation import EngineShape, Proposer
from gptjax.inference.weights import WeightFormat, prepare
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import use_mesh


class DraftProposer(Proposer):
    """Proposes what a draft model samples. Rows whose text exceeds its context get no proposals.

    Args:
      params: parameters in the structure of `model.init`, unboxed.
      mesh: mesh over which they are sharded, that of the engine; None: one device.
      weights: as in `gptjax.inference.weights.prepare`.

    Raises:
      UserError: the model attends to prompts in both directions.
    """

    def __init__(
        self,
        model: GPT,
        params: Any,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        weights: WeightFormat = "as_given",
    ) -> None:
        config = dataclasses.replace(model.config, expert_capacity=None)
        if "prefix" in config.attention_pattern:
            raise UserError("the draft model attends to prompts in both directions: choose one that does not")
        self._tokenizer, self._mesh = tokenizer, mesh
        with use_mesh(mesh):
            self.model, self.params = prepare(GPT(config), params, weights)
        self._drafted: weakref.WeakKeyDictionary[Sequence, tuple[int, list[int]]] = weakref.WeakKeyDictionary()

    def page_bytes(self, page_size: int) -> int:
        return page_bytes(self.model.config, page_size)

    def start(self, shape: EngineShape) -> None:
        """Allocates the cache.

        Raises:
          UserError: the model that decodes has another tokenizer.
        """
        if not _same_tokens(self._tokenizer, shape.tokenizer):
            raise UserError(
                f"the draft model has another tokenizer ({self._tokenizer.vocab_size} tokens) than the model that it "
                f"drafts for ({shape.tokenizer.vocab_size}): choose one with the same tokenizer"
            )
        self._shape = shape
        with use_mesh(self._mesh):
            self._state = empty_state(self.model, shape.rows, shape.num_pages + 1, shape.page_size)

    def compile(self) -> None:
        for size in batch_sizes(1, self._shape.rows, self._shape.rows):
            self._decode([], size, 0, self._state.history)

    def read(self, chunks: ChunkRows) -> None:
        fits_B = chunks.start_B + chunks.count_B <= self.model.config.context_length
        if not fits_B.any():
            return
        count_B, none_B = np.where(fits_B, chunks.count_B, 0), np.zeros_like(chunks.count_B)
        chunks = chunks._replace(count_B=count_B, prefix_B=none_B, adapter_B=none_B)
        with use_mesh(self._mesh):
            cache, _ = read_chunks(self.model, self.params, self._state.cache, chunks)
        self._state = self._state._replace(cache=cache)

    def propose(self, sequences: list[Sequence], most: list[int], history: History) -> list[list[int]]:
        context = self.model.config.context_length
        drafting = [s for s, number in zip(sequences, most, strict=True) if number and s.position + number < context]
        if not drafting:
            return [[] for _ in sequences]
        for sequence in drafting:
            self._catch_up(sequence)
        has_history = any(sequence.request.sampling.has_history for sequence in drafting)
        vocabulary = self.model.config.vocab_size
        assert vocabulary is not None
        used = _fitted(history, vocabulary) if has_history else self._state.history
        # One step more than there are proposals reads the last proposal, so that its keys are there if it is accepted.
        rows = min(self._shape.rows, power_of_two(len(drafting)))
        token_NB = self._decode(drafting, rows, max(most) + 1, used)
        tokens = {}
        for row, sequence in enumerate(drafting):
            sampled = _up_to_end(token_NB[: sequence.left, row].tolist(), sequence.request.end_tokens)
            self._drafted[sequence] = sequence.position, [sequence.last_token, *sampled[:-1]]
            tokens[sequence] = [token for token in sampled if token < self._shape.vocab_size]
        return [tokens.get(sequence, [])[:number] for sequence, number in zip(sequences, most, strict=True)]

    def _decode(self, sequences: list[Sequence], rows: int, count: int, history: History) -> np.ndarray:
        """The tokens that the model samples next, int32 (N, rows)."""
        adapters: dict[str | None, int] = collections.defaultdict(int)  # the draft model has none
        with use_mesh(self._mesh):
            self._state, sampled = decode_rows(
                self.model,
                self.params,
                BatchState(self._state.cache, history),
                row_arguments([Run(sequence) for sequence in sequences], rows, self._shape.pages_of_row, adapters),
                np.ones((rows, self.model.config.vocab_size), bool),
                np.int32(count),
            )
        return np.asarray(jax.device_get(sampled.token_NB))[:count]

    def _catch_up(self, sequence: Sequence) -> None:
        """Reads the tokens before the last one that were sampled without a draft."""
        start, drafted = self._drafted.get(sequence, (len(sequence.request.tokens) - 1, []))
        for token, known in zip(drafted, sequence.tokens(start)[:-1], strict=False):
            if token != known:
                break
            start += 1
        table_1N, none_1 = page_table([sequence], 1, self._shape.pages_of_row), np.zeros(1, np.int32)
        while start < sequence.position:
            length = min(self._shape.page_size, bucket(sequence.position - start))
            count = min(length, sequence.position - start)
            tokens_1T = padded_tokens([tuple(sequence.tokens(start)[:count])], 1, length)
            start_1, count_1 = np.array([start], np.int32), np.array([count], np.int32)
            self.read(ChunkRows(tokens_1T, start_1, count_1, table_1N, none_1, none_1))
            start += count


def _same_tokens(one: Tokenizer, other: Tokenizer) -> bool:
    """Whether ids mean the same, with the same vocabulary or with one that was saved in another form."""
    return one.encoding_fingerprint == other.encoding_fingerprint or token_bytes(one) == token_bytes(other)


def _up_to_end(tokens: list[int], ends: tuple[int, ...]) -> list[int]:
    """The tokens up to the first end token, which is included."""
    last = next((i for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: last + 1]


@partial(jax.jit, static_argnums=1)
def _fitted(history: History, vocabulary: int) -> History:
    """A copy for a model whose vocabulary is padded to another size."""
    missing = max(0, vocabulary - history.bias_BV.shape[1])
    return replicated(History(*(jnp.pad(jnp.copy(x_BV[:, :vocabulary]), ((0, 0), (0, missing))) for x_BV in history)))
