"""Beam search (Wu et al. 2016, section 7), with the rules of transformers' `generate(num_beams=..., do_sample=False)`.

The device extends the beams and returns the candidates of each step; the host keeps the finished completions and
decides when a search ends.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from gptjax.config import UserError
from gptjax.inference.engine import Completion, Engine, FinishReason, TextOrTokens
from gptjax.inference.text_stream import TextStream
from gptjax.models.attention import KeyValues
from gptjax.models.decoding import Cache, decode, logits, prefill, unstack
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import constrain, use_mesh


@dataclasses.dataclass(frozen=True)
class Beam:
    """A completion found by beam search.

    Attributes:
      completion: the completion.
      score: sum of its log-probabilities, including end-of-text, over (number of tokens) ** length_penalty.
    """

    completion: Completion
    score: float


@dataclasses.dataclass(frozen=True)
class Rules:
    """Settings of a search; see `beam_search`."""

    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    ends: tuple[int, ...]
    max_new_tokens: int


def beam_search(
    engine: Engine,
    prompts: Sequence[TextOrTokens],
    max_new_tokens: int,
    *,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    num_return: int = 1,
    early_stopping: bool | Literal["never"] = False,
    ignore_end_of_text: bool = False,
) -> list[list[Beam]]:
    """Returns the `num_return` best completions of each prompt, best first.

    Each step takes the (1 + num_ends) * num_beams most probable continuations of a prompt's beams, where num_ends is
    the number of tokens that end a text. Those among the first num_beams that end the text are finished, and the best
    num_beams of all finished ones are kept; the first num_beams that do not end it are the next beams.

    Args:
      prompts: texts or token ids, of any lengths; an empty one means the start of a document.
      max_new_tokens: at least 1.
      num_beams: number of beams; 1 is greedy decoding.
      length_penalty: exponent of the length that scores are divided by; above 0 favours longer completions.
      num_return: at most num_beams.
      early_stopping: True: a search ends as soon as num_beams completions are finished. False: it ends when,
        additionally, the best active beam would score no better than the worst finished one if it ended now. "never":
        as False, but with the score that the active beam would have at max_new_tokens without losing any probability,
        for a positive length_penalty.
      ignore_end_of_text: the search continues after end-of-text.

    Raises:
      UserError: a number out of range, or as in `Engine.generate`.
    """
    ends = () if ignore_end_of_text else engine.tokenizer.ends
    for name, value, most in (
        ("max_new_tokens", max_new_tokens, None),
        ("num_beams", num_beams, engine.vocab_size // _candidates_per_beam(ends)),  # continuations of a prompt
        ("num_return", num_return, num_beams),
    ):
        if value < 1 or (most is not None and value > most):
            raise UserError(f"{name}={value} must be at least 1{'' if most is None else f' and at most {most}'}")
    rules = Rules(
        num_beams,
        length_penalty,
        True if num_beams == 1 else early_stopping,  # greedy decoding ends at the first end of text
        ends,
        max_new_tokens,
    )
    searches, ids = [_Search(rules) for _ in prompts], [engine.ids(prompt) for prompt in prompts]
    for candidates in _candidates(engine, ids, rules):
        for row, search in enumerate(searches):
            if not search.over:
                search.extend(Candidates(*(array[row] for array in candidates)))
        if all(search.over for search in searches):
            break
    return [
        [found.beam(engine, prompt) for found in search.finished[:num_return]]
        for search, prompt in zip(searches, ids, strict=True)
    ]


def _candidates_per_beam(ends: tuple[int, ...]) -> int:
    """Returns the continuations needed for each beam: one more than may end the text, and at least 2."""
    return 1 + max(1, len(ends))


# --- on the host ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Path:
    """The last token of a beam, linked to the tokens before it; beams share common prefixes."""

    parent: "_Path | None"
    token: int
    logprob: float


@dataclasses.dataclass(frozen=True)
class _Finished:
    path: _Path
    score: float
    reason: FinishReason

    def beam(self, engine: Engine, prompt: npt.NDArray[np.int32]) -> Beam:
        ended = self.reason == "end_of_text"
        last = self.path.parent if ended else self.path
        steps: list[_Path] = []
        while last is not None:
            steps.append(last)
            last = last.parent
        tokens = np.array([step.token for step in reversed(steps)], np.int32)
        logprobs = np.array([step.logprob for step in reversed(steps)], np.float32)
        stream = TextStream(engine.tokenizer, prompt=prompt)
        for token in tokens.tolist():
            stream.push(token, decode=False)
        end = self.path.token if ended else None
        return Beam(Completion(tokens, logprobs, stream.flush(), self.reason, end), self.score)


class _Search:
    """The search for completions of one prompt.

    Attributes:
      finished: the best finished completions so far, best first.
      over: the search has ended.
    """

    def __init__(self, rules: Rules) -> None:
        self.finished: list[_Finished] = []
        self.over = False
        self._rules = rules
        self._beams: list[_Path | None] = [None]  # active beams
        self._length = 0

    def extend(self, candidates: "Candidates") -> None:
        """Processes the candidates of one step for this prompt: arrays (C,), and kept (G,)."""
        rules = self._rules
        self._length += 1
        columns = zip(candidates.parent_BC, candidates.token_BC, candidates.logprob_BC, strict=True)
        paths = [_Path(self._beams[parent], int(token), float(logprob)) for parent, token, logprob in columns]
        for path, total in list(zip(paths, candidates.total_BC, strict=True))[: rules.num_beams]:
            if path.token in rules.ends:
                self.finished.append(_Finished(path, self._score(total, self._length), "end_of_text"))
            elif self._length == rules.max_new_tokens:
                self.finished.append(_Finished(path, self._score(total, self._length), "length"))
        self.finished = sorted(self.finished, key=lambda found: -found.score)[: rules.num_beams]
        self._beams = [paths[kept] for kept in candidates.kept_BG]

        if len(self.finished) == rules.num_beams:
            longest = rules.early_stopping == "never" and rules.length_penalty > 0
            expected_length = rules.max_new_tokens if longest else self._length
            expected = self._score(candidates.total_BC[candidates.kept_BG[0]], expected_length)
            self.over = rules.early_stopping is True or expected <= self.finished[-1].score

    def _score(self, total: npt.NDArray[np.float32], length: int) -> float:
        return float(total / np.float32(length**self._rules.length_penalty))


# --- the compiled programs --------------------------------------------------------------------------------------------


class BeamProgram(NamedTuple):
    """Static arguments of the compiled programs.

    Attributes:
      model: the model to decode with.
      slots: positions of the key-value cache.
      num_beams: beams of a prompt, G.
      num_candidates: candidates of a prompt, C.
    """

    model: GPT
    slots: int
    num_beams: int
    num_candidates: int


class BeamCache(NamedTuple):
    """State carried from one step to the next; donated. The N = B * G rows of the cache are grouped by prompt.

    Attributes:
      cache: keys and values of the tokens read so far.
      token_BG: int32, the last token of each beam, which the model has not read yet.
      total_BG: float32, sum of each beam's log-probabilities.
    """

    cache: Cache
    token_BG: jax.Array
    total_BG: jax.Array


class Candidates(NamedTuple):
    """The most probable continuations of each prompt's beams, best first; replicated on all devices.

    Attributes:
      parent_BC: int32, index of the beam that is continued.
      token_BC: int32, token that continues it.
      logprob_BC: float32, log-probability of that token.
      total_BC: float32, sum of the log-probabilities of the beam and that token.
      kept_BG: int32, indices of the candidates that are the next beams, best first.
    """

    parent_BC: Any
    token_BC: Any
    logprob_BC: Any
    total_BC: Any
    kept_BG: Any


def _candidates(engine: Engine, windows: list[npt.NDArray[np.int32]], rules: Rules) -> Iterator[Candidates]:
    """Yields the candidates of each step as numpy arrays, while the device computes the next step."""
    if not windows:
        return
    num_candidates = _candidates_per_beam(rules.ends) * rules.num_beams
    program = BeamProgram(engine.model, engine.slots(windows, rules.max_new_tokens), rules.num_beams, num_candidates)
    tokens_BT, lengths_B = engine.pad(windows, engine.rows(len(windows)))
    ends_N = np.array(rules.ends or (-1,), np.int32)  # -1 is no token
    lengths_N = np.repeat(lengths_B, rules.num_beams)
    with use_mesh(engine.mesh):
        memory, last = _prefill(program, engine.params, tokens_BT, lengths_B, ends_N)
    for i in range(rules.max_new_tokens - 1):
        with use_mesh(engine.mesh):
            memory, new = _decode(program, engine.params, memory, lengths_N + np.int32(i), ends_N)
        yield Candidates(*map(np.asarray, last))
        last = new
    yield Candidates(*map(np.asarray, last))


@partial(jax.jit, static_argnums=0)
def _prefill(
    program: BeamProgram, params: Any, tokens_BT: jax.Array, lengths_B: jax.Array, ends_N: jax.Array
) -> tuple[BeamCache, Candidates]:
    """Prefills the prompts and branches each into its first beams."""
    params = unstack(program.model.config, params)
    x_BD, cache = prefill(program.model, params, constrain(tokens_BT, "batch", None), lengths_B, program.slots)
    return _branch(program, params, x_BD, cache, jnp.zeros((len(lengths_B), 1)), ends_N)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    program: BeamProgram, params: Any, memory: BeamCache, position_N: jax.Array, ends_N: jax.Array
) -> tuple[BeamCache, Candidates]:
    """Reads the last token of each beam, at `position_N`, and branches again."""
    params = unstack(program.model.config, params)
    x_ND, cache = decode(program.model, params, memory.cache, memory.token_BG.reshape(-1), position_N)
    return _branch(program, params, x_ND, cache, memory.total_BG, ends_N)


def _branch(
    program: BeamProgram, params: Any, x_ND: jax.Array, cache: Cache, total_BG: jax.Array, ends_N: jax.Array
) -> tuple[BeamCache, Candidates]:
    """Computes the candidates of the beams, and the G next beams, each with its parent's cache."""
    batch, beams = total_BG.shape
    logprob_BGV = jax.nn.log_softmax(logits(program.model, params, x_ND)).reshape(batch, beams, -1)
    vocab_size = logprob_BGV.shape[-1]
    total_BC, at_BC = jax.lax.top_k((total_BG[:, :, None] + logprob_BGV).reshape(batch, -1), program.num_candidates)
    parent_BC, token_BC = at_BC // vocab_size, at_BC % vocab_size
    logprob_BC = jnp.take_along_axis(logprob_BGV.reshape(batch, -1), at_BC, axis=1)
    # At most num_ends candidates of a beam end the text, so at least num_beams candidates do not.
    ended_BC = jnp.any(token_BC[:, :, None] == ends_N[None, None], axis=-1)
    _, kept_BG = jax.lax.top_k(jnp.where(ended_BC, -jnp.inf, total_BC), program.num_beams)
    parent_BG, token_BG, total_BG = (
        jnp.take_along_axis(x_BC, kept_BG, axis=1) for x_BC in (parent_BC, token_BC, total_BC)
    )
    memory = BeamCache([_reorder(layer, parent_BG) for layer in cache], token_BG, total_BG)
    candidates = Candidates(parent_BC, token_BC, logprob_BC, total_BC, kept_BG)
    return memory, Candidates(*(constrain(array, None, None) for array in candidates))


def _reorder(layer: KeyValues, parent_BG: jax.Array) -> KeyValues:
    """Gathers the keys and values of each beam's parent. The beams of a prompt are on one device: no communication."""
    batch, beams = parent_BG.shape

    def reorder(x_NHSK: jax.Array) -> jax.Array:
        x_BGHSK = x_NHSK.reshape(batch, -1, *x_NHSK.shape[1:])
        reordered_BGHSK = jax.vmap(lambda x_GHSK, parent_G: jnp.take(x_GHSK, parent_G, axis=0))(x_BGHSK, parent_BG)
        return constrain(reordered_BGHSK.reshape(batch * beams, *x_NHSK.shape[1:]), "batch", "heads", None, None)

    return jax.tree.map(reorder, layer)
