"""Continuous batching: requests enter and leave a running batch, each with settings of its own.

`BatchedEngine.step` reads chunks of prompts, those of several in one call, and decodes some tokens of every row whose
prompt is read, so a long prompt does not stall the others. The key-value cache consists of pages
(`gptjax.models.paged_attention`). A request gets all the pages that it can need before it starts, so that it never has
to be interrupted; requests start in the order in which they came.

Determinism. With `deterministic`, a call reads a chunk of one prompt, and decodes a fixed number of rows. Chunks begin
at multiples of the chunk size and are read by programs of their shape, so what is in a whole page depends only on the
tokens up to its end, whether it was computed for this request or found in the prefix cache; the shape of the last chunk
depends on the length of the prompt. A row's arithmetic is then the same whatever is in the other rows, as long as the
device computes all rows of a matrix product alike. XLA's CPU backend does in float32, as the tests verify. Proposals of
speculative decoding then take the rows that no request uses, so the program is the same with and without them.

`gptjax.inference.engine.Engine` remains the engine for a batch of prompts that start together, and for contexts that
slide: it reads all prompts in one call and decodes up to 32 tokens of each in another, with sampling settings that are
compiled in. `gptjax.inference.continuous` completes many prompts with this one.
"""

import collections
import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import PeftConfig, UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference import prompt_chunks
from gptjax.inference.batch_programs import (
    MOST_STEPS,
    Sampled,
    batch_sizes,
    decode_rows,
    empty_state,
    read_chunks,
    score_chunk,
    set_history,
)
from gptjax.inference.engine import check_images, power_of_two
from gptjax.inference.page_pool import PagePool, affordable_pages, page_bytes, page_digests
from gptjax.inference.prompt_chunks import Chunk
from gptjax.inference.requests import EndReason, EngineStats, GenerationRequest, PromptLogprobs, SampledToken
from gptjax.inference.sequences import (
    Run,
    Sequence,
    allowed_tokens,
    row_arguments,
    sampled_places,
    start_history,
    top_tokens,
)
from gptjax.inference.speculation import EngineShape, Proposer, Speculation
from gptjax.inference.weights import WeightFormat, prepare
from gptjax.models import row_adapters
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import use_mesh
from gptjax.parallel.platforms import platform_defaults

DEFAULT_CHUNK = 64  # positions of a page, and tokens of a prompt that are read in one call


