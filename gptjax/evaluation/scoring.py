"""Log-probabilities of texts under a model, on which all likelihood-based evaluations are built.

A request is a sequence of tokens and the number of its last tokens to score. Requests are grouped into buckets of
shapes, powers of two, so that few programs are compiled, and each batch is sharded over the mesh. Logits are computed
for the scored positions only, in chunks.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.config import UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.engine import bucket, power_of_two
from gptjax.losses.cross_entropy import positions_per_chunk
from gptjax.models.gpt import GPT, head_embedding, hidden_states, unembed
from gptjax.parallel.mesh import batch_shards, constrain, use_mesh


class Request(NamedTuple):
    """Tokens, int32 (T,), and the number of the last of them to score, from 1 to T - 1."""

    tokens: npt.NDArray[np.int32]
    scored: int


class Score(NamedTuple):
    """Total log-probability of the scored tokens in nats, their number, and whether greedy decoding gives them."""

    logprob: float
    num_tokens: int
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class ScoringBatch:
    """Requests that are computed together, by index into the planned list, and the shape of their batch."""

    indices: list[int]
    rows: int  # B
    length: int  # T
    scored: int  # C


def start_of_text(tokenizer: Tokenizer) -> list[int]:
    """Returns the context that the first token of a text is predicted from: end-of-text.

    Raises:
      UserError: the tokenizer has none.
    """
    if tokenizer.end_of_text is None:
        raise UserError(
            "this tokenizer has no end-of-text token to predict the first token from: give every example a context"
        )
    return [tokenizer.end_of_text]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """Returns the request that scores `continuation` after `context`, by the rules of lm-evaluation-harness.

    White space at the end of the context is moved to the continuation, as GPT-2's tokens begin with it. Both are
    encoded as one text; its tokens beyond the number of the context's tokens are the continuation's. An empty context
    is replaced by end-of-text.

    Raises:
      UserError: the continuation is empty; or the context is empty and the tokenizer has no end-of-text.
    """
    if not continuation:
        raise UserError(f"there is nothing to score after {context[-40:]!r}: the continuation is empty")
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    if stripped:
        # A tokenizer may merge across the boundary: at least one token belongs to the continuation.
        scored = max(1, len(whole) - len(tokenizer.encode(stripped)))
        if scored < len(whole):
            return Request(whole, scored)
    return Request(np.concatenate([np.array(start_of_text(tokenizer), np.int32), whole]), len(whole))


class Scorer:
    """Scores requests with one model.

    Args:
      params: parameters in the structure of `model.init`, unboxed.
      mesh: mesh over which the parameters are sharded; None: one device.
      batch_size: requests of full context length in a batch, rounded up to a multiple of the batch shards; batches of
        shorter requests have proportionally more, for the same number of positions.
    """

    def __init__(self, model: GPT, params: Any, mesh: Mesh | None = None, batch_size: int = 8) -> None:
        self.model, self.context_length = model, model.config.context_length
        self._params, self._mesh, self._batch_size = params, mesh, batch_size
        self._row_unit = batch_shards(mesh)
        self._length_unit = 1 if mesh is None else mesh.shape["context"]

    def is_truncated(self, request: Request) -> bool:
        """Whether `request` is longer than the context, so that its first tokens are dropped."""
        return len(request.tokens) - 1 > self.context_length

    def plan(self, requests: Sequence[Request]) -> list[ScoringBatch]:
        """Groups requests into batches of one shape each, the longest first, so that out-of-memory errors occur first.

        The plan is deterministic, as rounding makes a score depend slightly on the shape of its batch.

        Raises:
          UserError: a request has more tokens to score than the context has.
        """
        buckets: dict[tuple[int, int], list[int]] = {}
        for index, (tokens, scored) in enumerate(requests):
            if scored > self.context_length:
                raise UserError(
                    f"a continuation of {scored} tokens is longer than the model's context of {self.context_length}"
                )
            length = self._bucket(min(len(tokens) - 1, self.context_length))
            buckets.setdefault((length, min(self._bucket(scored), length)), []).append(index)
        batches = []
        for (length, scored), indices in sorted(buckets.items(), reverse=True):
            indices.sort(key=lambda index: -len(requests[index].tokens))
            most = self._batch_size * max(1, self.context_length // length)
            rows = -(-min(most, power_of_two(len(indices))) // self._row_unit) * self._row_unit
            batches += [ScoringBatch(indices[i : i + rows], rows, length, scored) for i in range(0, len(indices), rows)]
        return batches

    def _bucket(self, length: int) -> int:
        rounded = min(bucket(length), self.context_length)
        return -(-rounded // self._length_unit) * self._length_unit

    def score_batch(self, requests: Sequence[Request], batch: ScoringBatch) -> list[Score]:
        """Computes the scores of a planned batch, in the order of its indices.

        A request longer than the context is predicted from its last `context_length` tokens.
        """
        tokens_BT = np.zeros((batch.rows, batch.length), np.int32)
        targets_BC = np.zeros((batch.rows, batch.scored), np.int32)
        start_B = np.zeros(batch.rows, np.int32)  # the position that predicts the first scored token
        for row, index in enumerate(batch.indices):
            tokens, scored = requests[index]
            inputs = tokens[:-1][-self.context_length :]
            tokens_BT[row, : len(inputs)] = inputs
            targets_BC[row, :scored] = tokens[-scored:]
            start_B[row] = len(inputs) - scored
        chunk = positions_per_chunk(batch.rows // self._row_unit)
        with use_mesh(self._mesh):
            results = _score(self.model, self._params, tokens_BT, targets_BC, start_B, chunk)
        logprobs_BC, greedy_BC = (np.asarray(result) for result in results)
        scores = []
        for row, index in enumerate(batch.indices):
            n = requests[index].scored
            # A Python float, so that long texts are summed in float64.
            logprob = float(np.sum(logprobs_BC[row, :n], dtype=np.float64))
            scores.append(Score(logprob, n, bool(np.all(greedy_BC[row, :n]))))
        return scores

    def scores(self, requests: Sequence[Request]) -> list[Score]:
        """The scores of all requests, in their order; raises as `plan`."""
        scores: dict[int, Score] = {}
        for batch in self.plan(requests):
            scores |= dict(zip(batch.indices, self.score_batch(requests, batch), strict=True))
        return [scores[index] for index in range(len(requests))]

    def fingerprint(self) -> int:
        """A checksum of the weights: equal for equal weights, however they are laid out."""
        with use_mesh(self._mesh):
            return int(sum(np.asarray(_checksum(leaf), np.uint64) for leaf in jax.tree.leaves(self._params)) % 2**32)


def windows(tokens: npt.NDArray[np.int32], context_length: int, stride: int) -> Iterator[Request]:
    """Yields sliding-window requests that score every token of a text once, except for the first token.

    The first window scores a whole context. Each further window scores the next `stride` tokens, so each of them has at
    least context_length - stride + 1 tokens of context; the last window scores the remaining ones.

    Args:
      tokens: int32 (T,), the first of them only context (usually end-of-text).
      stride: from 1 (most context, slowest) to context_length (fastest).
    """
    done = 1
    while done < len(tokens):
        end = min(done + (stride if done > 1 else context_length), len(tokens))
        yield Request(tokens[max(0, end - 1 - context_length) : end], end - done)
        done = end


@partial(jax.jit, static_argnums=(0, 5))
def _score(
    model: GPT, params: Any, tokens_BT: jax.Array, targets_BC: jax.Array, start_B: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    """Computes the float32 log-probability of each target at positions start, start + 1, ..., and whether it is argmax.

    Both are (B, C), and replicated on all devices, so that every process can read them.
    """
    x_BTD = hidden_states(model, params, constrain(tokens_BT, "batch", "length"))
    embedding_VD = head_embedding(params)
    rows, scored = targets_BC.shape
    positions_BC = jnp.minimum(start_B[:, None] + jnp.arange(scored)[None], tokens_BT.shape[1] - 1)
    x_BCD = constrain(jnp.take_along_axis(x_BTD, positions_BC[..., None], axis=1), "batch", None, None)
    chunk = min(chunk, scored)
    pad = -scored % chunk

    def chunks(a_BC: jax.Array) -> jax.Array:  # (B, C, ...) to (N, B, chunk, ...)
        a_BC = jnp.pad(a_BC, [(0, 0), (0, pad)] + [(0, 0)] * (a_BC.ndim - 2))
        return jnp.moveaxis(a_BC.reshape(rows, -1, chunk, *a_BC.shape[2:]), 1, 0)

    def score(inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        x_BCD, targets_BC = inputs
        logits_BCV = unembed(x_BCD, embedding_VD, model.config.precision, soft_cap=model.config.logit_soft_cap)
        logits_BCV = constrain(logits_BCV, "batch", None, "vocab")
        # A masked sum instead of a gather, as the vocabulary may be sharded.
        hit_BCV = jnp.arange(logits_BCV.shape[-1])[None, None] == targets_BC[..., None]
        picked_BC = jnp.sum(jnp.where(hit_BCV, logits_BCV, 0), axis=-1)
        greedy_BC = jnp.argmax(logits_BCV, axis=-1) == targets_BC
        return picked_BC - jax.nn.logsumexp(logits_BCV, axis=-1), greedy_BC

    def whole(a_NBC: jax.Array) -> jax.Array:
        return constrain(jnp.moveaxis(a_NBC, 0, 1).reshape(rows, -1)[:, :scored], None, None)

    logprobs_NBC, greedy_NBC = jax.lax.map(score, (chunks(x_BCD), chunks(targets_BC)))
    return whole(logprobs_NBC), whole(greedy_NBC)


@jax.jit
def _checksum(leaf: jax.Array) -> jax.Array:
    """Computes the sum of the bit patterns modulo 2**32, uint32 (); independent of the order of summation."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32)
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)
