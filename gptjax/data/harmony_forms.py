"""Parses records for the harmony format: reasoning, channels, tools and their calls, in OpenAI's JSON fields.

The other forms of a conversation, and all other fields of a message, are those of `conversation_forms`.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from gptjax.config import UserError
from gptjax.data.conversation_forms import (
    REASONING_FIELDS,
    ROLES,
    Channel,
    Message,
    RequestOptions,
    parse_content,
    parse_message,
)
from gptjax.data.images.image_references import written_parts

CONSTRAIN = "<|constrain|>"  # begins a content type that constrains sampling, such as <|constrain|>json
REASONING_EFFORTS = ("low", "medium", "high")
_NAME = re.compile(r"[^\s<>]+")  # of tools, functions and users, and content types
_CHANNELS: tuple[Channel, ...] = get_args(Channel)
_LISTS = ("messages", "conversations", "prompt", "completion")  # fields with messages, in the order of the conversation
_CHANNEL_FIELDS = ("channel", "recipient", "content_type")
_OPTIONS = ("tools", "response_format", "reasoning_effort", "model_identity")


def parse_record(
    record: Mapping[str, Any],
    place: str,
    parse: Callable[[Mapping[str, Any], str], tuple[Message, ...]],
) -> tuple[Message, ...]:
    """Parses a record with the fields of the harmony format.

    Args:
      record: may have `tools`, `response_format`, `reasoning_effort` and `model_identity`. Its messages may be of role
        tool, and those of the assistant may have `thinking` (or `reasoning_content`, `reasoning`) and `tool_calls`, or
        instead `channel`, `recipient` and `content_type`. Each becomes the messages of the harmony format.
      parse: parses the rest of the record, as `conversation_forms.conversation_messages` does.

    Raises:
      UserError: as in `parse`, or a field is malformed.
    """
    if record.get("builtin_tools"):
        raise UserError(f"{place} has builtin_tools, but only tools, a list of functions, are supported: remove it")
    options = parse_options(record, place)
    plain: dict[str, Any] = {name: value for name, value in record.items() if name not in _OPTIONS}
    calls: dict[str, Message] = {}
    for name in _LISTS:
        if isinstance(record.get(name), list | tuple):
            turns = enumerate(record[name])
            plain[name] = [part for i, turn in turns for part in _parts(turn, calls, f"{place}: {name}[{i}]")]
    return with_options(parse(plain, place), options)


def with_options(messages: Sequence[Message], options: RequestOptions | None) -> tuple[Message, ...]:
    """Returns the messages with options in their system message, which is added if there is none."""
    if options is None:
        return tuple(messages)
    if messages and messages[0].role == "system":
        return (dataclasses.replace(messages[0], options=options), *messages[1:])
    return (Message("system", "", options=options), *messages)


def check_turns(messages: Sequence[Message], place: str) -> None:
    """Checks the order of messages.

    Raises:
      UserError: turns do not begin with a user's message, have other messages after the final one or none, or results
        and calls of tools do not alternate.
    """
    before: Message | None = None
    for i, message in enumerate(messages):
        if message.role == "system" and i == 0:
            continue
        where = f"{place}: message {i} of the harmony format, {_described(message)},"
        is_answered = before is None or before.is_final
        after = "is the first one" if before is None else f"comes after {_described(before)}"
        if message.role == "system":
            raise UserError(f"{where} {after}: a conversation has one system message, the first")
        if message.role == "user" and not is_answered:
            raise UserError(f"{where} {after}, where a message of the final channel is expected")
        if message.role != "user" and is_answered:
            raise UserError(f"{where} {after}, where a user's is expected")
        if (message.role == "tool") != (before is not None and before.is_call):
            raise UserError(f"{where} {after}: a call is followed by its result, and a result follows its call")
        before = message


def without_unanswered(messages: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    """Removes messages after the assistant's last; raises UserError if there is none, or it is unfinished."""
    last = max((i for i, message in enumerate(messages) if message.role == "assistant"), default=None)
    if last is None:
        raise UserError(f"{place} has no completion by the assistant to train on: remove it")
    if not (messages[last].is_final or messages[last].is_call):
        raise UserError(f"{place} ends in {_described(messages[last])}, without a final message: add one, or remove it")
    return messages[: last + 1]


