"""POST /v1/responses: text, whole or streamed, without stored state."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptjax.serving.answering import Answer, Serving
from gptjax.serving.api_errors import ApiError, invalid
from gptjax.serving.chat_endpoint import ChatPlan, plan_chat
from gptjax.serving.chat_prompts import conversation, text_of
from gptjax.serving.completion_settings import completion_settings, response_structure, tools_of, without_nulls
from gptjax.serving.event_stream import collected, event_stream
from gptjax.serving.request_schemas import RESPONSES_REQUEST
from gptjax.serving.response_writer import ResponseWriter
from gptjax.serving.served_models import GenerativeModel


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
    shown, tools = tools_of(_chat_tools(body))
    places, messages = _messages(body)
    turns = conversation(
        model.chat_form,
        messages,
        tools=shown,
        response_format=response_format,
        reasoning_effort=without_nulls(body.get("reasoning", {})).get("effort"),
        places=places,
    )
    return plan_chat(
        model,
        turns,
        completion_settings(
            {name: value for name, value in body.items() if name != "stream_options"}, model.vocab_size
        ),
        max_tokens=body.get("max_output_tokens"),
        form=response_structure(response_format),
        form_param="tools" if response_structure(response_format) is None else "text.format",
        tools=tools,
        top_logprobs=int(body.get("top_logprobs", 0)),
        documents=serving.documents if body.get("retrieval", True) else None,
        drop_turns=body.get("truncation") == "auto",
    )


def _chat_tools(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `tools` and what belongs to them as a chat completion has them."""
    found = {name: body[name] for name in ("tool_choice", "parallel_tool_calls") if name in body}
    if isinstance(found.get("tool_choice"), dict):
        found["tool_choice"] = {"type": "function", "function": {"name": found["tool_choice"]["name"]}}
    functions = [{name: value for name, value in tool.items() if name != "type"} for tool in body.get("tools", [])]
    return {**found, "tools": [{"type": "function", "function": without_nulls(function)} for function in functions]}


def _messages(body: Mapping[str, Any]) -> tuple[list[str], list[dict[str, Any]]]:
    """Returns the places in the request, and the input as messages of a chat completion.

    Reasoning and calls belong to one message of the assistant, with its text.
    """
    places, messages = list[str](), list[dict[str, Any]]()

    def add(place: str, message: dict[str, Any]) -> None:
        places.append(place)
        messages.append(message)

    if body.get("instructions"):
        add("instructions", {"role": "system", "content": body["instructions"]})
    if isinstance(body["input"], str):
        add("input", {"role": "user", "content": body["input"]})
        return places, messages
    reasoning = ""
    for i, item in enumerate(body["input"]):
        place, kind = f"input[{i}]", item.get("type") or "message"
        if kind == "reasoning":
            reasoning += "".join(part["text"] for part in item.get("content") or [])
            continue
        is_answer = kind == "function_call" or (kind == "message" and item["role"] == "assistant")
        if reasoning and not is_answer:
            raise invalid(f"{place} follows reasoning, but is not the assistant's message", place)
        if kind == "function_call":
            if reasoning or not messages or messages[-1]["role"] != "assistant":
                add(place, {"role": "assistant", "content": None})
            function = {"name": item["name"], "arguments": item["arguments"]}
            call = {"id": item["call_id"], "type": "function", "function": function}
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            add(place, {"role": "tool", "tool_call_id": item["call_id"], "content": text_of(item["output"])})
        else:
            add(place, {"role": item["role"], "content": _content(item["content"])})
        if reasoning:
            messages[-1]["reasoning"] = reasoning
            reasoning = ""
    if not messages:
        raise invalid("input has no message", "input")
    return places, messages


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
