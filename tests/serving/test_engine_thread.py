"""The order in which waiting completions are served, clients that are admitted, and calls between two rounds."""

import asyncio
import threading

from gptjax.inference.requests import GenerationRequest
from gptjax.serving.api_errors import ApiError
from gptjax.serving.engine_thread import EngineThread, FairQueue, Generation, RefusedClients
from gptjax.serving.server_metrics import ServerMetrics


def queue_of(clients):
    async def make():
        queue = FairQueue()
        for i, client in enumerate(clients):
            queue.push(Generation(GenerationRequest((i,), 1), client, deadline=float(i)))
        return queue

    return asyncio.run(make())


def test_clients_are_served_in_turns_and_each_in_order():
    queue = queue_of("aaaabbc")
    served = [queue.pop() for _ in range(7)]
    assert "".join(generation.client for generation in served) == "abcabaa"
    for client in "abc":
        own = [generation.request.tokens for generation in served if generation.client == client]
        assert own == sorted(own)
    assert len(queue) == 0


def test_what_is_cancelled_or_late_leaves_the_queue():
    queue = queue_of("aabb")
    removed = queue.remove(lambda generation: generation.deadline in (1.0, 2.0, 3.0))
    assert [generation.client for generation in removed] == ["a", "b", "b"]
    assert len(queue) == 1
    assert queue.pop().client == "a"


def test_a_call_that_outlives_its_event_loop_does_not_end_the_thread():
    thread, begun, resumed = EngineThread(None, ServerMetrics(), max_queue=1), threading.Event(), threading.Event()
    thread.start()

    async def leave() -> None:
        call = asyncio.create_task(thread.call(lambda: (begun.set(), resumed.wait())))
        await asyncio.to_thread(begun.wait)
        call.cancel()

    try:
        asyncio.run(leave())
        resumed.set()
        assert asyncio.run(thread.call(lambda: 7)) == 7
    finally:
        thread.stop()


def test_a_refused_client_has_precedence_over_those_that_came_later():
    async def run():
        thread = EngineThread(None, ServerMetrics(), max_queue=4)

        def submit(client):
            try:
                return thread.submit([GenerationRequest((1,), 1)], client, 60.0)[0]
            except ApiError as error:
                return error.status

        def end(generation):
            thread.cancel(generation)
            thread._take_ended()

        admitted = [submit(client) for client in "abcd"]
        assert submit("e") == 429
        end(admitted[0])
        assert submit("a") == 429  # the free place is that of e
        assert submit("e").client == "e"
        assert submit("b") == 429  # full
        end(admitted[1])
        assert [submit(client) for client in "bc"] == [429, 429]  # the place is that of a
        assert submit("a").client == "a"

    asyncio.run(run())


def test_few_places_are_kept_and_none_for_clients_that_stay_away():
    refused = RefusedClients(2)
    clients = "abcdefghi"
    for i, client in enumerate(clients):
        refused.note(client, until=10.0 + i)
    assert [refused.places_kept(client, 0.0) for client in clients] == [0, 1, *[2] * 7]
    refused.admit("a")
    assert [refused.places_kept(client, 0.0) for client in "bcd"] == [0, 1, 2]
    assert refused.places_kept("d", 12.5) == 0
    assert refused.places_kept("i", 18.0) == 0  # found no place in the list
