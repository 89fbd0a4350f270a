"""Generating text: prompts in, completions out, with a key-value cache on the mesh the weights lie on.

Two programs do the work, `_prefill` for the prompts and `_decode` for each token after them. They are compiled once for
each bucket of shapes: rows, prompt lengths and cache slots are rounded up to powers of two.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.config import UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.sampling import Form, Knobs, Sampling, sample
from gptjax.inference.text import TextStream
from gptjax.inference.weights import Weights, prepare
from gptjax.models.decoding import Cache, decode, logits, prefill, unstack
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import batch_shards, constrain, use_mesh

Prompt = str | npt.ArrayLike  # text, or token ids
FinishReason = Literal["end_of_text", "end_of_turn", "stop", "length"]
Overflow = Literal["error", "slide"]
MIN_BUCKET = 16  # positions


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated after one prompt.

    Attributes:
      tokens: int32 (N,), without the token that ended them; a stop string's tokens are among them.
      logprobs: float32 (N,), of the tokens under the model itself: before temperature, penalty and filters.
      text: of the tokens, up to the stop string.
      finish_reason: "end_of_text", "end_of_turn" (one of end_tokens), "stop" (a stop string) or "length"
        (max_new_tokens).
    """

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    text: str
    finish_reason: FinishReason


@dataclasses.dataclass
class _Row:
    """A completion under way."""

    stream: TextStream
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: FinishReason | None = None

    def completion(self) -> Completion:
        tokens, logprobs = np.array(self.stream.tokens, np.int32), np.array(self.logprobs, np.float32)
        return Completion(tokens, logprobs, self.stream.text, self.reason or "length")


