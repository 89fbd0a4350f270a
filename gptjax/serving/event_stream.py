"""Responses as streams of server-sent events."""

import json
from collections.abc import AsyncGenerator
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import StreamingResponse
from starlette.types import Message, Receive, Scope, Send

from gptjax.serving.answering import log_record, unless_disconnected
from gptjax.serving.api_errors import ApiError

T = TypeVar("T")
HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # the second one is for nginx


class EventStream(StreamingResponse):
    """Sends the texts of `events` as they come; closes them when the client does.

    Raises:
      ClientDisconnect: the client closed the connection before the last event.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str, None]) -> None:
        super().__init__(events, headers=HEADERS)
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        complete = False

        async def noted(message: Message) -> None:
            nonlocal complete
            await send(message)
            complete = message["type"] == "http.response.body" and not message.get("more_body")

        try:
            await super().__call__(scope, receive, noted)
        finally:
            await self._events.aclose()
        if not complete:
            raise ClientDisconnect


def event(content: dict[str, Any], name: str | None = None) -> str:
    """Returns one event with JSON as its data."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n"


async def event_stream(request: Request, events: AsyncGenerator[str, None]) -> EventStream:
    """Returns a response of events, once the first one is there: an error before it has its own status.

    An error after the first event is the last event.

    Raises:
      ApiError: before the first event.
      ClientDisconnect: the client closed the connection before the first event.
    """
    try:
        first = await unless_disconnected(request, anext(events))
    except BaseException:
        await events.aclose()
        raise
    return EventStream(_rest(request, first, events))


async def _rest(request: Request, first: str, events: AsyncGenerator[str, None]) -> AsyncGenerator[str, None]:
    try:
        yield first
        async for text in events:
            yield text
    except ApiError as error:
        log_record(request)["error"] = error.message
        yield event(error.body())
    finally:
        await events.aclose()


async def collected(request: Request, pieces: AsyncGenerator[T, None]) -> list[T]:
    """Returns all pieces; ClientDisconnect if the client closes the connection before the last one."""

    async def collect() -> list[T]:
        return [piece async for piece in pieces]

    try:
        return await unless_disconnected(request, collect())
    finally:
        await pieces.aclose()
