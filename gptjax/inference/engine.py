"""Generating text: prompts in, completions out, with a key-value cache on the mesh the weights lie on.

The two programs of `gptjax.inference.programs` do the work. They are compiled once for each bucket of shapes: rows,
prompt lengths and cache slots are rounded up to powers of two.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.config import UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.programs import MOST_TOKENS, Draw, Drawn, Memory, Program, draw_tokens, read_prompts
from gptjax.inference.sampling import Sampling
from gptjax.inference.text import TextStream
from gptjax.inference.weights import Weights, prepare
from gptjax.models.gpt import GPT
from gptjax.parallel import compiler
from gptjax.parallel.mesh import batch_shards, use_mesh
from gptjax.parallel.platforms import platform_defaults

Prompt = str | npt.ArrayLike  # text, or token ids
FinishReason = Literal["end_of_text", "end_of_turn", "stop", "length"]
Overflow = Literal["error", "slide"]
MIN_BUCKET = 16  # positions
MIN_ENDS = 4  # tokens that end a text
# Tokens between two looks at the text: it flows, and what is drawn behind a stop string is little.
STREAMED_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """What was generated after one prompt.

    Attributes:
      tokens: int32 (N,), without the end-of-text or end token that ended them; a stop string's tokens are among them,
        and so are tokens behind the tokenizer's vocabulary, of which the text has nothing.
      logprobs: float32 (N,), of the tokens under the model itself: before temperature, penalty and filters.
      text: what the tokens add to the prompt's text (`TextStream`), up to the stop string.
      finish_reason: "end_of_text", "end_of_turn" (an end token), "stop" (a stop string) or "length" (max_new_tokens).
      end: the end-of-text or end token that ended it; None: neither did.
    """

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    text: str
    finish_reason: FinishReason
    end: int | None = None


@dataclasses.dataclass
class _Row:
    """A completion in progress."""

    stream: TextStream
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: FinishReason | None = None
    end: int | None = None

    def completion(self) -> Completion:
        tokens, logprobs = np.array(self.stream.tokens, np.int32), np.array(self.logprobs, np.float32)
        return Completion(tokens, logprobs, self.stream.text, self.reason or "length", self.end)


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
        self._called: set[Any] = set()  # what the programs have been compiled for

    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int,
        sampling: Sampling | None = None,
        *,
        seeds: int | Sequence[int] = 0,
        stop: Sequence[str] = (),
        end_tokens: Sequence[int] = (),
        ignore_end_of_text: bool = False,
        separate_text: bool = False,
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
          seeds: sampling seeds modulo 2**32, one for each prompt; an int counts up from it.
          stop: strings that end a completion; what is before the first of them is kept.
          end_tokens: end a completion as end-of-text does, which may be one of them; such as the end of a turn.
          ignore_end_of_text: generation continues after end-of-text, unless that is one of `end_tokens`.
          separate_text: a completion's tokens are decoded on their own, as a turn of a conversation is encoded; by
            default a completion continues the text of its prompt.
          overflow: a text that outgrows the model's context is an error, found before anything runs; or it "slides":
            when the context is full, the last half of it becomes a new one, which is read again.
          on_text: called with the index of a prompt and the next piece of its text, as soon as it is certain.

        Raises:
          UserError: not as many seeds as prompts, a text longer than the context, an empty prompt for a tokenizer
            without end-of-text, a token outside of the model's vocabulary.
        """
        ids = [self.ids(prompt) for prompt in prompts]
        seeds = [int(seeds) + i for i in range(len(ids))] if isinstance(seeds, int | np.integer) else seeds
        if len(seeds) != len(ids):
            raise UserError(f"{len(seeds)} seeds for {len(ids)} prompts: give one for each, or the first")
        reasons: dict[int, FinishReason] = {int(token): "end_of_turn" for token in end_tokens}
        if outside := [token for token in reasons if not 0 <= token < self.vocab_size]:
            raise UserError(f"the end token {outside[0]} is outside of the model's vocabulary of {self.vocab_size}")
        for token in () if ignore_end_of_text else self.tokenizer.ends:
            reasons.setdefault(token, "end_of_text")
        rows = [_Row(TextStream(self.tokenizer, stop, () if separate_text else prompt)) for prompt in ids]
        as_it_comes = bool(stop) or on_text is not None  # else the text is decoded once, at the end

        def emit(i: int, text: str) -> None:
            if text and on_text is not None:
                on_text(i, text)

        tokens = self.stream(
            ids,
            max_new_tokens,
            sampling,
            seeds=seeds,
            ends=list(reasons),
            overflow=overflow,
            at_once=STREAMED_TOKENS if as_it_comes else MOST_TOKENS,
        )
        for tokens_B, logprobs_B in tokens:
            for i, row in enumerate(rows):
                if row.reason is not None:
                    continue
                if (token := int(tokens_B[i])) in reasons:
                    row.reason, row.end = reasons[token], token
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
        ends: Sequence[int] = (),
        overflow: Overflow = "error",
        at_once: int = MOST_TOKENS,
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """Token after token of all prompts: tokens and log-probabilities, (B,) each.

        The device draws `at_once` tokens in a call, and works on the next of them while the caller looks at these. The
        other arguments are as of `generate`.

        Args:
          ends: tokens of which every text draws one in the end; what comes after the last of them is without meaning.
          at_once: at most MOST_TOKENS.
        """
        windows = [np.asarray(prompt, np.int32) for prompt in prompts]
        if not windows:
            return
        sampling = Sampling() if sampling is None else sampling
        calls = self._calls(windows, max_new_tokens, sampling, seeds, ends, overflow, at_once)
        last = next(calls, [])
        for call in calls:
            yield from self._read(last, len(windows))
            last = call
        yield from self._read(last, len(windows))

    def _calls(
        self,
        windows: list[npt.NDArray[np.int32]],
        max_new_tokens: int,
        sampling: Sampling,
        seeds: Sequence[int],
        ends: Sequence[int],
        overflow: Overflow,
        at_once: int,
    ) -> Iterator[list["_Call"]]:
        """Starts one call of a program after the other."""
        program = Program(self.model, sampling.form, self.slots(windows, max_new_tokens, overflow))
        context, rows = self.model.config.context_length, self.rows(len(windows))
        seen_BV: Any = self._seen(windows, rows) if sampling.repetition_penalty is not None else None
        ends_E = np.full(max(MIN_ENDS, power_of_two(len(ends))), -1, np.int32)
        ends_E[: len(ends)] = ends
        seeds_B = np.resize(np.array([seed % 2**32 for seed in seeds], np.uint32), rows)
        draw = Draw(seeds_B, np.int32(0), sampling.knobs, ends_E)
        memory: Memory | None = None
        ended_B: Any = np.zeros(rows, bool)
        since: list[_Call] = []  # since `windows` were read
        while draw.number < max_new_tokens:
            longest, read = max(map(len, windows)), sum(call.count for call in since)
            if longest + read > context:
                windows, since, read = self._slide(windows, since), [], 0
                if memory is not None:
                    ended_B, seen_BV = memory.ended_B, memory.seen_BV
            with use_mesh(self.mesh), self._first_call(program, rows, not since, longest):
                if not since or memory is None:
                    tokens_BT, length_B = self.pad(windows, rows)
                    count = 1
                    memory, drawn = read_prompts(program, self.params, tokens_BT, length_B, ended_B, seen_BV, draw)
                else:
                    count = min(at_once, max_new_tokens - int(draw.number), context - longest - read + 1)
                    position_B = length_B + np.int32(read - 1)
                    memory, drawn = draw_tokens(program, self.params, memory, position_B, np.int32(count), draw)
            draw = draw._replace(number=draw.number + np.int32(count))
            since.append(_Call(drawn, count))
            yield since[-1:]

    def _first_call(
        self, program: Program, rows: int, reads_prompts: bool, longest: int
    ) -> AbstractContextManager[None]:
        """Announces what may be a compilation: the first call with these shapes."""
        shapes = (program, rows, bucket(longest) if reads_prompts else None)
        if shapes in self._called:
            return nullcontext()
        self._called.add(shapes)
        return compiler.announced("prompt processing" if reads_prompts else "token generation")

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
        with use_mesh(self.mesh):
            least = platform_defaults().min_decode_rows if self.model.config.dtype == "bfloat16" else 1
        return shards * max(least, power_of_two(-(-prompts // shards)))

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

    def _slide(self, windows: list[npt.NDArray[np.int32]], calls: "list[_Call]") -> list[npt.NDArray[np.int32]]:
        """The windows with what was drawn; of each that is longer than the context, the last half of a context."""
        context = self.model.config.context_length
        drawn = [tokens_B for tokens_B, _ in self._read(calls, len(windows))]
        tokens_NB = np.array(drawn, np.int32).reshape(-1, len(windows))
        texts = [np.concatenate([window, tokens_NB[:, row]]) for row, window in enumerate(windows)]
        return [text[-(context // 2) :] if len(text) > context else text for text in texts]

    def _read(self, calls: "list[_Call]", rows: int) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        for call in calls:
            token_NB, logprob_NB = jax.device_get(call.drawn)
            for i in range(call.count):
                yield token_NB[i, :rows], logprob_NB[i, :rows]


@dataclasses.dataclass(frozen=True)
class _Call:
    """What one call of a program draws: the first `count` tokens of `drawn`."""

    drawn: Drawn
    count: int


def bucket(positions: int) -> int:
    """How many positions programs are compiled for when there are so many: few different numbers."""
    return max(MIN_BUCKET, power_of_two(positions))


def power_of_two(number: int) -> int:
    """The next one that is not smaller."""
    return 1 << (number - 1).bit_length()
