"""Prompts of chat completions: a request's messages as the conversation that a chat format encodes."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.data.conversation_forms import Message, RequestOptions
from gptjax.data.harmony import HarmonyFormat
from gptjax.data.harmony_forms import CONSTRAIN, parse_options, with_options
from gptjax.data.images.image_references import ImageReference, parse_parts
from gptjax.data.templates import ChatFormat
from gptjax.serving.api_errors import invalid
from gptjax.serving.grammars import CALL_BEGINS, CALL_ENDS, call_head

_TOOLS_INTRODUCTION = (
    "You may call functions to help with the user's request. Their signatures, one JSON object a line:\n<tools>\n"
)
_TOOLS_FORM = (
    "\n</tools>\nTo call a function, write its name and arguments as JSON:\n"
    f'{CALL_BEGINS}\n{{"name": "NAME", "arguments": {{...}}{CALL_ENDS}'
)


def conversation(
    form: ChatFormat,
    messages: Sequence[Mapping[str, Any]],
    *,
    tools: Sequence[Mapping[str, Any]] = (),
    response_format: Mapping[str, Any] | None = None,
    reasoning_effort: str | None = None,
    places: Sequence[str] | None = None,
) -> list[Message]:
    """Converts messages in OpenAI's form, checked against their schema.

    A model of the harmony format reads tools and response format in its own form. For other formats tools and their
    calls are text, in the form that `grammars` describes, and results are messages of the user.

    Args:
      places: where in the request each message is; None: "messages[0]" and so on.

    Raises:
      ApiError: 400: a result without its call, a call without its result, a system message behind others, or an image
        that is no data: URL or that the model does not read.
      UserError: a text next to images has an `<image>` of its own.
    """
    places = [f"messages[{i}]" for i in range(len(messages))] if places is None else places
    _check_images(form, messages, places)
    if isinstance(form, HarmonyFormat):
        options = _options(tools, response_format, reasoning_effort)
        return list(with_options(_harmony(messages, places), options))
    if reasoning_effort is not None:
        raise invalid("reasoning_effort needs a model of the harmony format", "reasoning_effort")
    found = _as_text(messages, places)
    if tools:
        listed = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
        block = f"{_TOOLS_INTRODUCTION}{listed}{_TOOLS_FORM}"
        if found[0].role == "system":
            found[0] = Message("system", f"{found[0].content}\n\n{block}")
        else:
            found.insert(0, Message("system", block))
    return found


def text_of(content: Any) -> str:
    """Returns the text of a message's content: a text, parts, or null."""
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part["text"] for part in content)


def _check_images(form: ChatFormat, messages: Sequence[Mapping[str, Any]], places: Sequence[str]) -> None:
    """Refuses images that a model does not read, and those that the server would have to fetch."""
    for of_message, message in zip(places, messages, strict=True):
        for j, part in enumerate(message["content"] if isinstance(message.get("content"), list) else ()):
            if part["type"] != "image_url":
                continue
            place = f"{of_message}.content[{j}]"
            if message["role"] != "user":
                raise invalid(f"{place}: only messages of role user have images", place)
            if form.image_token is None:
                raise invalid(f"{place} is an image, but this model reads text alone", place)
            if not part["image_url"]["url"].startswith("data:"):
                raise invalid(f"{place}: the server fetches no images: send a data: URL in base64", place)


def _with_images(content: Any, place: str) -> tuple[str, tuple[ImageReference, ...]]:
    """The text of a content, with `<image>` for each image, and the images."""
    text, images = parse_parts(content, place)
    return text_of(text), images


def _options(
    tools: Sequence[Mapping[str, Any]], response_format: Mapping[str, Any] | None, reasoning_effort: str | None
) -> RequestOptions | None:
    record: dict[str, Any] = {"tools": list(tools), "reasoning_effort": reasoning_effort}
    if response_format is not None and response_format["type"] == "json_schema":
        given = response_format["json_schema"]
        record["response_format"] = {**response_format, "json_schema": {"schema": {}, **given}}
    return parse_options(record, "the request")


class _Calls:
    """Pairs the calls of the last assistant's message with their results."""

    def __init__(self) -> None:
        self._open: dict[str, Mapping[str, Any]] = {}

    def begin(self, calls: Sequence[Mapping[str, Any]]) -> None:
        self._open = {call["id"]: call["function"] for call in calls}

    def result(self, message: Mapping[str, Any], place: str) -> Mapping[str, Any]:
        """Returns the function that a message of role tool is the result of."""
        call = self._open.pop(message["tool_call_id"], None)
        if call is None:
            raise invalid(
                f"{place} is the result of no call: its tool_call_id must be that of a call in the last message of "
                "the assistant",
                f"{place}.tool_call_id",
            )
        return call

    def check_closed(self, place: str) -> None:
        if self._open:
            name = next(iter(self._open))
            raise invalid(f"{place}: the call {name!r} before it has no result: add a message of role tool", place)


def _harmony(messages: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[Message]:
    """Converts messages for the harmony format; each call is followed by its result."""
    found: list[Message] = []
    calls = _Calls()
    for place, message in zip(places, messages, strict=True):
        role, content = message["role"], text_of(message.get("content"))
        if role == "tool":
            function = calls.result(message, place)
            name = f"functions.{function['name']}"
            found.append(Message("assistant", function["arguments"], "commentary", name, f"{CONSTRAIN}json"))
            found.append(Message("tool", content, "commentary", "assistant", name=name))
            continue
        calls.check_closed(place)
        if role in ("system", "developer"):
            if any(other.role != "system" for other in found):
                raise invalid(f"{place}: in the harmony format system messages come before all others", place)
            joined = "\n\n".join([*(other.content for other in found), content])
            found = [Message("system", joined)]
        elif role == "user":
            found.append(Message("user", content, name=message.get("name")))
        else:
            if message.get("reasoning"):
                found.append(Message("assistant", message["reasoning"], "analysis"))
            called = message.get("tool_calls") or []
            if content or not called:
                found.append(Message("assistant", content, "commentary" if called else "final"))
            calls.begin(called)
    calls.check_closed("the end of the conversation")
    return found


def _as_text(messages: Sequence[Mapping[str, Any]], places: Sequence[str]) -> list[Message]:
    """Converts messages for formats without tools."""
    found: list[Message] = []
    calls = _Calls()
    for place, message in zip(places, messages, strict=True):
        role = message["role"]
        content, images = _with_images(message.get("content"), place)
        if role == "tool":
            calls.result(message, place)
            found.append(Message("user", f"<tool_response>\n{content}\n</tool_response>"))
            continue
        calls.check_closed(place)
        if role == "assistant":
            if message.get("reasoning"):
                raise invalid(f"{place}.reasoning needs a model of the harmony format", f"{place}.reasoning")
            called = message.get("tool_calls") or []
            written = [
                f"{CALL_BEGINS}{call_head(call['function']['name'])}{call['function']['arguments']}{CALL_ENDS}"
                for call in called
            ]
            calls.begin(called)
            found.append(Message("assistant", "\n".join([content] * bool(content) + written)))
        else:
            found.append(Message("user" if role == "user" else "system", content, images=images))
    calls.check_closed("the end of the conversation")
    return found
