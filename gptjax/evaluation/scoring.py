"""How likely texts are under a model: the one computation that all evaluations share.

A request is some tokens and how many of its last ones to score. Requests are sorted into buckets of shapes, powers of
two, so that few programs are compiled, and each batch is spread over the mesh. Logits exist for the scored positions
only, a chunk of them at a time.
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
    """Tokens, int32 [N], and how many of the last of them, from 1 to N - 1, to score."""

    tokens: npt.NDArray[np.int32]
    scored: int


class Score(NamedTuple):
    """Of the scored tokens: log-probability of all in nats, how many, whether each is its position's likeliest."""

    logprob: float
    num_tokens: int
    is_greedy: bool


@dataclasses.dataclass(frozen=True)
class Batch:
    """Requests that are computed together, by their places in the list that was planned, and the shapes they fill."""

    indices: list[int]
    rows: int  # B
    length: int  # T
    scored: int  # C


def start_of_text(tokenizer: Tokenizer) -> list[int]:
    """What the first token of a text is predicted from: end-of-text.

    Raises:
      UserError: the tokenizer has none.
    """
    if tokenizer.end_of_text is None:
        raise UserError(
            "this tokenizer has no end-of-text token to predict the first token from: give every example a context"
        )
    return [tokenizer.end_of_text]


def encode_pair(tokenizer: Tokenizer, context: str, continuation: str) -> Request:
    """The request that scores `continuation` after `context`.

    White space at the end of the context goes to the continuation, where GPT-2's tokens have it, and both are encoded
    as one text; the tokens that the context alone does not account for are the continuation's. An empty context is
    end-of-text. These are the rules of lm-evaluation-harness.

    Raises:
      UserError: an empty continuation; an empty context, and the tokenizer has no end-of-text.
    """
    if not continuation:
        raise UserError(f"there is nothing to score after {context[-40:]!r}: the continuation is empty")
    stripped = context.rstrip()
    whole = tokenizer.encode(context + continuation)
    if stripped:
        # A tokenizer may merge across the border: at least one token is the continuation's.
        scored = max(1, len(whole) - len(tokenizer.encode(stripped)))
        if scored < len(whole):
            return Request(whole, scored)
    return Request(np.concatenate([np.array(start_of_text(tokenizer), np.int32), whole]), len(whole))


class Scorer:
    """Scores requests with one model.

    Args:
      params: as `model.init` makes them, unboxed.
      mesh: that the params lie on; None: one device.
      batch_size: requests of full context length in a batch, rounded up to what the mesh needs; of shorter ones, so
        many more that the number of positions stays.
    """

    def __init__(self, model: GPT, params: Any, mesh: Mesh | None = None, batch_size: int = 8) -> None:
        self.model, self.context_length = model, model.config.context_length
        self._params, self._mesh, self._batch_size = params, mesh, batch_size
        self._row_unit = batch_shards(mesh)
        self._length_unit = 1 if mesh is None else mesh.shape["context"]

    def is_truncated(self, request: Request) -> bool:
        """Whether `request` is longer than the context, so that its first tokens are left out."""
        return len(request.tokens) - 1 > self.context_length

    def plan(self, requests: Sequence[Request]) -> list[Batch]:
        """All requests in batches of one shape each, the longest first, so that a lack of memory shows at once.

        A score depends in its last bits on its batch's shape, and the same requests have the same plan.

        Raises:
          UserError: more tokens to score than the context is long.
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
            batches += [Batch(indices[i : i + rows], rows, length, scored) for i in range(0, len(indices), rows)]
        return batches

    def _bucket(self, length: int) -> int:
        rounded = min(bucket(length), self.context_length)
        return -(-rounded // self._length_unit) * self._length_unit

    def score_batch(self, requests: Sequence[Request], batch: Batch) -> list[Score]:
        """The scores of a planned batch, in the order of its indices.

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
    """Requests that score every token of a text but the first once, each from as much context as the stride allows.

    The first window is a whole context. Each window after it scores the next `stride` tokens, so each of them has at
    least context_length - stride + 1 tokens before it within its window, and the last window scores what is left.

    Args:
      tokens: int32 [N], the first of them only context (end-of-text, as a rule).
      stride: from 1, the slowest and best, to context_length, the fastest.
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
    """Log-probability, float32, of each target at positions start, start + 1, ..., and whether it is the likeliest.

    Both (B, C), and whole on every device, so that any process reads them.
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
        logits_BCV = constrain(unembed(x_BCD, embedding_VD, model.config.precision), "batch", None, "vocab")
        # A masked sum and not a gather, as the vocabulary may be spread over devices.
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
    """The sum of the bit patterns, uint32: modulo 2**32, so the order of summing does not matter."""
    bits = jax.lax.bitcast_convert_type(leaf, jnp.uint16 if leaf.dtype.itemsize == 2 else jnp.uint32)
    return jnp.sum(bits.astype(jnp.uint32), dtype=jnp.uint32)