class BatchedEngine:
    """Generates the completions of many requests at once. Not thread-safe.

    Args:
      params: parameters in the structure of `model.init`, unboxed; copied unless `weights` is "stacked".
      mesh: mesh over which the parameters are sharded; None: one device.
      weights: as in `gptjax.inference.weights.prepare`.
      rows: the most requests that are in the batch at a time.
      chunk: positions of a page, and tokens of a prompt that are read in one call.
      cache_bytes: memory of the key-value cache; None: as many pages as `rows` texts of the whole context need.
      deterministic: programs of fixed shapes: the tokens and log-probabilities of a request do not depend on other
        requests, bit for bit. Otherwise a batch of few rows is decoded by a program of few rows, and prompts that wait
        together are read together.
      prefix_cache: pages of prompts are kept for later requests that begin with the same tokens.
      steps: the most tokens of a row that one `step` decodes, at most MOST_STEPS.
      adapters: LoRA and AdaLoRA adapters by name, as `gptjax.models.row_adapters.with_adapters` takes them.
      proposer: proposes tokens for speculative decoding; None: there is none.
      speculative_tokens: the most proposed tokens of a request in a call.

    Raises:
      UserError: an adapter that does not fit the model, a number out of range, `cache_bytes` too small for one page,
        or unknown `weights`.
    """

    def __init__(
        self,
        model: GPT,
        params: Any,
        tokenizer: Tokenizer,
        mesh: Mesh | None = None,
        weights: WeightFormat = "as_given",
        *,
        rows: int = 8,
        chunk: int | None = None,
        cache_bytes: int | None = None,
        deterministic: bool = False,
        prefix_cache: bool = True,
        steps: int = 4,
        adapters: Mapping[str, tuple[PeftConfig, Any]] | None = None,
        proposer: Proposer | None = None,
        speculative_tokens: int = 4,
    ) -> None:
        self.mesh, self.tokenizer = mesh, tokenizer
        self._speculation = Speculation(proposer, speculative_tokens, free=deterministic)
        config = dataclasses.replace(model.config, expert_capacity=None)
        if deterministic and config.num_experts is not None:
            config = dataclasses.replace(config, expert_backend="dense")  # grouped rows depend on the other rows
        self.rows, self.chunk = rows, min(DEFAULT_CHUNK if chunk is None else chunk, config.context_length)
        for name, value, most in (("rows", rows, None), ("chunk", self.chunk, None), ("steps", steps, MOST_STEPS)):
            if value < 1 or (most is not None and value > most):
                raise UserError(f"{name}={value} must be at least 1{'' if most is None else f' and at most {most}'}")
        with use_mesh(mesh):
            self.model, self.params = prepare(GPT(config), params, weights)
            adapters = {} if adapters is None else adapters
            self.params = row_adapters.with_adapters(config, self.params, list(adapters.values()))
            least_rows = platform_defaults().min_decode_rows if self.model.config.dtype == "bfloat16" else 1
        assert config.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
        self.vocab_size: int = config.vocab_size
        self.context = config.context_length
        self.deterministic, self.steps = deterministic, steps
        self._prompts_at_once = 1 if deterministic else min(prompt_chunks.PROMPTS_AT_ONCE, rows)
        self._adapters: dict[str | None, int] = {None: 0} | {name: i for i, name in enumerate(adapters, start=1)}
        self._has_prefix_layers = "prefix" in config.attention_pattern
        self._keeps_prefixes = prefix_cache and not self._has_prefix_layers
        self._pages_of_row = -(-self.context // self.chunk)
        pages = rows * self._pages_of_row
        if cache_bytes is not None:
            pages = affordable_pages(cache_bytes, self.page_bytes, self.chunk)
        self._pool = PagePool(pages)
        shape = EngineShape(tokenizer, self.vocab_size, rows, pages, self.chunk, self._pages_of_row)
        self._speculation.proposer.start(shape)
        with use_mesh(mesh):
            self._state = empty_state(self.model, rows, self._pool.num_pages + 1, self.chunk)
        # The sizes of a batch for which there is a decoding program, the smallest first.
        most = rows * (1 + self._speculation.tokens)
        sizes = [rows] if deterministic else batch_sizes(least_rows, rows, most)
        self._all_allowed = {size: jnp.ones((size, self.vocab_size), bool) for size in sizes}
        self._waiting: collections.deque[Sequence] = collections.deque()
        self._reading: collections.deque[Sequence] = collections.deque()  # prompts, the next to be read first
        self._decoding: list[Sequence] = []
        self._free_slots = list(range(rows))
        self._prompt_logprobs: dict[int, PromptLogprobs] = {}
        self._next_number = 0
        self._stats = EngineStats(pages_total=self._pool.num_pages)
        self._shapes: set[Any] = set()

    @property
    def page_bytes(self) -> int:
        """Memory of a page, in all layers, and those of a draft model."""
        return page_bytes(self.model.config, self.chunk) + self._speculation.proposer.page_bytes(self.chunk)

    # --- requests -----------------------------------------------------------------------------------------------------

    @property
    def free_rows(self) -> int:
        """Rows without a request, less the requests that wait for one."""
        return max(0, len(self._free_slots) - len(self._waiting))

    @property
    def is_idle(self) -> bool:
        """Whether there is no request."""
        return not (self._waiting or self._reading or self._decoding)

    @property
    def stats(self) -> EngineStats:
        """The counters at this moment."""
        return dataclasses.replace(
            self._stats,
            rows_in_use=len(self._reading) + len(self._decoding),
            waiting=len(self._waiting),
            pages_in_use=self._pool.in_use,
            pages_cached=self._pool.cached,
            tokens_proposed=self._speculation.proposed,
            tokens_accepted=self._speculation.accepted,
            programs=len(self._shapes),
        )

    def check(self, request: GenerationRequest) -> None:
        """Raises UserError for a request that can never be completed.

        See `GenerationRequest.check`; also one of an unknown adapter or other images, or for which pages are too few.
        """
        request.check(self.vocab_size, self.context)
        check_images(self.model.config, request.tokens, len(request.images))
        if request.images and request.tokens[-1] == self.model.config.vision.image_token:
            raise UserError("the prompt ends with an image: add a token after it")
        if request.adapter not in self._adapters:
            known = ", ".join(name for name in self._adapters if name is not None) or "none"
            raise UserError(f"there is no adapter {request.adapter!r}: the adapters are {known}")
        if request.prompt_logprobs and self._has_prefix_layers:
            raise UserError("prompt_logprobs: this model attends to a whole prompt in both directions, so it has none")
        if (needed := self._pages_needed(request)) > self._pool.num_pages:
            raise UserError(
                f"a prompt of {len(request.tokens)} tokens and max_new_tokens={request.max_new_tokens} need {needed} "
                f"pages of the cache, which has {self._pool.num_pages}: shorten one, or raise cache_bytes"
            )

    def insert(self, request: GenerationRequest) -> int:
        """Adds a request, which starts as soon as a row and its pages are free; returns its number.

        Raises:
          UserError: as `check`.
        """
        self.check(request)
        digests = []
        if self._keeps_prefixes:
            digests = page_digests(request.tokens[:-1], self.chunk, request.adapter, request.images)
        number, self._next_number = self._next_number, self._next_number + 1
        self._waiting.append(Sequence(number, request, digests))
        return number

    def evict(self, number: int) -> None:
        """Removes a request, finished or not; its row and pages are free before the next step."""
        self._prompt_logprobs.pop(number, None)
        for group in (self._waiting, self._reading, self._decoding):
            for sequence in group:
                if sequence.number == number:
                    group.remove(sequence)
                    if group is not self._waiting:
                        self._free(sequence)
                    return

    def prompt_logprobs(self, number: int) -> PromptLogprobs | None:
        """Returns and forgets the log-probabilities of a prompt; None if it is not read yet, or they were not asked."""
        return self._prompt_logprobs.pop(number, None)

    def compile(self) -> None:
        """Compiles the decoding programs, so that no request waits for them."""
        for allowed_BV in self._all_allowed.values():
            self._sample([], allowed_BV, 0)
        self._speculation.proposer.compile()

    def step(self) -> list[SampledToken]:
        """Reads chunks of prompts and decodes tokens of the rows whose prompts are read.

        Returns:
          The sampled tokens; those of a request are in their order.
        """
        self._admit()
        # One call, or one chunk for each row that decodes: while few rows decode, other prompts are more urgent.
        left = max(1, len(self._reading) // max(1, len(self._decoding)))
        while self._reading and left > 0:
            left -= self._read()
        return self._decode() if self._decoding else []

    def _pages_needed(self, request: GenerationRequest) -> int:
        positions = len(request.tokens) + request.max_new_tokens - 1  # the last token is not read
        if self._has_prefix_layers:
            positions = max(positions, self._prefix_length(len(request.tokens)))
        return -(-positions // self.chunk)

    def _prefix_length(self, tokens: int) -> int:
        """The positions of the program that reads a whole prompt: a power of two of pages."""
        return min(power_of_two(-(-tokens // self.chunk)), self._pages_of_row) * self.chunk

    def _admit(self) -> None:
        """Starts the requests that wait, in their order, while there are rows and pages."""
        while self._waiting and self._free_slots:
            sequence = self._waiting[0]
            shared = [] if sequence.request.prompt_logprobs else self._pool.find(sequence.digests)
            self._pool.share(shared)
            needed = self._pages_needed(sequence.request) - len(shared)
            if needed > self._pool.available:
                self._pool.release(shared)
                return
            self._waiting.popleft()
            self._stats.prefix_queries += len(sequence.digests)
            self._stats.prefix_hits += len(shared)
            sequence.pages = shared + self._pool.allocate(needed)
            sequence.read = len(shared) * self.chunk
            sequence.slot = self._free_slots.pop(0)
            if sequence.request.sampling.has_history:
                self._start_history(sequence)
            if sequence.read < len(sequence.request.tokens) - 1 or self._has_prefix_layers:
                self._reading.append(sequence)
            else:
                self._start_decoding(sequence)

    def _start_history(self, sequence: Sequence) -> None:
        start = start_history(sequence, self.vocab_size)
        with use_mesh(self.mesh):
            history = set_history(self._state.history, np.int32(sequence.slot), *start)
        self._state = self._state._replace(history=history)

    def _start_decoding(self, sequence: Sequence) -> None:
        sequence.image_tokens = None
        if sequence.request.prompt_logprobs:
            logprobs = np.array(sequence.prompt_logprobs, np.float32)
            self._prompt_logprobs[sequence.number] = PromptLogprobs(logprobs, tuple(sequence.prompt_top))
        self._decoding.append(sequence)

    def _free(self, sequence: Sequence) -> None:
        self._pool.release(sequence.pages)
        self._free_slots.append(sequence.slot)
        self._free_slots.sort()

    # --- calls of the programs ----------------------------------------------------------------------------------------

    def _next_chunk(self, sequence: Sequence) -> Chunk:
        """The next tokens of a prompt to read; all of them if its positions attend to later ones."""
        if self._has_prefix_layers:
            return prompt_chunks.whole_prompt(sequence, self._prefix_length(len(sequence.request.tokens)))
        return prompt_chunks.next_chunk(sequence, self.chunk)

    def _read(self) -> int:
        """Reads the next chunks of prompts in one call; returns their number."""
        chunks = prompt_chunks.take_chunks(self._reading, self._next_chunk, self._prompts_at_once)
        rows = 1 if len(chunks) == 1 else self._prompts_at_once
        given = prompt_chunks.chunk_rows(chunks, rows, self._pages_of_row, self._adapters)
        with use_mesh(self.mesh):
            images = prompt_chunks.chunk_images(self.model, self.params, chunks[0])
            self._shapes.add(("read", given.tokens_BT.shape, 0 if images is None else images.tokens_1ND.shape[1]))
            cache, x_BTD = read_chunks(self.model, self.params, self._state.cache, given, images)
        self._state = self._state._replace(cache=cache)
        self._speculation.proposer.read(given)
        for row, chunk in enumerate(chunks):
            self._note_read(chunk, x_BTD, row)
        return len(chunks)

    def _note_read(self, chunk: Chunk, x_BTD: jax.Array, row: int) -> None:
        """Continues after a call that read a chunk in a row."""
        sequence = chunk.sequence
        if sequence.request.prompt_logprobs:
            self._score(chunk, x_BTD, row)
        sequence.read += chunk.count
        self._stats.tokens_prefilled += chunk.count
        for page in range(chunk.start // self.chunk, min(sequence.read // self.chunk, len(sequence.digests))):
            self._pool.publish(sequence.pages[page], sequence.digests[page])
        if chunk.is_last:
            self._start_decoding(sequence)
        else:
            self._reading.append(sequence)

    def _score(self, chunk: Chunk, x_BTD: jax.Array, row: int) -> None:
        """Appends the log-probabilities of the tokens after those of a chunk."""
        self._shapes.add(("score", x_BTD.shape))
        wants_top = np.bool_(chunk.sequence.request.top_logprobs > 0)
        with use_mesh(self.mesh):
            next_T = prompt_chunks.next_tokens(chunk)
            scores = score_chunk(self.model, self.params, x_BTD, np.int32(row), next_T, wants_top)
        prompt_chunks.append_scores(chunk, *jax.device_get(scores))

    def _decode(self) -> list[SampledToken]:
        spare = max(self._all_allowed) - len(self._decoding)
        runs = self._speculation.runs(self._decoding, spare, self._state.history)
        needed = sum(1 + len(run.proposals) for run in runs)
        rows = next(size for size in self._all_allowed if size >= needed)
        constrained = any(sequence.request.constraint is not None for sequence in self._decoding)
        # A first token must not wait for later ones; while prompts are read, rows that end must be noticed early.
        early = constrained or self._reading or any(not sequence.sampled for sequence in self._decoding)
        count = 1 if early or needed > len(runs) else min(self.steps, max(s.left for s in self._decoding))
        allowed_BV = allowed_tokens(runs, rows, self.vocab_size) if constrained else self._all_allowed[rows]
        return self._events(runs, count, self._sample(runs, allowed_BV, count))

    def _sample(self, runs: list[Run], allowed_BV: Any, count: int) -> Sampled:
        """Runs the decoding program for `count` steps; returns arrays of the host."""
        rows = len(allowed_BV)
        self._shapes.add(("decode", rows))
        with use_mesh(self.mesh):
            given = row_arguments(runs, rows, self._pages_of_row, self._adapters)
            self._state, sampled = decode_rows(self.model, self.params, self._state, given, allowed_BV, np.int32(count))
        return Sampled(*jax.device_get(sampled))

    def _events(self, runs: list[Run], count: int, sampled: Sampled) -> list[SampledToken]:
        """Appends what a call sampled to the sequences, up to their ends and to the first wrong proposals."""
        events: list[SampledToken] = []
        for run, places in zip(runs, sampled_places(runs, count), strict=True):
            (sequence, proposals), begun, wanted = run, len(events), run.sequence.request.top_logprobs
            for i, place in enumerate(places):
                token = int(sampled.token_NB[place])
                top = top_tokens(sampled.top_token_NBC[place], sampled.top_logprob_NBC[place], wanted)
                reason = self._append(sequence, token)
                events.append(SampledToken(sequence.number, token, float(sampled.logprob_NB[place]), top, reason))
                if reason is not None or (i < len(proposals) and token != proposals[i]):
                    break
            self._speculation.note(run, len(events) - begun - 1)
        self._stats.tokens_decoded += len(events)
        return events

    def _append(self, sequence: Sequence, token: int) -> EndReason | None:
        """Adds a sampled token to its sequence, which it may end."""
        request = sequence.request
        reason: EndReason | None = None
        sequence.sampled.append(token)
        if token in request.end_tokens:
            reason = "end_of_text" if token in self.tokenizer.ends else "end_of_turn"
        elif sequence.left == 0:
            reason = "length"
        elif request.constraint is not None:
            request.constraint.accept(token)
        if reason is not None:
            self._decoding.remove(sequence)
            self._free(sequence)
        return reason
