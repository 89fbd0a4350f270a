"""Runs the completions of one HTTP request, and hands out their pieces as they are generated."""

import asyncio
import dataclasses
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeVar

from starlette.requests import ClientDisconnect, Request

from gptjax.inference.requests import GenerationRequest, SampledToken
from gptjax.inference.retrieval import Documents
from gptjax.serving.completion_readers import CompletionReader, Delta
from gptjax.serving.constraints import GrammarConstraint
from gptjax.serving.engine_thread import EngineThread, Generation
from gptjax.serving.json_bodies import read_json
from gptjax.serving.request_schemas import Schema
from gptjax.serving.schema_checks import check
from gptjax.serving.served_models import ServedModels
from gptjax.serving.server_metrics import ServerMetrics

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ServingOptions:
    """Settings of the HTTP layer.

    Attributes:
      api_keys: keys that requests must have one of; empty: none is needed.
      allowed_origins: origins that browsers may send requests from (CORS); empty: only the server's own.
      max_body_bytes: size limit of a request.
      body_seconds: time limit for a client to send a request's body.
      request_seconds: deadline of a request.
      log: receives a line of JSON for each request; None: no log.
      log_prompts: whether the log has the requests' bodies.
      page: folder of static files served at /.
    """

    api_keys: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 16 << 20
    body_seconds: float = 30.0
    request_seconds: float = 600.0
    log: TextIO | None = None
    log_prompts: bool = False
    page: Path | None = None


@dataclasses.dataclass
class Serving:
    """What the endpoints share.

    Attributes:
      embed: computes the embedding of tokens, float32 (D,); None: no model generates text.
      draining: whether the server is shutting down, and refuses new requests.
      active: HTTP requests in progress.
    """

    models: ServedModels
    thread: EngineThread
    metrics: ServerMetrics
    options: ServingOptions
    documents: Documents | None = None
    embed: Callable[[Sequence[int], str], Any] | None = None
    draining: bool = False
    active: int = 0

    @classmethod
    def of(cls, request: Request) -> "Serving":
        found = request.app.state.serving
        assert isinstance(found, cls)
        return found

    async def body(self, request: Request, schema: Schema) -> dict[str, Any]:
        """Reads and checks a request's body; parameters that are null are left out."""
        body = await read_json(request, self.options.max_body_bytes, self.options.body_seconds)
        record = log_record(request)
        if self.options.log_prompts:
            record["body"] = body
        check(schema, body)
        record |= {name: body[name] for name in ("model", "user", "stream") if body.get(name) is not None}
        return {name: value for name, value in body.items() if value is not None}


def log_record(request: Request) -> dict[str, Any]:
    """Returns what the request log will have about a request, to be extended."""
    found = request.scope.setdefault("gptjax.log", {})
    assert isinstance(found, dict)
    return found


@dataclasses.dataclass(frozen=True)
class PlannedCompletion:
    """A completion to generate: what the engine is given, and what reads its tokens."""

    request: GenerationRequest
    reader: CompletionReader


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of one completion.

    Attributes:
      index: of the completion.
      deltas: new text.
      tokens: the tokens of the content since the last piece.
      finish_reason: "stop", "length" or "tool_calls" with the last piece; otherwise None.
    """

    index: int
    deltas: list[Delta]
    tokens: list[SampledToken]
    finish_reason: str | None


class Answer:
    """The completions of one HTTP request.

    Attributes:
      prompt_tokens: total length of the prompts.
      completion_tokens, reasoning_tokens: sampled so far, without end tokens; how many of them are reasoning.
      prompt_logprobs: of each completion, as `Generation.prompt_logprobs`.
    """

    def __init__(self, request: Request, planned: Sequence[PlannedCompletion], prompt_tokens: int) -> None:
        self._serving, self._planned = Serving.of(request), planned
        self._record = log_record(request)
        client = request.scope.get("gptjax.client", "")
        self._client = str(client)
        self.prompt_tokens, self.completion_tokens, self.reasoning_tokens = prompt_tokens, 0, 0
        self.prompt_logprobs: list[Any] = [None] * len(planned)
        self._started = time.monotonic()
        self._record |= {"prompt_tokens": prompt_tokens, "completion_tokens": 0}

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """Yields the pieces of all completions as they are generated; closing it frees their rows.

        Raises:
          ApiError: the queue is full, the deadline passed, or the engine failed.
        """
        thread, options = self._serving.thread, self._serving.options
        requests = [planned.request for planned in self._planned]
        generations = thread.submit(requests, self._client, options.request_seconds)
        self._serving.metrics.prompt_tokens.inc(self.prompt_tokens)
        try:
            sources = [self._completion(i, generation) for i, generation in enumerate(generations)]
            async for piece in merged(sources):
                self._record.setdefault("first_token_seconds", round(time.monotonic() - self._started, 4))
                if piece.finish_reason is not None:
                    self._record.setdefault("finish_reasons", []).append(piece.finish_reason)
                yield piece
        finally:
            for generation in generations:
                thread.cancel(generation)
            self._record["completion_tokens"] = self.completion_tokens
            self._serving.metrics.completion_tokens.inc(self.completion_tokens)

    async def _completion(self, index: int, generation: Generation) -> AsyncIterator[Piece]:
        reader = self._planned[index].reader
        tokens: list[SampledToken] = []
        constraint = generation.request.constraint
        async for sampled in generation.tokens():
            if generation.prompt_logprobs is not None:
                self.prompt_logprobs[index] = generation.prompt_logprobs
            finish = sampled.finish_reason
            deltas: list[Delta] = []
            if finish is None or finish == "length":
                deltas = reader.push(sampled.token)
                self.completion_tokens += 1
                self.reasoning_tokens += reader.is_reasoning
                tokens += [sampled] if reader.is_content else []
            if finish is None and not reader.stopped:
                if deltas:
                    yield Piece(index, deltas, tokens, None)
                    tokens = []
                continue
            self._serving.thread.cancel(generation)
            deltas += reader.finish()
            if isinstance(constraint, GrammarConstraint):
                constraint.check()
            reason = "length" if finish == "length" and not reader.stopped else "stop"
            yield Piece(index, deltas, tokens, "tool_calls" if reader.calls and reason == "stop" else reason)
            return

    def usage(self) -> dict[str, Any]:
        """Returns the usage object of completions."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
            "completion_tokens_details": {"reasoning_tokens": self.reasoning_tokens},
        }


async def merged(sources: Sequence[AsyncIterator[Piece]]) -> AsyncIterator[Piece]:
    """Yields the pieces of several completions in the order of their arrival."""
    if len(sources) == 1:
        async for piece in sources[0]:
            yield piece
        return
    arrived: asyncio.Queue[Piece | Exception | None] = asyncio.Queue()

    async def forward(source: AsyncIterator[Piece]) -> None:
        try:
            async for piece in source:
                arrived.put_nowait(piece)
            arrived.put_nowait(None)
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(forward(source)) for source in sources]
    try:
        running = len(tasks)
        while running:
            item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                running -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """Returns the result of `work`, which is cancelled when the client closes the connection.

    Raises:
      ClientDisconnect: the client closed the connection.
    """

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, watch = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait({task, watch}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for future in (task, watch):
            future.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)
