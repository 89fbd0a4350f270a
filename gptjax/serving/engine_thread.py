"""The thread that runs the engine, and the queue of completions before it.

The engine is synchronous and belongs to this thread alone. The event loop submits and cancels; it is handed the sampled
tokens of a round in one call.
"""

import asyncio
import contextlib
import dataclasses
import logging
import threading
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Callable, Sequence
from functools import partial
from typing import Any

from gptjax.config import UserError
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.requests import EngineStats, GenerationRequest, SampledToken
from gptjax.serving.api_errors import ApiError
from gptjax.serving.server_metrics import ServerMetrics

MAX_RETRY_SECONDS = 60
KEPT_SECONDS = 2.0  # after the time of Retry-After, for which a refused client has precedence


class Generation:
    """One completion in the queue or in the engine. Made by `EngineThread.submit`.

    Attributes:
      request: what the engine is given.
      submitted, started, first, last: `time.monotonic()` of the submission, of the insertion into the engine, and of
        the first and the last token; None: not yet.
      prompt_logprobs: those of the prompt's tokens, once the first token is there, where the request asks for them.
    """

    def __init__(self, request: GenerationRequest, client: str, deadline: float) -> None:
        self.request, self.client, self.deadline = request, client, deadline
        self.submitted = time.monotonic()
        self.started: float | None = None
        self.first: float | None = None
        self.last: float | None = None
        self.prompt_logprobs: Any = None
        self.number: int | None = None  # of the engine
        self.cancelled = False
        self.ended = False
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[SampledToken | Exception] = asyncio.Queue()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        return self._loop

    def put(self, event: SampledToken | Exception) -> None:
        """Hands over a token or the end by an error; called in the event loop."""
        self._events.put_nowait(event)

    async def tokens(self) -> AsyncIterator[SampledToken]:
        """Yields the tokens as they are sampled; the last one has a finish reason.

        Raises:
          ApiError: the request cannot run, its deadline has passed, or the engine failed.
        """
        while True:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            yield event
            if event.finish_reason is not None:
                return


class FairQueue:
    """A queue that serves its clients in turns; the generations of one client stay in order."""

    def __init__(self) -> None:
        self._of_client: OrderedDict[str, deque[Generation]] = OrderedDict()
        self._length = 0

    def __len__(self) -> int:
        return self._length

    def push(self, generation: Generation) -> None:
        self._of_client.setdefault(generation.client, deque()).append(generation)
        self._length += 1

    def pop(self) -> Generation:
        client, waiting = next(iter(self._of_client.items()))
        generation = waiting.popleft()
        self._of_client.move_to_end(client)
        if not waiting:
            del self._of_client[client]
        self._length -= 1
        return generation

    def remove(self, unwanted: Callable[[Generation], bool]) -> list[Generation]:
        """Removes and returns the generations for which `unwanted` is true."""
        removed: list[Generation] = []
        for client, waiting in list(self._of_client.items()):
            kept = deque[Generation]()
            for generation in waiting:
                (removed if unwanted(generation) else kept).append(generation)
            if kept:
                self._of_client[client] = kept
            else:
                del self._of_client[client]
        self._length -= len(removed)
        return removed


