"""Beam search: the completions that a search of a few beams side by side finds likeliest (Wu et al. 2016, section 7).

The rules are those of transformers' `generate(num_beams=..., do_sample=False)`. The device extends the beams and gives
the candidates of each step; which of them are finished, and when a search is over, the host keeps account of.
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
from gptjax.inference.engine import Completion, Engine, FinishReason, Prompt
from gptjax.inference.text_stream import TextStream
from gptjax.models.attention import KeyValues
from gptjax.models.decoding import Cache, decode, logits, prefill, unstack
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import constrain, use_mesh


@dataclasses.dataclass(frozen=True)
class Beam:
    """A completion that the search has found.

    Attributes:
      score: sum of its log-probabilities, an end-of-text's among them, over (number of tokens) ** length_penalty.
    """

    completion: Completion
    score: float


@dataclasses.dataclass(frozen=True)
class Rules:
    """What a search is for; see `beam_search`."""

    num_beams: int
    length_penalty: float
    early_stopping: bool | Literal["never"]
    ends: tuple[int, ...]
    max_new_tokens: int


def beam_search(
    engine: Engine,
    prompts: Sequence[Prompt],
    max_new_tokens: int,
    *,
    num_beams: int = 4,
    length_penalty: float = 1.0,
    num_return: int = 1,
    early_stopping: bool | Literal["never"] = False,
    ignore_end_of_text: bool = False,
) -> list[list[Beam]]:
    """The `num_return` best completions of each prompt, best first.

    Each step takes the (1 + E) * num_beams likeliest continuations of a prompt's beams, for E tokens that end a text.
    Those among the first num_beams that end the text are finished, and the best num_beams of all finished ones are
    kept; the first num_beams that do not end it are the next beams.

    Args:
      prompts: of any lengths; an empty one means the start of a document.
      max_new_tokens: at least 1.
      num_beams: 1 is greedy decoding.
      length_penalty: power of the length that scores are divided by; above 0 favours longer completions.
      num_return: at most num_beams.
      early_stopping: True: a search is over as soon as num_beams are finished; False: when besides the best that goes
        on, were it to end now, would score no better than the worst of them; "never": were it to reach max_new_tokens
        without losing any probability, for a positive length_penalty.
      ignore_end_of_text: the search continues after end-of-text.

    Raises:
      UserError: a number out of range, or as `Engine.generate`.
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
        True if num_beams == 1 else early_stopping,  # the likeliest token, if it ends the text, ends it
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
    """Continuations a step needs for each beam: as many may end the text as there are `ends`; 2 at least."""
    return 1 + max(1, len(ends))


# --- the host's account -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Path:
    """A token, and how it was come to; beams share what they have in common."""

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
      finished: the best so far, best first.
      over: nothing more will be found.
    """

    def __init__(self, rules: Rules) -> None:
        self.finished: list[_Finished] = []
        self.over = False
        self._rules = rules
        self._beams: list[_Path | None] = [None]  # that go on
        self._length = 0

    def extend(self, candidates: "Candidates") -> None:
        """Takes the candidates of one step, of this prompt alone: arrays (C,), and (K,) of those that go on."""
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
    """What they are compiled for, besides shapes."""

    model: GPT
    slots: int
    num_beams: int
    num_candidates: int  # of a prompt


class BeamCache(NamedTuple):
    """What goes from one step to the next; donated. Rows N of the cache: the beams G of each prompt B in turn."""

    cache: Cache
    token_BG: jax.Array
    total_BG: jax.Array  # float32, sum of the beam's log-probabilities


class Candidates(NamedTuple):
    """The likeliest continuations of each prompt's beams, best first; whole on every device: any process reads it.

    Attributes:
      parent_BC: which of the beams it continues.
      token_BC: int32, by which token.
      logprob_BC: float32, of that token.
      total_BC: float32, of the beam and that token.
      kept_BG: which candidates are the next beams, best first.
    """

    parent_BC: Any
    token_BC: Any
    logprob_BC: Any
    total_BC: Any
    kept_BG: Any


def _candidates(engine: Engine, windows: list[npt.NDArray[np.int32]], rules: Rules) -> Iterator[Candidates]:
    """Step after step of all prompts, in numpy; each is read while the device works on the next."""
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
    """Reads the prompts and branches each into its first beams."""
    params = unstack(program.model.config, params)
    x_BD, cache = prefill(program.model, params, constrain(tokens_BT, "batch", None), lengths_B, program.slots)
    return _branch(program, params, x_BD, cache, jnp.zeros((len(lengths_B), 1)), ends_N)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    program: BeamProgram, params: Any, memory: BeamCache, position_N: jax.Array, ends_N: jax.Array
) -> tuple[BeamCache, Candidates]:
    """Reads the token that each beam was last continued by, at `position_N`, and branches again."""
    params = unstack(program.model.config, params)
    x_ND, cache = decode(program.model, params, memory.cache, memory.token_BG.reshape(-1), position_N)
    return _branch(program, params, x_ND, cache, memory.total_BG, ends_N)


def _branch(
    program: BeamProgram, params: Any, x_ND: jax.Array, cache: Cache, total_BG: jax.Array, ends_N: jax.Array
) -> tuple[BeamCache, Candidates]:
    """Candidates of the beams so far, and the beams that go on: K of them, each with its parent's cache."""
    batch, beams = total_BG.shape
    logprob_BGV = jax.nn.log_softmax(logits(program.model, params, x_ND)).reshape(batch, beams, -1)
    vocab_size = logprob_BGV.shape[-1]
    total_BC, at_BC = jax.lax.top_k((total_BG[:, :, None] + logprob_BGV).reshape(batch, -1), program.num_candidates)
    parent_BC, token_BC = at_BC // vocab_size, at_BC % vocab_size
    logprob_BC = jnp.take_along_axis(logprob_BGV.reshape(batch, -1), at_BC, axis=1)
    # At most E candidates of a beam end the text, so at least as many as there are beams do not.
    ended_BC = jnp.any(token_BC[:, :, None] == ends_N[None, None], axis=-1)
    _, kept_BG = jax.lax.top_k(jnp.where(ended_BC, -jnp.inf, total_BC), program.num_beams)
    parent_BG, token_BG, total_BG = (
        jnp.take_along_axis(x_BC, kept_BG, axis=1) for x_BC in (parent_BC, token_BC, total_BC)
    )
    memory = BeamCache([_reorder(layer, parent_BG) for layer in cache], token_BG, total_BG)
    candidates = Candidates(parent_BC, token_BC, logprob_BC, total_BC, kept_BG)
    return memory, Candidates(*(constrain(array, None, None) for array in candidates))


def _reorder(layer: KeyValues, parent_BG: jax.Array) -> KeyValues:
    """Each beam's parent's keys and values. The beams of a prompt lie on one device, so nothing is sent."""
    batch, beams = parent_BG.shape

    def reorder(x_NHSK: jax.Array) -> jax.Array:
        x_BGHSK = x_NHSK.reshape(batch, -1, *x_NHSK.shape[1:])
        reordered_BGHSK = jax.vmap(lambda x_GHSK, parent_G: jnp.take(x_GHSK, parent_G, axis=0))(x_BGHSK, parent_BG)
        return constrain(reordered_BGHSK.reshape(batch * beams, *x_NHSK.shape[1:]), "batch", "heads", None, None)

    return jax.tree.map(reorder, layer)
