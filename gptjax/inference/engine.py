"""Text generation with a key-value cache, on the mesh of the weights.

The engine calls the two programs of `gptjax.inference.programs`. They are compiled once for each bucket of shapes:
rows, prompt lengths and cache slots are rounded up to powers of two.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import jax
import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.config import GPTConfig, UserError
from gptjax.data.images.square_images import padded
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.programs import (
    MOST_TOKENS,
    DecodingCache,
    DecodingSettings,
    SampledTokens,
    SamplingInputs,
    decode_tokens,
    prefill_prompts,
)
from gptjax.inference.sampling import Sampling
from gptjax.inference.text_stream import TextStream
from gptjax.inference.weights import WeightFormat, prepare
from gptjax.models.gpt import GPT
from gptjax.parallel import compiler
from gptjax.parallel.mesh import batch_shards, use_mesh
from gptjax.parallel.platforms import platform_defaults

TextOrTokens = str | npt.ArrayLike  # text, or token ids
FinishReason = Literal["end_of_text", "end_of_turn", "stop", "length"]
Overflow = Literal["error", "slide"]
Images = Sequence[npt.NDArray[np.uint8]]  # of a prompt, each as `gptjax.data.images.square_images.square` makes it
MIN_BUCKET = 16  # positions
MIN_ENDS = 4  # length that the list of end tokens is padded to at least
# Tokens per call when text is streamed or stop strings are checked: few are wasted after a stop string.
STREAMED_TOKENS = 4


@dataclasses.dataclass(frozen=True)
class Completion:
    """The completion of one prompt.

    Attributes:
      tokens: int32 (N,), without the end-of-text or end token. Includes the tokens of a stop string, and tokens beyond
        the tokenizer's vocabulary, which decode to no text.
      logprobs: float32 (N,), log-probabilities of the tokens under the model, before temperature, penalty and filters.
      text: the text that the tokens append to the prompt (`TextStream`), up to the stop string.
      finish_reason: "end_of_text", "end_of_turn" (an end token), "stop" (a stop string) or "length" (max_new_tokens).
      end: the end-of-text or end token that ended the completion; None if it ended otherwise.
      end_logprob: the log-probability of `end`; None without one, and from beam search.
    """

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    text: str
    finish_reason: FinishReason
    end: int | None = None
    end_logprob: float | None = None


@dataclasses.dataclass
class _Row:
    """A completion in progress."""

    stream: TextStream
    logprobs: list[float] = dataclasses.field(default_factory=list)
    reason: FinishReason | None = None
    end: int | None = None
    end_logprob: float | None = None

    def completion(self) -> Completion:
        tokens, logprobs = np.array(self.stream.tokens, np.int32), np.array(self.logprobs, np.float32)
        return Completion(tokens, logprobs, self.stream.text, self.reason or "length", self.end, self.end_logprob)


class Engine:
    """Generates text with one model. Not thread-safe.

    Args:
      params: parameters in the structure of `model.init`, unboxed; copied unless `weights` is "stacked", so that the
        caller may delete them.
      mesh: mesh over which the parameters are sharded; None: one device.
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
        weights: WeightFormat = "as_given",
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
        prompts: Sequence[TextOrTokens],
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
        images: Sequence[Images] | None = None,
    ) -> list[Completion]:
        """Generates one completion for each prompt; it depends on that prompt and its seed only.

        Rounding errors depend on the shape of the batch.

        Args:
          prompts: texts or token ids, of any lengths; an empty one means the start of a document.
          max_new_tokens: at least 1.
          sampling: sampling settings; None: temperature 1.
          seeds: sampling seeds modulo 2**32, one for each prompt; an int is the first of consecutive seeds.
          stop: strings that end a completion; the text before the first of them is kept.
          end_tokens: tokens that end a completion like end-of-text, for example the end of a turn; end-of-text may be
            one of them.
          ignore_end_of_text: generation continues after end-of-text, unless that is one of `end_tokens`.
          separate_text: decodes the tokens of a completion on their own, as a turn of a conversation is encoded; by
            default a completion continues the text of its prompt.
          overflow: "error": a prompt and completion longer than the context are an error, raised before anything runs;
            "slide": when the context is full, its last half is a new context.
          on_text: called with the index of a prompt and the next piece of its text, as soon as it is final.
          images: of each prompt, in the order of its image tokens; None: no prompt has images.

        Raises:
          UserError: the numbers of seeds and prompts differ; prompt and completion exceed the context; a prompt is
            empty and the tokenizer has no end-of-text; a token is outside of the model's vocabulary; or as in `stream`.
        """
        ids = [self.ids(prompt) for prompt in prompts]
        seeds = prompt_seeds(seeds, len(ids))
        reasons: dict[int, FinishReason] = {int(token): "end_of_turn" for token in end_tokens}
        if outside := [token for token in reasons if not 0 <= token < self.vocab_size]:
            raise UserError(f"the end token {outside[0]} is outside of the model's vocabulary of {self.vocab_size}")
        for token in () if ignore_end_of_text else self.tokenizer.ends:
            reasons.setdefault(token, "end_of_text")
        rows = [_Row(TextStream(self.tokenizer, stop, () if separate_text else prompt)) for prompt in ids]
        as_it_comes = bool(stop) or on_text is not None  # otherwise the text is decoded once, at the end
        at_once = STREAMED_TOKENS if as_it_comes else MOST_TOKENS

        def emit(i: int, text: str) -> None:
            if text and on_text is not None:
                on_text(i, text)

        settings: dict[str, Any] = {"seeds": seeds, "ends": list(reasons), "overflow": overflow, "images": images}
        tokens = self.stream(ids, max_new_tokens, sampling, **settings, at_once=at_once)
        for tokens_B, logprobs_B in tokens:
            for i, row in enumerate(rows):
                if row.reason is not None:
                    continue
                if (token := int(tokens_B[i])) in reasons:
                    row.reason, row.end, row.end_logprob = reasons[token], token, float(logprobs_B[i])
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
        images: Sequence[Images] | None = None,
    ) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        """Yields the tokens and log-probabilities of all prompts, (B,) each, one position at a time.

        The device samples `at_once` tokens in a call, and computes the next call while the caller reads the last one.
        The other arguments are those of `generate`.

        Args:
          ends: tokens that end a completion; tokens after them are meaningless.
          at_once: at most MOST_TOKENS.

        Raises:
          UserError: a prompt has other images than image tokens, or images with overflow="slide".
        """
        windows = [np.asarray(prompt, np.int32) for prompt in prompts]
        if not windows:
            return
        sampling = Sampling() if sampling is None else sampling
        for name in ("frequency_penalty", "presence_penalty", "logit_bias"):
            if getattr(sampling, name):
                raise UserError(f"{name} is a setting of gptjax.inference.batching: this engine has no such penalty")
        given = [0] * len(windows) if images is None else list(map(len, images))
        if any(given) and overflow == "slide":
            raise UserError("a prompt with images cannot slide: leave out overflow=slide")
        for window, number in zip(windows, given, strict=True):
            check_images(self.model.config, window, number)
        calls = self._calls(windows, max_new_tokens, sampling, seeds, ends, overflow, at_once, images)
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
        images: Sequence[Images] | None,
    ) -> Iterator[list["_Call"]]:
        """Dispatches the calls of the compiled programs, one after the other."""
        program = DecodingSettings(self.model, sampling.static, self.slots(windows, max_new_tokens, overflow))
        context, rows = self.model.config.context_length, self.rows(len(windows))
        seen_BV: Any = self._seen(windows, rows) if sampling.repetition_penalty is not None else None
        ends_N = np.full(max(MIN_ENDS, power_of_two(len(ends))), -1, np.int32)
        ends_N[: len(ends)] = ends
        seeds_B = np.resize(np.array([seed % 2**32 for seed in seeds], np.uint32), rows)
        inputs = SamplingInputs(seeds_B, np.int32(0), sampling.values, ends_N)
        images_BNX = self._padded_images(images, rows)
        memory: DecodingCache | None = None
        ended_B: Any = np.zeros(rows, bool)
        since: list[_Call] = []  # since `windows` were read
        while inputs.number < max_new_tokens:
            longest, read = max(map(len, windows)), sum(call.count for call in since)
            if longest + read > context:
                windows, since, read = self._slide(windows, since), [], 0
                if memory is not None:
                    ended_B, seen_BV = memory.ended_B, memory.seen_BV
            with use_mesh(self.mesh), self._first_call(program, rows, not since, longest):
                if not since or memory is None:
                    tokens_BT, length_B = self.pad(windows, rows)
                    count = 1
                    memory, sampled = prefill_prompts(
                        program, self.params, tokens_BT, length_B, ended_B, seen_BV, inputs, images_BNX
                    )
                else:
                    count = min(at_once, max_new_tokens - int(inputs.number), context - longest - read + 1)
                    position_B = length_B + np.int32(read - 1)
                    memory, sampled = decode_tokens(program, self.params, memory, position_B, np.int32(count), inputs)
            inputs = inputs._replace(number=inputs.number + np.int32(count))
            since.append(_Call(sampled, count))
            yield since[-1:]

    def _padded_images(self, images: Sequence[Images] | None, rows: int) -> npt.NDArray[np.uint8] | None:
        """Pads the images of the prompts to (rows, N, X); None: there are none."""
        most = 0 if images is None else max(map(len, images))
        if images is None or most == 0:
            return None
        repeated = [images[row % len(images)] for row in range(rows)]
        return padded(repeated, power_of_two(most), self.model.config.vision)

    def _first_call(
        self, program: DecodingSettings, rows: int, reads_prompts: bool, longest: int
    ) -> AbstractContextManager[None]:
        """Announces what may be a compilation: the first call with these shapes."""
        shapes = (program, rows, bucket(longest) if reads_prompts else None)
        if shapes in self._called:
            return nullcontext()
        self._called.add(shapes)
        return compiler.announced("prompt processing" if reads_prompts else "token generation")

    # Also used by beam search.

    def ids(self, prompt: TextOrTokens) -> npt.NDArray[np.int32]:
        """Returns the tokens of a prompt, int32 (T,); raises UserError as `generate` does."""
        ids = self.tokenizer.encode(prompt) if isinstance(prompt, str) else np.asarray(prompt, np.int64)
        if len(ids) == 0:
            if self.tokenizer.end_of_text is None:
                raise UserError("this tokenizer has no end-of-text token to start from: give the prompt some text")
            ids = np.array([self.tokenizer.end_of_text])
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise UserError(f"a prompt has a token outside of the model's vocabulary of {self.vocab_size}")
        return ids.astype(np.int32)

    def slots(self, windows: list[npt.NDArray[np.int32]], max_new_tokens: int, overflow: Overflow = "error") -> int:
        """Returns the positions of the cache: the longest text, rounded up; UserError if it exceeds the context."""
        longest, context = max(len(window) for window in windows), self.model.config.context_length
        if longest + max_new_tokens > context and overflow == "error":
            raise UserError(
                f"a prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the model's context of "
                f"{context} tokens: shorten one; sampling can also let the context slide (overflow=slide)"
            )
        return min(bucket(longest + max_new_tokens), context)

    def rows(self, prompts: int) -> int:
        """Returns the rows of a batch: one for each prompt, rounded up to be divisible by the batch shards."""
        shards = batch_shards(self.mesh)
        with use_mesh(self.mesh):
            least = platform_defaults().min_decode_rows if self.model.config.dtype == "bfloat16" else 1
        return shards * max(least, power_of_two(-(-prompts // shards)))

    def pad(
        self, windows: list[npt.NDArray[np.int32]], rows: int
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
        """Pads the windows into tokens_BT, with lengths_B; rows beyond the windows repeat them."""
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
        """Appends the sampled tokens to the windows; one longer than the context is cut to its last half context."""
        context = self.model.config.context_length
        sampled = [tokens_B for tokens_B, _ in self._read(calls, len(windows))]
        tokens_NB = np.array(sampled, np.int32).reshape(-1, len(windows))
        texts = [np.concatenate([window, tokens_NB[:, row]]) for row, window in enumerate(windows)]
        return [text[-(context // 2) :] if len(text) > context else text for text in texts]

    def _read(self, calls: "list[_Call]", rows: int) -> Iterator[tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]]:
        for call in calls:
            token_NB, logprob_NB = jax.device_get(call.sampled)
            for i in range(call.count):
                yield token_NB[i, :rows], logprob_NB[i, :rows]


@dataclasses.dataclass(frozen=True)
class _Call:
    """The result of one call of a program: the first `count` tokens of `sampled`."""

    sampled: SampledTokens
    count: int


def bucket(positions: int) -> int:
    """Rounds a number of positions up to one of the few that programs are compiled for."""
    return max(MIN_BUCKET, power_of_two(positions))


def power_of_two(number: int) -> int:
    """Returns the smallest power of two >= number."""
    return 1 << (number - 1).bit_length()


def prompt_seeds(seeds: int | Sequence[int], prompts: int) -> Sequence[int]:
    """The sampling seed of each prompt, consecutive ones from an int; UserError if their number is another."""
    seeds = [int(seeds) + i for i in range(prompts)] if isinstance(seeds, int | np.integer) else seeds
    if len(seeds) != prompts:
        raise UserError(f"{len(seeds)} seeds for {prompts} prompts: give one for each, or the first")
    return seeds


def check_images(config: GPTConfig, tokens: npt.ArrayLike, images: int) -> None:
    """Raises UserError unless the image tokens of a prompt are those of its images, and the model can read them."""
    if not config.reads_images:
        if images:
            raise UserError("there is an image, but this model reads text alone: train one with model.vision.encoder")
        return
    places = int(np.sum(np.asarray(tokens) == config.vision.image_token))
    if places != images * config.vision.tokens_per_image:
        raise UserError(
            f"a prompt has {places} image tokens for {images} images, which have {config.vision.tokens_per_image} each"
        )
