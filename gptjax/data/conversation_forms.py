"""Parses records of conversations and rankings in the formats of OpenAI, ShareGPT, TRL, Alpaca and others.

A field that affects the model's input or targets is either read, or the record is refused with the field's name. Other
fields, such as ids and scores, are ignored. An empty or null field counts as absent.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from gptjax.config import UserError
from gptjax.data.images.image_references import FROM_RECORD, IMAGE, ImageReference, parse_parts, placed, record_images

Role = Literal["system", "user", "assistant", "tool", "document"]
Channel = Literal["analysis", "commentary", "final"]
# Case-insensitive. OpenAI's role developer replaces system.
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "bard", "bing", "model"), "assistant"),
}
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_SYSTEM_FIELDS = ("system", "system_prompt")
_IMAGE_FORMS = (("question", "answer"), ("caption",), ("text",))  # of records that name images
_TOOL_FIELDS = ("tools", "functions", "tool_calls", "function_call")  # in records and messages
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")  # in messages
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")  # Bai et al. 2022, "Training a Helpful and Harmless Assistant"


@dataclasses.dataclass(frozen=True)
class RequestOptions:
    """Fields of a request to OpenAI's API other than its messages; only the harmony format writes them.

    Attributes:
      tools: JSON list of functions, each with name, description and parameters; empty: no functions.
      response_format: JSON object with name, description and schema of structured output; empty: none.
      reasoning_effort: low, medium or high; None: that of the config.
      model_identity: first line of the system message; None: that of the config.
    """

    tools: str = ""
    response_format: str = ""
    reasoning_effort: str | None = None
    model_identity: str | None = None


@dataclasses.dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Attributes:
      role: of the author; "document": a text with images, to train on as in pretraining, alone and without a template.
        "tool" and the fields below are read and written only by the harmony format.
      content: the text.
      channel: of an assistant's or a tool's message; None: final.
      recipient: whom the message is for: in an assistant's message the tool that it calls, such as "functions.add".
      content_type: type of a call's content, such as "<|constrain|>json".
      name: of the tool that wrote the message, such as "functions.add", or of the user.
      options: of a system message.
      images: of a user's message or a document, one for each `<image>` in the content.
    """

    role: Role
    content: str
    channel: Channel | None = None
    recipient: str | None = None
    content_type: str | None = None
    name: str | None = None
    options: RequestOptions | None = None
    images: tuple[ImageReference, ...] = ()

    @property
    def is_call(self) -> bool:
        """Whether the assistant calls a tool."""
        return self.role == "assistant" and self.recipient is not None

    @property
    def is_final(self) -> bool:
        """Whether it is the assistant's message to the user, in the channel final."""
        return self.role == "assistant" and self.channel in (None, "final") and self.recipient is None


class RankedTexts(NamedTuple):
    """Completions of one prompt, best first."""

    prompt: tuple[Message, ...]
    completions: tuple[str, ...]