def written(messages: Sequence[Message]) -> dict[str, Any]:
    """Returns a JSON object that `parse_record` reads as these messages."""
    record: dict[str, Any] = {}
    turns = []
    has_videos = any(image.frame is not None for message in messages for image in message.images)
    for message in messages:
        fields = {name: value for name, value in vars(message).items() if value is not None}
        options = fields.pop("options", None)
        if options is not None:
            record |= {name: value for name, value in vars(options).items() if value}
            record |= {name: json.loads(record[name]) for name in ("tools", "response_format") if name in record}
        images = fields.pop("images")
        if images and has_videos:
            fields["content"] = written_parts(message.content, images)
        elif images:
            record["images"] = [*record.get("images", []), *(image.source for image in images)]
        if message.role != "system" or message.content:
            turns.append(fields)
    return {"messages": turns, **record}


def _described(message: Message) -> str:
    """Names a message for error messages."""
    if message.is_call:
        return f"a call of {message.recipient}"
    if message.role == "tool":
        return f"a result of {message.name}"
    return "the user's" if message.role == "user" else f"the {message.role}'s in channel {message.channel or 'final'}"


# --- messages ---------------------------------------------------------------------------------------------------------


def _parts(turn: Any, calls: dict[str, Message], place: str) -> list[Any]:
    """Returns the messages of a turn if it has a field of the harmony format, otherwise the turn as it is.

    Args:
      calls: the calls so far, by their ids; the last one also by "".
    """
    if not isinstance(turn, Mapping) or "role" not in turn:
        return [turn]
    role = str(turn["role"]).lower()
    if role == "tool":
        return [_result(turn, calls, place)]
    if ROLES.get(role) == "user" and turn.get("name") is not None:
        message = parse_message(turn, place)
        return [] if message is None else [dataclasses.replace(message, name=_name(turn["name"], f"{place}: name"))]
    if ROLES.get(role) != "assistant":
        return [turn]
    by_channel = [name for name in _CHANNEL_FIELDS if turn.get(name) is not None]
    thoughts = {name: parse_content(turn[name], f"{place}: {name}") for name in REASONING_FIELDS if turn.get(name)}
    if by_channel and (thoughts or turn.get("tool_calls")):
        raise UserError(f"{place} has {by_channel[0]} and {[*thoughts, 'tool_calls'][0]}: write two messages")
    if len(set(thoughts.values())) > 1:
        raise UserError(f"{place} has {' and '.join(thoughts)}, which differ: keep one")
    plain = {name: turn[name] for name in ("role", "content", "weight", "function_call") if name in turn}
    if by_channel:
        return [_channel_message(turn, plain, calls, place)]
    parts = [Message("assistant", text, "analysis") for text in list(thoughts.values())[:1]]
    found = turn.get("tool_calls") or []
    if not isinstance(found, list) or len(found) > 1:
        raise UserError(f"{place}: tool_calls is not a list of one call: write a message for each, and its result")
    if not found or turn.get("content"):
        message = parse_message(plain, place)
        assert message is not None  # only a system message may be empty
        parts.append(dataclasses.replace(message, channel="commentary" if found else "final"))
    return parts + [_call(call, calls, f"{place}: tool_calls") for call in found]


def _channel_message(
    turn: Mapping[str, Any], plain: Mapping[str, Any], calls: dict[str, Message], place: str
) -> Message:
    """Parses an assistant's message with channel, recipient or content_type, the fields of the format itself."""
    channel = turn.get("channel") or "final"
    if channel not in _CHANNELS:
        raise UserError(f"{place} has the unknown channel {str(channel)[:40]!r}: one of {', '.join(_CHANNELS)}")
    message = parse_message(plain, place)
    assert message is not None
    recipient, content_type = turn.get("recipient"), turn.get("content_type")
    if content_type is not None:
        prefix = CONSTRAIN if str(content_type).startswith(CONSTRAIN) else ""
        content_type = prefix + _name(str(content_type).removeprefix(CONSTRAIN), f"{place}: content_type")
    recipient = None if recipient in (None, "all") else _name(recipient, f"{place}: recipient")
    found = dataclasses.replace(message, channel=channel, recipient=recipient, content_type=content_type)
    if recipient is not None:
        calls[""] = found
    return found


