"""POST /v1/responses: text, whole or streamed, without stored state."""

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptjax.serving.answering import Answer, Piece, Serving
from gptjax.serving.api_errors import ApiError, invalid
from gptjax.serving.chat_endpoint import ChatPlan, plan_chat
from gptjax.serving.chat_prompts import conversation, text_of
from gptjax.serving.completion_readers import Delta
from gptjax.serving.completion_settings import completion_settings, response_structure, without_nulls
from gptjax.serving.event_stream import collected, event, event_stream
from gptjax.serving.request_schemas import RESPONSES_REQUEST
from gptjax.serving.served_models import GenerativeModel
from gptjax.serving.token_logprobs import chat_logprobs


async def create_response(request: Request) -> Response:
    serving = Serving.of(request)
    body = await serving.body(request, RESPONSES_REQUEST)
    model = serving.models.generative(body["model"])
    plan = await asyncio.to_thread(_plan, serving, model, body)
    answer = Answer(request, plan.planned, plan.num_prompt_tokens)
    writer = ResponseWriter(plan, answer, body)
    if plan.settings.stream:
        return await event_stream(request, _events(writer, answer))
    for piece in await collected(request, answer.pieces()):
        for _ in writer.write(piece):
            pass
    return JSONResponse(writer.response())


def _plan(serving: Serving, model: GenerativeModel, body: Mapping[str, Any]) -> ChatPlan:
    form = body.get("text", {}).get("format")
    response_format = form
    if form is not None and form["type"] == "json_schema":
        response_format = {"type": "json_schema", "json_schema": {n: v for n, v in form.items() if n != "type"}}
    messages = conversation(
        model.chat_form,
        _messages(body),
        response_format=response_format,
        reasoning_effort=without_nulls(body.get("reasoning", {})).get("effort"),
    )
    return plan_chat(
        model,
        messages,
        completion_settings(
            {name: value for name, value in body.items() if name != "stream_options"}, model.vocab_size
        ),
        max_tokens=body.get("max_output_tokens"),
        form=response_structure(response_format),
        form_param="text.format",
        top_logprobs=int(body.get("top_logprobs", 0)),
        documents=serving.documents if body.get("retrieval", True) else None,
        drop_turns=body.get("truncation") == "auto",
    )