def conversation_messages(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """Parses a record in one of the formats of `conversations.read_conversations`; the order of roles is not checked.

    Raises:
      UserError: the record has none of the formats or two at once, or a message cannot be read.
    """
    _refuse_tools(record, place)
    forms = (("messages",), ("conversations",), ("instruction", "output"), ("prompt", "completion"))
    # Only one format may be non-empty; if all are empty, an empty one gets a specific error message.
    found = [form for form in forms if all(_has(record, name) for name in form)] or [
        form for form in forms if all(record.get(name) is not None for name in form)
    ][:1]
    if not found and record_images(record, place) is not None:
        found = [form for form in _IMAGE_FORMS if all(_has(record, name) for name in form)]
    if len(found) > 1:
        names = " and ".join(form[0] for form in found)
        raise UserError(f"{place} has {names}, two forms of a conversation: keep one")
    if not found:
        if all(_has(record, name) for name in ("chosen", "rejected")):
            raise UserError(f"{place} is a ranking (chosen, rejected), where a conversation is expected")
        raise UserError(
            f"{place} has neither messages nor conversations, nor instruction and output, nor prompt and completion: "
            f"it has {', '.join(record) or 'nothing'}"
        )
    match found[0]:
        case ("instruction", _):
            messages = _alpaca(record, place)
        case ("question", _):
            messages = (
                *_prompt(_with_image(record["question"], record, place), place),
                *_completion(record["answer"], place, "answer"),
            )
        case ("text",) if IMAGE in str(record["text"]) or not record_images(record, place):
            messages = (Message("document", parse_content(record["text"], f"{place}: text")),)
        case ("caption" | "text",) as form:
            messages = (*_prompt(_with_image("", record, place), place), *_completion(record[form[0]], place, form[0]))
        case (name,):
            messages = _turns(record[name], place, name)
        case _:
            messages = _prompt(record["prompt"], place) + _completion(record["completion"], place, "completion")
    return _with_images(record, _with_system(record, messages, place), place)


def prompt_messages(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """Parses a record for `conversations.read_prompts`: a conversation, a prompt alone, or the prompt of a ranking."""
    if _has(record, "ranking") or (_has(record, "chosen") and _has(record, "rejected")):
        return ranked_texts(record, place).prompt
    if _has(record, "prompt") and not _has(record, "completion"):
        _refuse_tools(record, place)
        messages = _prompt(record["prompt"], place)
        for name in ("messages", "conversations"):
            if _has(record, name) and messages[-1] not in _turns(record[name], place, name):
                raise UserError(f"{place} has a prompt that is not in its {name}: keep one of the two")
        return _with_images(record, _with_system(record, messages, place), place)
    return conversation_messages(record, place)


def ranked_texts(record: Mapping[str, Any], place: str) -> RankedTexts:
    """Parses a ranking in one of the formats of `conversations.read_rankings`.

    Raises:
      UserError: the record has none of the formats, its parts contradict each other, or a message cannot be read.
    """
    _refuse_tools(record, place)
    names: tuple[str, ...] = ("chosen", "rejected")
    completions = [record[name] for name in names if _has(record, name)]
    if _has(record, "ranking"):
        if completions:
            raise UserError(f"{place} has both a ranking and chosen or rejected: keep one")
        completions = record["ranking"]
        if not isinstance(completions, list):
            raise UserError(f"{place}: ranking is not a list of completions but {str(completions)[:40]!r}")
        names = tuple(f"ranking[{i}]" for i in range(len(completions)))
    elif len(completions) < 2:
        raise UserError(f"{place} has neither a ranking nor both chosen and rejected: it has {', '.join(record)}")
    prompt = _ranking_prompt(record, place)
    if prompt is None and all(isinstance(completion, str) and _HH_TURN.match(completion) for completion in completions):
        completions = [_hh(completion, f"{place}: {name}") for completion, name in zip(completions, names, strict=True)]
    lists = [isinstance(completion, list | Mapping | tuple) for completion in completions]
    if completions and all(lists):
        prompt, texts = _common_prompt(record, prompt, completions, names, place)
    elif any(lists):
        raise UserError(f"{place} has some completions that are texts and some that are messages: use one form")
    else:
        texts = [
            parse_content(completion, f"{place}: {name}") for completion, name in zip(completions, names, strict=True)
        ]
        if prompt is None:
            raise UserError(f"{place} has no prompt for its completions: it has {', '.join(record)}")
    return RankedTexts(_with_images(record, _with_system(record, prompt, place), place), tuple(texts))


def _with_image(question: Any, record: Mapping[str, Any], place: str) -> Any:
    """Puts the images of a record before a question, unless it says where they are."""
    if not isinstance(question, str) or IMAGE in question:
        return question
    return IMAGE * len(record_images(record, place) or []) + (f"\n{question}" if question else "")


# --- parts of records -------------------------------------------------------------------------------------------------


def _has(record: Mapping[str, Any], name: str) -> bool:
    """Whether a field is neither absent, null nor empty."""
    value = record.get(name)
    return value is not None and not (hasattr(value, "__len__") and len(value) == 0)


def _refuse_tools(record: Mapping[str, Any], place: str) -> None:
    if names := [name for name in _TOOL_FIELDS if _has(record, name)]:
        raise UserError(
            f"{place} has {names[0]}, but tool calls are not supported here: remove it, or set chat.template=harmony, "
            "which reads tools and tool_calls of conversations and prompts"
        )


def _with_system(record: Mapping[str, Any], messages: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    """Prepends the system message that a field of the record holds, if any."""
    given = [name for name in _SYSTEM_FIELDS if _has(record, name)]
    systems = {name: parse_content(record[name], f"{place}: {name}", may_be_empty=True) for name in given}
    for name, text in systems.items():
        if not text.strip():
            continue
        if messages and messages[0].role == "system":
            if messages[0].content.strip() != text.strip():
                raise UserError(f"{place} has {name} and a different system message in its messages: keep one")
        else:
            messages = (Message("system", text), *messages)
    return messages


def _with_images(record: Mapping[str, Any], messages: tuple[Message, ...], place: str) -> tuple[Message, ...]:
    """Gives the messages the images that a field of the record names, in the order of the `<image>`s of their texts.

    Raises:
      UserError: an `<image>` too many or too few, or an image in a message that is not a user's.
    """
    images = placed([m.content for m in messages], [m.images for m in messages], record_images(record, place), place)
    for message, of_message in zip(messages, images, strict=True):
        if of_message and message.role not in ("user", "document"):
            raise UserError(f"{place} has an image in a message of role {message.role}: only a user's may have images")
    return tuple(dataclasses.replace(m, images=found) for m, found in zip(messages, images, strict=True))


def _turns(turns: Any, place: str, name: str) -> tuple[Message, ...]:
    """Parses a list of messages, or the equivalent dict of lists of tensorflow-datasets."""
    if isinstance(turns, Mapping):
        try:
            turns = [dict(zip(turns, values, strict=True)) for values in zip(*turns.values(), strict=True)]
        except (TypeError, ValueError):
            raise UserError(f"{place}: the lists of {name} differ in length") from None
    if not isinstance(turns, list | tuple):
        raise UserError(f"{place}: {name} is not a list but {str(turns)[:40]!r}")
    messages = [
        turn if isinstance(turn, Message) else parse_message(turn, f"{place}: {name}[{i}]")
        for i, turn in enumerate(turns)
    ]
    return tuple(message for message in messages if message is not None)


def parse_message(turn: Any, place: str) -> Message | None:
    """Parses a message with role and content, or ShareGPT's from and value; None for an empty system message."""
    keys = [keys for keys in (("role", "content"), ("from", "value")) if isinstance(turn, Mapping) and keys[0] in turn]
    if not keys or not (keys[0][1] in turn or any(_has(turn, name) for name in _TOOL_FIELDS)):
        raise UserError(f"{place} is not an object with role and content, or from and value")
    role_key, content_key = keys[0]
    name = turn[role_key].lower() if isinstance(turn[role_key], str) else None
    if name in _TOOL_ROLES:
        raise UserError(
            f"{place} has the {role_key} {name!r}, but tool calls are not supported here: remove the "
            "record, or set chat.template=harmony, which reads them in conversations and prompts"
        )
    _refuse_tools(turn, place)
    if reasoning := [field for field in REASONING_FIELDS if _has(turn, field)]:
        raise UserError(
            f"{place} has {reasoning[0]}, which this template does not support: remove it, write it into "
            "the content, or set chat.template=harmony"
        )
    if turn.get("channel") in ("analysis", "commentary"):
        raise UserError(f"{place} is of channel {turn['channel']}: remove it, or set chat.template=harmony")
    if name not in ROLES:
        raise UserError(f"{place} has the unknown {role_key} {str(turn[role_key])[:40]!r}: one of {', '.join(ROLES)}")
    role = ROLES[name]
    if role == "assistant" and turn.get("weight") not in (None, 1):
        raise UserError(f"{place} has weight {turn['weight']!r}, but completions are not weighted: remove the record")
    value, images = parse_parts(turn[content_key], place)
    content = parse_content(value, place, may_be_empty=role == "system")
    return Message(role, content, images=images) if content.strip() else None


def parse_content(value: Any, place: str, may_be_empty: bool = False) -> str:
    """Parses a text, or OpenAI's list of parts if all are text."""
    if isinstance(value, list) and value and all(isinstance(part, Mapping) and "type" in part for part in value):
        other = [part["type"] for part in value if part["type"] != "text" or not isinstance(part.get("text"), str)]
        if other:
            raise UserError(f"{place}: the content has a part of type {str(other[0])[:40]!r}, but only text is read")
        value = "".join(part["text"] for part in value)
    if value is None and may_be_empty:
        return ""
    if value is None:
        raise UserError(f"{place}: the content is null: remove the record, or add the text")
    if not isinstance(value, str):
        raise UserError(f"{place}: the content is not a text but {str(value)[:40]!r}")
    if not may_be_empty and (not value or value.isspace()):
        raise UserError(f"{place}: the content is empty: remove the record, or add the text")
    return re.sub("[\ud800-\udfff]", "\ufffd", value)  # unpaired surrogates, which JSON may hold but UTF-8 cannot


def _alpaca(record: Mapping[str, Any], place: str) -> tuple[Message, ...]:
    """Parses Alpaca's instruction, optional input, and output; `history` has earlier (instruction, output) pairs."""
    messages: list[Message] = []
    history = record.get("history") or []
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise UserError(f"{place}: history is not a list of (instruction, output) pairs")
    for i, (question, completion) in enumerate(history):
        messages.append(Message("user", parse_content(question, f"{place}: history[{i}]")))
        messages.append(Message("assistant", parse_content(completion, f"{place}: history[{i}]")))
    asked = parse_content(record["instruction"], f"{place}: instruction")
    given = parse_content(record.get("input"), f"{place}: input", may_be_empty=True)
    messages.append(Message("user", f"{asked}\n\n{given}" if given.strip() else asked))
    return (*messages, Message("assistant", parse_content(record["output"], f"{place}: output")))


def _prompt(value: Any, place: str) -> tuple[Message, ...]:
    """Parses a user's message, or a list of messages."""
    if isinstance(value, str):
        return (Message("user", parse_content(value, f"{place}: prompt")),)
    messages = _turns(value, place, "prompt")
    if not messages:
        raise UserError(f"{place}: prompt has no message")
    return messages


def _completion(value: Any, place: str, name: str) -> tuple[Message, ...]:
    """Parses an assistant's message, or a list of messages."""
    if isinstance(value, str):
        return (Message("assistant", parse_content(value, f"{place}: {name}")),)
    return _turns(value, place, name)


def _ranking_prompt(record: Mapping[str, Any], place: str) -> tuple[Message, ...] | None:
    found = {name: _prompt(record[name], place) for name in ("prompt",) if _has(record, name)}
    found |= {name: _turns(record[name], place, name) for name in ("messages", "conversations") if _has(record, name)}
    if "prompt" in found and len(found) > 1:
        # UltraFeedback also has the chosen conversation as `messages`.
        for name, messages in found.items():
            if found["prompt"] != messages[: len(found["prompt"])] and found["prompt"][-1] not in messages:
                raise UserError(f"{place} has a prompt that is not in its {name}: keep one of the two")
        return found["prompt"]
    if len(found) > 1:
        raise UserError(f"{place} has {' and '.join(found)}: keep one")
    return next(iter(found.values()), None)


def _common_prompt(
    record: Mapping[str, Any],
    prompt: tuple[Message, ...] | None,
    completions: Sequence[Any],
    names: Sequence[str],
    place: str,
) -> tuple[tuple[Message, ...], list[str]]:
    """Returns the prompt and the completions, given as lists of messages with or without the prompt."""
    given = [
        _placed_at(place, _turns(completion, place, name)) for completion, name in zip(completions, names, strict=True)
    ]
    prompt = None if prompt is None else _placed_at(place, prompt)
    begins = {bool(messages) and messages[0].role == "assistant" for messages in given}
    if begins == {True}:
        if prompt is None:
            raise UserError(f"{place} has no prompt for its completions: it has {', '.join(record)}")
        given = [(*prompt, *messages) for messages in given]
    elif prompt is not None:
        for messages, name in zip(given, names, strict=True):
            asked = [message.content.strip() for message in messages if message.role == "user"]
            if prompt[-1].content.strip() not in asked:
                raise UserError(f"{place}: the prompt is {prompt[-1].content[:40]!r}, which {name} does not contain")
            if len(prompt) > 1 and messages[: len(prompt)] != prompt:
                raise UserError(f"{place}: the conversation {name} does not begin with the prompt")
    whole = {messages[:-1] for messages in given}
    if len(whole) > 1 or any(not messages or messages[-1].role != "assistant" for messages in given):
        raise UserError(f"{place}: the conversations must differ only in the last completion")
    return whole.pop(), [messages[-1].content for messages in given]


def _placed_at(place: str, messages: Sequence[Message]) -> tuple[Message, ...]:
    """Names the record as the place of all images, so that messages with the same images are equal."""
    return tuple(
        dataclasses.replace(
            message,
            images=tuple(
                image if image == FROM_RECORD else dataclasses.replace(image, place=place) for image in message.images
            ),
        )
        for message in messages
    )


def _hh(text: str, place: str) -> tuple[Message, ...]:
    """Parses a dialogue of Anthropic's HH data: turns that begin with "\\n\\nHuman:" and "\\n\\nAssistant:"."""
    _, *parts = _HH_TURN.split(text)
    roles: dict[str, Role] = {"Human": "user", "Assistant": "assistant"}
    return tuple(
        Message(roles[name], parse_content(said.strip(), place))
        for name, said in zip(parts[::2], parts[1::2], strict=True)
    )