class RefusedClients:
    """Clients that a full queue refused, in the order of their first refusal, until they are admitted or stay away.

    Places are kept for them: otherwise a client whose request was just answered would always find its own place free,
    and those that wait as long as Retry-After says none.

    Args:
      most: places that are kept; four times as many clients are in the list at most.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._until: OrderedDict[str, float] = OrderedDict()

    def places_kept(self, client: str, now: float) -> int:
        """Returns the number of places that are kept for clients before this one."""
        self._until = OrderedDict((other, until) for other, until in self._until.items() if until > now)
        names = list(self._until)
        return min(self._most, names.index(client) if client in self._until else len(names))

    def note(self, client: str, until: float) -> None:
        """Appends a client; one that is in the list keeps its place in it."""
        if client in self._until or len(self._until) < 4 * self._most:
            self._until[client] = until

    def admit(self, client: str) -> None:
        self._until.pop(client, None)


@dataclasses.dataclass
class _Job:
    """A function to run between two rounds."""

    function: Callable[[], Any]
    loop: asyncio.AbstractEventLoop
    future: "asyncio.Future[Any]"

    def resolve(self, result: Any, error: Exception | None) -> None:
        if self.future.cancelled():
            return
        if error is not None:
            self.future.set_exception(error)
        else:
            self.future.set_result(result)


class EngineThread:
    """Runs an engine in a thread of its own.

    Args:
      engine: None: only `call` is used.
      max_queue: completions that may wait for a row, at least 1; further ones are refused with status 429.

    Attributes:
      healthy: False after a round of the engine failed, until one succeeds.
    """

    def __init__(self, engine: BatchedEngine | None, metrics: ServerMetrics, *, max_queue: int) -> None:
        self.engine, self._metrics, self._max_queue = engine, metrics, max_queue
        self._condition = threading.Condition()
        self._waiting = FairQueue()
        self._refused = RefusedClients(max_queue // 2)
        self._running: dict[int, Generation] = {}
        self._jobs: deque[_Job] = deque()
        self._changed = False  # something was cancelled
        self._stopping = False
        self._seconds = 1.0  # of a completion, a moving average
        self.healthy = True
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        metrics.watch("queued", "Completions that wait for a row.", lambda: self.num_waiting)
        for name in () if engine is None else (field.name for field in dataclasses.fields(EngineStats)):
            metrics.watch(f"engine_{name}", f"The engine's {name.replace('_', ' ')}.", partial(self._stat, name))

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread after the round in progress."""
        with self._condition:
            self._stopping = True
            self._condition.notify()
        self._thread.join()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    def _stat(self, name: str) -> float:
        assert self.engine is not None
        return float(getattr(self.engine.stats, name))

    # --- in the event loop --------------------------------------------------------------------------------------------

    def submit(self, requests: Sequence[GenerationRequest], client: str, seconds: float) -> list[Generation]:
        """Queues the completions of one HTTP request, all or none.

        Args:
          client: whose turn it is when they are served.
          seconds: deadline from now on.

        Raises:
          ApiError: 429: the queue is full.
        """
        now = time.monotonic()
        deadline = now + seconds
        with self._condition:
            waiting = len(self._waiting)
            if waiting and waiting + self._refused.places_kept(client, now) + len(requests) > self._max_queue:
                error = self._full(waiting)
                self._refused.note(client, now + float(error.headers["Retry-After"]) + KEPT_SECONDS)
                raise error
            self._refused.admit(client)
            generations = [Generation(request, client, deadline) for request in requests]
            for generation in generations:
                self._waiting.push(generation)
            self._condition.notify()
        return generations

    def cancel(self, generation: Generation) -> None:
        """Ends a completion; its row is free before the next round. Does nothing if it has ended."""
        if generation.ended or generation.cancelled:
            return
        with self._condition:
            generation.cancelled = True
            self._changed = True
            self._condition.notify()

    async def call(self, function: Callable[[], Any]) -> Any:
        """Runs a function in the engine's thread between two rounds; returns its result.

        Raises:
          ApiError: 429: as many calls wait as completions may.
        """
        loop = asyncio.get_running_loop()
        job = _Job(function, loop, loop.create_future())
        with self._condition:
            if len(self._jobs) >= max(1, self._max_queue):
                raise self._full(len(self._jobs))
            self._jobs.append(job)
            self._condition.notify()
        return await job.future

    def _full(self, waiting: int) -> ApiError:
        rows = 1 if self.engine is None else max(1, len(self._running) + self.engine.free_rows)
        seconds = min(MAX_RETRY_SECONDS, max(1, round(self._seconds * waiting / rows)))
        return ApiError(
            429,
            f"the server is busy: {waiting} completions are waiting; try again in {seconds} seconds",
            code="queue_full",
            headers={"Retry-After": str(seconds)},
        )

    # --- in the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            with self._condition:
                while not (self._waiting or self._running or self._jobs or self._changed or self._stopping):
                    self._condition.wait()
                if self._stopping:
                    return
                expired = self._take_ended()
                jobs, self._jobs = list(self._jobs), deque()
            self._deliver([(generation, self._late(generation)) for generation in expired])
            for job in jobs:
                self._do(job)
            self._insert_waiting()
            if self._running:
                self._round()

    def _take_ended(self) -> list[Generation]:
        """Removes what is cancelled or late; returns the late ones."""
        self._changed = False
        now = time.monotonic()
        ended = self._waiting.remove(lambda generation: generation.cancelled or generation.deadline <= now)
        running = [g for g in self._running.values() if g.cancelled or g.deadline <= now]
        for generation in running:
            self._evict(generation)
        return [generation for generation in (*ended, *running) if not generation.cancelled]

    def _evict(self, generation: Generation) -> None:
        assert self.engine is not None
        assert generation.number is not None
        del self._running[generation.number]
        self.engine.evict(generation.number)

    def _late(self, generation: Generation) -> ApiError:
        where = "in the queue" if generation.started is None else "while the completion was generated"
        return ApiError(504, f"the deadline of the request passed {where}", code="deadline_exceeded")

    def _insert_waiting(self) -> None:
        """Fills the free rows with what waits, one client after the other."""
        engine = self.engine
        while engine is not None and engine.free_rows > 0:
            with self._condition:
                if not self._waiting:
                    return
                generation = self._waiting.pop()
            try:
                generation.number = engine.insert(generation.request)
            except UserError as error:
                self._deliver([(generation, ApiError(400, str(error)))])
                continue
            generation.started = time.monotonic()
            self._running[generation.number] = generation
            self._metrics.queue_seconds.observe(generation.started - generation.submitted)

    def _round(self) -> None:
        assert self.engine is not None
        try:
            sampled = self.engine.step()
        except Exception:
            logging.getLogger("gptjax.serving").exception("a round of the engine failed")
            self.healthy = False
            failed = list(self._running.values())
            for generation in failed:
                self._evict(generation)
            self._deliver(
                [(generation, ApiError(500, "the engine failed, see the server's log")) for generation in failed]
            )
            return
        self.healthy = True
        now = time.monotonic()
        events: list[tuple[Generation, SampledToken | Exception]] = []
        for token in sampled:
            generation = self._running[token.request]
            self._note_time(generation, now)
            if generation.request.prompt_logprobs and generation.prompt_logprobs is None:
                generation.prompt_logprobs = self.engine.prompt_logprobs(token.request)
            if token.finish_reason is not None:
                del self._running[token.request]
                self._seconds += 0.1 * (now - (generation.started or now) - self._seconds)
            events.append((generation, token))
        self._deliver(events)

    def _note_time(self, generation: Generation, now: float) -> None:
        if generation.first is None:
            generation.first = now
            self._metrics.first_token_seconds.observe(now - generation.submitted)
        elif generation.last is not None and generation.last != now:
            self._metrics.token_seconds.observe(now - generation.last)
        generation.last = now

    def _do(self, job: _Job) -> None:
        result, error = None, None
        try:
            result = job.function()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop is closed: the server was ended by force
            job.loop.call_soon_threadsafe(job.resolve, result, error)

    def _deliver(self, events: Sequence[tuple[Generation, SampledToken | Exception]]) -> None:
        """Hands events over to the event loop, those of a round in one call."""
        for generation, event in events:
            generation.ended = isinstance(event, Exception) or event.finish_reason is not None
        if events:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the server was ended by force
                events[0][0].loop.call_soon_threadsafe(_put, events)


def _put(events: Sequence[tuple[Generation, SampledToken | Exception]]) -> None:
    for generation, event in events:
        generation.put(event)