class Engine:
    """Generates with one model. Not for threads: one call at a time.

    Args:
      params: as `model.init` makes them, unboxed; copied, unless `weights` is "stacked", so the caller may drop them.
      mesh: that the params lie on; None: one device.
      weights: "as_given", "bfloat16", "int8" or "stacked"; see `gptjax.inference.weights.prepare`.

    Raises:
      UserError: unknown `weights`.
    """

    def __init__(
        self,
        model: GPT,
        params: Any,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        weights: Weights = "as_given",
    ) -> None:
        self.mesh = mesh
        self.tokenizer = tokenizer
        with use_mesh(self.mesh):
            self.model, self.params = prepare(model, params, weights)
        assert model.config.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
        self.vocab_size = model.config.vocab_size

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seeds: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        ignore_end_of_text: bool = False,
        end_tokens: Sequence[int] = (),
        overflow: Overflow = "error",
        on_text: Callable[[int, str], None] | None = None,
    ) -> list[Completion]:
        """A completion of each prompt.

        A completion depends on its own prompt and seed, not on the prompts beside it (but for the last bits of the
        arithmetic, which depend on the batch's shape).

        Args:
          prompts: of any lengths; an empty one means the start of a document.
          max_new_tokens: at least 1.
          sampling: None: temperature 1.
          seeds: of the draws, one for each prompt; an int counts up from it.
          stop: strings that end a completion; what is before the first of them is kept.
          ignore_end_of_text: go on after it.
          end_tokens: others that end a completion, such as a chat format's end of turn.
          overflow: a text that outgrows the model's context is an error, found before anything runs; or it "slides":
            when the context is full, the last half of it becomes a new one, which is read again.
          on_text: called with the index of a prompt and the next piece of its text, as soon as it is certain.

        Raises:
          UserError: not as many seeds as prompts, a text longer than the context, an empty prompt for a tokenizer
            without end-of-text, a token outside of the vocabulary.
        """
        ids = [self.ids(prompt) for prompt in prompts]
        seeds = [int(seeds) + i for i in range(len(ids))] if isinstance(seeds, int | np.integer) else seeds
        if len(seeds) != len(ids):
            raise UserError(f"{len(seeds)} seeds for {len(ids)} prompts: give one for each, or the first")
        end_of_text = None if ignore_end_of_text else self.tokenizer.end_of_text
        rows = [_Row(TextStream(self.tokenizer, stop)) for _ in ids]
        as_it_comes = bool(stop) or on_text is not None  # else the text is decoded once, at the end

        def emit(i: int, text: str) -> None:
            if text and on_text is not None:
                on_text(i, text)

        for tokens_B, logprobs_B in self.stream(ids, max_new_tokens, sampling, seeds=seeds, overflow=overflow):
            for i, row in enumerate(rows):
                if row.reason is not None:
                    continue
                token = int(tokens_B[i])
                if token == end_of_text or token in end_tokens:
                    row.reason = "end_of_turn" if token in end_tokens else "end_of_text"
                    emit(i, row.stream.flush())
                    continue
                row.logprobs.append(float(logprobs_B[i]))
                emit(i, row.stream.push(token, decode=as_it_comes))
                if row.stream.stopped:
                    row.reason = "stop"
            if all(row.reason for row in rows):
                break
        for i, row in enumerate(rows):
            emit(i, row.stream.flush())
        return [row.completion() for row in rows]

    def stream(
        self,
        prompts: Sequence[npt.ArrayLike],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seeds: Sequence[int],
        overflow: Overflow = "error",
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """Token after token of all prompts: tokens and log-probabilities, (B,) each, whatever the tokens are.

        Each pair is read one step late, so that the device works on the next while the caller looks at it.
        Arguments as of `generate`.
        """
        sampling = Sampling() if sampling is None else sampling
        windows = [np.asarray(prompt, np.int32) for prompt in prompts]
        if not windows:
            return
        program = Program(self.model, sampling.form, self.slots(windows, max_new_tokens, overflow))
        rows = self.rows(len(windows))
        seen_BV = self._seen(windows, rows) if sampling.repetition_penalty is not None else None
        seeds_B = np.resize(np.asarray(seeds, np.int64), rows).astype(np.uint32)
        drawn: list[Drawn] = []  # since `windows` were read
        last = None
        for i in range(max_new_tokens):
            draw = Draw(seeds_B, np.int32(i), sampling.knobs)
            longest = max(len(window) for window in windows)
            if longest + len(drawn) > self.model.config.context_length:
                windows, drawn = self._slide(windows, drawn), []
            with use_mesh(self.mesh):
                if not drawn:
                    tokens_BT, length_B = self.pad(windows, rows)
                    memory, new = _prefill(program, self.params, tokens_BT, length_B, seen_BV, draw)
                else:
                    position_B = length_B + np.int32(len(drawn) - 1)
                    memory, new = _decode(program, self.params, memory, drawn[-1].token_B, position_B, draw)
            seen_BV = memory.seen_BV
            drawn.append(new)
            if last is not None:
                yield self._read(last, len(windows))
            last = new
        if last is not None:
            yield self._read(last, len(windows))

    # What beam search builds on too.

    def ids(self, prompt: Prompt) -> npt.NDArray[np.int32]:
        """The tokens of a prompt; raises UserError as `generate` does."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else np.asarray(prompt, np.int64)
        if len(ids) == 0:
            if self.tokenizer.end_of_text is None:
                raise UserError("this tokenizer has no end-of-text token to start from: give the prompt some text")
            ids = np.array([self.tokenizer.end_of_text])
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise UserError(f"a prompt has a token outside of the model's vocabulary of {self.vocab_size}")
        return ids.astype(np.int32)

    def slots(self, windows: list[npt.NDArray[np.int32]], max_new_tokens: int, overflow: Overflow = "error") -> int:
        """Slots of the cache: for the longest text, rounded up; raises UserError if the context is too short for it."""
        longest, context = max(len(window) for window in windows), self.model.config.context_length
        if longest + max_new_tokens > context and overflow == "error":
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
                f"{context} tokens: shorten one; sampling can also let the context slide (overflow=slide)"
            )
        return min(bucket(longest + max_new_tokens), context)

    def rows(self, prompts: int) -> int:
        """Rows of a batch: one a prompt, rounded up so that the mesh divides them evenly."""
        shards = batch_shards(self.mesh)
        return shards * power_of_two(-(-prompts // shards))

    def pad(
        self, windows: list[npt.NDArray[np.int32]], rows: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """tokens_BT and lengths_B; the rows after the windows repeat them."""
        context = self.model.config.context_length
        tokens_BT = np.zeros((rows, min(bucket(max(map(len, windows))), context)), np.int32)
        for row in range(rows):
            window = windows[row % len(windows)]
            tokens_BT[row, : len(window)] = window
        return tokens_BT, np.resize([len(window) for window in windows], rows).astype(np.int32)

    def _seen(self, windows: list[npt.NDArray[np.int32]], rows: int) -> npt.NDArray[np.bool_]:
        seen_BV = np.zeros((rows, self.vocab_size), bool)
        for row, window in enumerate(windows):
            seen_BV[row, window] = True
        return seen_BV

    def _slide(self, windows: list[npt.NDArray[np.int32]], drawn: "list[Drawn]") -> list[npt.NDArray[np.int32]]:
        """The windows with what was drawn; of each that is longer than the context, the last half of a context."""
        context = self.model.config.context_length
        tokens_NB = np.array([self._read(new, len(windows))[0] for new in drawn], np.int32).reshape(-1, len(windows))
        texts = [np.concatenate([window, tokens_NB[:, row]]) for row, window in enumerate(windows)]
        return [text[-(context // 2) :] if len(text) > context else text for text in texts]

    def _read(self, drawn: "Drawn", rows: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        return np.asarray(drawn.token_B)[:rows], np.asarray(drawn.logprob_B)[:rows]


def bucket(positions: int) -> int:
    """How many positions programs are compiled for when there are so many: few different numbers."""
    return max(MIN_BUCKET, power_of_two(positions))


def power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()


# --- the compiled programs --------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """What they are compiled for, besides shapes."""

    model: GPT
    form: Form
    slots: int


class Draw(NamedTuple):
    """What a draw depends on, besides logits."""

    seeds_B: npt.NDArray[np.uint32]
    number: np.int32  # of the token among the new ones
    knobs: Knobs


class Memory(NamedTuple):
    """What goes from one token to the next; donated."""

    cache: Cache
    seen_BV: jax.Array | None  # bool, for the repetition penalty


class Drawn(NamedTuple):
    """One token of each row, int32, and its float32 log-probability; whole on every device: any process reads it."""

    token_B: jax.Array
    logprob_B: jax.Array


@partial(jax.jit, static_argnums=0)
def _prefill(
    program: Program,
    params: Any,
    tokens_BT: jax.Array,
    lengths_B: jax.Array,
    seen_BV: jax.Array | None,
    draw: Draw,
) -> tuple[Memory, Drawn]:
    """Reads the prompts and draws the first new token of each."""
    params = unstack(program.model.config, params)
    x_BD, cache = prefill(program.model, params, constrain(tokens_BT, "batch", None), lengths_B, program.slots)
    return _draw(program, params, x_BD, cache, seen_BV, draw)


@partial(jax.jit, static_argnums=0, donate_argnums=2)
def _decode(
    program: Program, params: Any, memory: Memory, token_B: jax.Array, position_B: jax.Array, draw: Draw
) -> tuple[Memory, Drawn]:
    """Reads the token drawn last, at `position_B`, and draws the next."""
    params = unstack(program.model.config, params)
    x_BD, cache = decode(program.model, params, memory.cache, token_B, position_B)
    return _draw(program, params, x_BD, cache, memory.seen_BV, draw)


def _draw(
    program: Program, params: Any, x_BD: jax.Array, cache: Cache, seen_BV: jax.Array | None, draw: Draw
) -> tuple[Memory, Drawn]:
    logits_BV = logits(program.model, params, x_BD)
    keys_B = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), draw.number))(draw.seeds_B)
    token_B = sample(logits_BV, seen_BV, keys_B, program.form, draw.knobs)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    logprob_B = chosen_B - jax.nn.logsumexp(logits_BV, axis=-1)
    if seen_BV is not None:
        seen_BV = seen_BV.at[jnp.arange(len(token_B)), token_B].set(True)
    return Memory(cache, seen_BV), Drawn(constrain(token_B, None), constrain(logprob_B, None))