def _call(call: Any, calls: dict[str, Message], place: str) -> Message:
    """Parses an element of tool_calls, whose arguments are JSON, as a text or an object."""
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str | Mapping):
        raise UserError(f"{place} has a call that is not an object with function, and its name and arguments")
    arguments = function["arguments"]
    if isinstance(arguments, Mapping):
        arguments = json.dumps(arguments, ensure_ascii=False)
    recipient = f"functions.{_name(function.get('name'), f'{place}: name')}"
    message = Message("assistant", parse_content(arguments, place), "commentary", recipient, f"{CONSTRAIN}json")
    calls[str(call.get("id") or "")] = calls[""] = message
    return message


def _result(turn: Mapping[str, Any], calls: Mapping[str, Message], place: str) -> Message:
    """Parses a message of role tool, the result of the call with its tool_call_id, or else of the last call."""
    call = calls.get(str(turn.get("tool_call_id") or ""))
    if call is None:
        raise UserError(f"{place} is the result of no call before it: give it the tool_call_id of one")
    name = turn.get("name") or call.recipient
    if name not in (call.recipient, str(call.recipient).removeprefix("functions.")):
        raise UserError(f"{place} is a result of {name}, but the call before it is of {call.recipient}")
    channel = turn.get("channel") or "commentary"
    if channel not in _CHANNELS:
        raise UserError(f"{place} has the unknown channel {str(channel)[:40]!r}: one of {', '.join(_CHANNELS)}")
    content = parse_content(turn.get("content"), place, may_be_empty=True)
    return Message("tool", content, channel, "assistant", name=call.recipient)


def _name(value: Any, place: str) -> str:
    if not isinstance(value, str) or not _NAME.fullmatch(value):
        raise UserError(f"{place} is not a name but {str(value)[:40]!r}: a name has no white space, < or >")
    return value


# --- options ----------------------------------------------------------------------------------------------------------


def parse_options(record: Mapping[str, Any], place: str) -> RequestOptions | None:
    """Parses a record's request options; None if it has none. Raises UserError if one is malformed."""
    if not any(record.get(name) for name in _OPTIONS):
        return None
    effort, identity = record.get("reasoning_effort") or None, record.get("model_identity") or None
    if effort is not None and effort not in REASONING_EFFORTS:
        names = ", ".join(REASONING_EFFORTS)
        raise UserError(f"{place} has reasoning_effort {str(effort)[:40]!r}: one of {names}")
    if identity is not None:
        identity = parse_content(identity, f"{place}: model_identity")
    return RequestOptions(
        _functions(record.get("tools") or [], f"{place}: tools"),
        _response_format(record.get("response_format") or {}, f"{place}: response_format"),
        effort,
        identity,
    )


def _functions(tools: Any, place: str) -> str:
    """Returns OpenAI's list of tools as JSON of `RequestOptions`."""
    if not isinstance(tools, list):
        raise UserError(f"{place} is not a list but {str(tools)[:40]!r}")
    functions = []
    for i, tool in enumerate(tools):
        here = f"{place}[{i}]"
        if not isinstance(tool, Mapping) or tool.get("type", "function") != "function":
            raise UserError(f"{here} is not an object of type function: remove it")
        function = tool.get("function", tool)
        if not isinstance(function, Mapping) or not isinstance(function.get("parameters") or {}, Mapping):
            raise UserError(f"{here} is not a function with name, description and parameters, a JSON schema")
        description = parse_content(function.get("description"), here, may_be_empty=True)
        fields = {"name": _name(function.get("name"), f"{here}: name"), "description": description}
        functions.append(fields | {"parameters": function.get("parameters")})
    return json.dumps(functions, ensure_ascii=False) if functions else ""


def _response_format(given: Any, place: str) -> str:
    """Returns OpenAI's response_format as JSON of `RequestOptions`; empty for plain text."""
    kind = given.get("type") if isinstance(given, Mapping) else None
    if given in ({}, {"type": "text"}):
        return ""
    form = given.get("json_schema", given) if isinstance(given, Mapping) else None
    if (
        kind not in (None, "json_schema")
        or not isinstance(form, Mapping)
        or not isinstance(form.get("schema"), Mapping)
    ):
        raise UserError(f"{place} is not of type json_schema, with json_schema that has name and schema")
    fields = {
        "name": parse_content(form.get("name"), f"{place}: name"),
        "description": parse_content(form.get("description"), place, may_be_empty=True),
        "schema": form["schema"],
    }
    return json.dumps(fields, ensure_ascii=False)