def _messages(body: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the input as messages of a chat completion; reasoning belongs to the assistant's message after it."""
    messages: list[dict[str, Any]] = []
    if body.get("instructions"):
        messages.append({"role": "system", "content": body["instructions"]})
    if isinstance(body["input"], str):
        return [*messages, {"role": "user", "content": body["input"]}]
    reasoning = ""
    for i, item in enumerate(body["input"]):
        if item.get("type") == "reasoning":
            reasoning += "".join(part["text"] for part in item.get("content") or [])
            continue
        message = {"role": item["role"], "content": _content(item["content"])}
        if reasoning and item["role"] == "assistant":
            message["reasoning"] = reasoning
        elif reasoning:
            raise invalid(f"input[{i}] follows reasoning, but is not the assistant's message", f"input[{i}]")
        reasoning = ""
        messages.append(message)
    if not messages:
        raise invalid("input has no message", "input")
    return messages


def _content(content: Any) -> Any:
    """Returns the content of a message as one of a chat completion has it."""
    if isinstance(content, str) or not any(part["type"] == "input_image" for part in content):
        return text_of(content)
    return [
        {"type": "image_url", "image_url": {"url": part["image_url"]}}
        if part["type"] == "input_image"
        else {"type": "text", "text": part["text"]}
        for part in content
    ]


class ResponseWriter:
    """Writes a response, as an object and as events, while its pieces come."""

    def __init__(self, plan: ChatPlan, answer: Answer, body: Mapping[str, Any]) -> None:
        self._plan, self._answer, self._body = plan, answer, body
        self._id, self._created = f"resp_{secrets.token_hex(16)}", time.time()
        self._output: list[dict[str, Any]] = []  # items, the last one maybe in progress
        self._logprobs: list[dict[str, Any]] = []
        self._status = "in_progress"
        self._reason: str | None = None
        self._number = 0
        self._open: str | None = None  # kind of the item in progress

    # --- events -------------------------------------------------------------------------------------------------------

    def begin(self) -> Iterator[str]:
        """Yields the events before the first piece."""
        yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())

    def write(self, piece: Piece) -> Iterator[str]:
        """Appends a piece; yields its events."""
        entries = chat_logprobs(self._plan.model, piece.tokens, int(self._body.get("top_logprobs", 0)))
        self._logprobs += entries
        for delta in piece.deltas:
            kind = "reasoning" if delta.kind == "reasoning" else "message"
            if self._open not in (None, kind):
                yield from self._end_item("completed")
            if self._open is None:
                yield from self._begin_item(kind)
            yield from self._append(delta, entries)
            entries = []
        if piece.finish_reason is None:
            return
        cut = piece.finish_reason == "length"
        if self._open != "message" and not cut and not any(item["type"] == "message" for item in self._output):
            yield from self._end_item("completed") if self._open is not None else ()
            yield from self._begin_item("message")
        if self._open is not None:
            yield from self._end_item("incomplete" if cut else "completed")
        self._status, self._reason = ("incomplete", "max_output_tokens") if cut else ("completed", None)

    def end(self) -> Iterator[str]:
        """Yields the last event."""
        yield self._event(f"response.{self._status}", response=self.response())

    def fail(self, error: ApiError) -> Iterator[str]:
        """Yields the event of an error in mid-stream."""
        yield self._event("error", code=error.code, message=error.message, param=error.param)

    def _event(self, name: str, **content: Any) -> str:
        self._number += 1
        return event({"type": name, "sequence_number": self._number - 1, **content}, name)

    # --- items --------------------------------------------------------------------------------------------------------

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1, "content_index": 0}

    def _begin_item(self, kind: str) -> Iterator[str]:
        self._open = kind
        identity = f"{'rs' if kind == 'reasoning' else 'msg'}_{secrets.token_hex(12)}"
        item: dict[str, Any] = {"id": identity, "type": kind, "status": "in_progress", "content": []}
        item["summary" if kind == "reasoning" else "role"] = [] if kind == "reasoning" else "assistant"
        self._output.append(item)
        index = len(self._output) - 1
        yield self._event("response.output_item.added", output_index=index, item={**item, "content": []})
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        yield self._event("response.content_part.added", **self._place, part=dict(part))

    def _append(self, delta: Delta, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
        part = self._output[-1]["content"][0]
        part["text"] += delta.text
        if self._open == "reasoning":
            yield self._event("response.reasoning_text.delta", **self._place, delta=delta.text)
            return
        shown = list(entries) if self._with_logprobs else []
        yield self._event("response.output_text.delta", **self._place, delta=delta.text, logprobs=shown)

    def _end_item(self, status: str) -> Iterator[str]:
        item, kind = self._output[-1], self._open
        part = item["content"][0]
        if kind == "reasoning":
            yield self._event("response.reasoning_text.done", **self._place, text=part["text"])
        else:
            part["annotations"] = self._annotations(len(part["text"]))
            part["logprobs"] = self._logprobs if self._with_logprobs else []
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **self._place, **done)
        yield self._event("response.content_part.done", **self._place, part=part)
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)
        self._open = None

    @property
    def _with_logprobs(self) -> bool:
        return "message.output_text.logprobs" in self._body.get("include", ())

    def _annotations(self, end: int) -> list[dict[str, Any]]:
        return [
            {
                "type": "file_citation",
                "file_id": passage.place,
                "filename": passage.place.rpartition(":")[0],
                "index": end,
            }
            for passage in self._plan.sources
        ]

    # --- the object ---------------------------------------------------------------------------------------------------

    def response(self) -> dict[str, Any]:
        """Returns the response object as it is so far."""
        body, answer = self._body, self._answer
        usage = None
        if self._status != "in_progress":
            usage = {
                "input_tokens": answer.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": answer.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
                "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": None,
            "incomplete_details": None if self._reason is None else {"reason": self._reason},
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata", {}),
            "model": self._plan.model.name,
            "output": list(self._output),
            "parallel_tool_calls": True,
            "previous_response_id": None,
            "reasoning": {"effort": without_nulls(body.get("reasoning", {})).get("effort"), "summary": None},
            "store": False,
            "temperature": body.get("temperature", 1.0),
            "text": body.get("text", {"format": {"type": "text"}}),
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": [],
            "top_p": body.get("top_p", 1.0),
            "truncation": body.get("truncation", "disabled"),
            "usage": usage,
        }


async def _events(writer: ResponseWriter, answer: Answer) -> AsyncGenerator[str, None]:
    """Yields the events of a streamed response."""
    pieces, begun = answer.pieces(), False
    try:
        async for piece in pieces:
            for text in () if begun else writer.begin():
                yield text
            begun = True
            for text in writer.write(piece):
                yield text
        for text in writer.end():
            yield text
    except ApiError as error:
        if not begun:
            raise
        for text in writer.fail(error):
            yield text
    finally:
        await pieces.aclose()
