"""The harmony format and the package openai-harmony give the same tokens and messages."""

import itertools
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import ChatConfig
from gptjax.data.conversation_forms import Message, conversation_messages
from gptjax.data.harmony import HarmonyFormat
from gptjax.data.harmony_forms import parse_record
from gptjax.data.harmony_schema import declarations
from gptjax.data.templates import chat_format
from tests.interop.write_harmony import CASES, FIXTURE, expected, reference_encoding

openai_harmony = pytest.importorskip("openai_harmony")


@pytest.fixture(scope="module")
def encoding(tmp_path_factory):
    return reference_encoding(tmp_path_factory.mktemp("vocabulary"))


@pytest.fixture(scope="module")
def form(o200k_harmony) -> HarmonyFormat:
    found = chat_format(ChatConfig(template="harmony"), o200k_harmony)
    assert isinstance(found, HarmonyFormat)
    return found


def test_the_fixture_is_up_to_date(encoding):
    written = json.loads(FIXTURE.read_text())
    assert written == {name: expected(encoding, *case) for name, case in CASES.items()}


@given(text=st.text())
def test_texts_have_the_same_tokens(text, encoding, form):
    assert form._tokenizer.encode(text).tolist() == encoding.encode(text, disallowed_special=())


# --- conversations ----------------------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12).filter(lambda text: text.strip())
NAMES = st.from_regex(r"[a-z_]{1,8}", fullmatch=True)


@st.composite
def turns_of(draw) -> list[dict[str, Any]]:
    """A turn: a user's message, any number of calls with their results, and perhaps a final message."""
    found: list[dict[str, Any]] = [{"role": "user", "content": draw(TEXTS)}]
    for _ in range(draw(st.integers(0, 2))):
        call = {"function": {"name": draw(NAMES), "arguments": draw(TEXTS)}}
        found.append({"role": "assistant", "content": draw(st.none() | TEXTS), "tool_calls": [call]})
        found.append({"role": "tool", "content": draw(TEXTS)})
    found.append({"role": "assistant", "content": draw(TEXTS)})
    for turn in found:
        if turn["role"] == "assistant" and draw(st.booleans()):
            turn["thinking"] = draw(TEXTS)
    return found


@given(turns=st.lists(turns_of(), min_size=1, max_size=3), cut=st.integers(0, 2), system=st.none() | TEXTS)
def test_conversations_have_the_same_tokens(turns, cut, system, encoding, form):
    messages = list(itertools.chain(*turns))
    messages = messages[: len(messages) - cut]
    if system is not None:
        messages.insert(0, {"role": "system", "content": system})
    record = {"messages": messages}
    wanted, found = expected(encoding, record, {}), parse_record(record, "here", conversation_messages)
    if "prompt" in wanted:
        assert form.encode_prompt(found).tolist() == wanted["prompt"]
    while found and found[-1].role != "assistant":
        found = found[:-1]
    tokens = [form.encode(part).tokens.tolist() for part in form.training_conversations(found)]
    assert tokens == [turn["tokens"] for turn in wanted["turns"]]


def test_what_the_package_leaves_out_of_a_second_turn(encoding, form):
    """In one call it leaves out the analysis of the first turn, as we do."""
    messages = [
        *[Message("user", "2 + 2?"), Message("assistant", "Simple.", "analysis"), Message("assistant", "4", "final")],
        Message("user", "3 + 5?"),
    ]
    roles = {"user": openai_harmony.Role.USER, "assistant": openai_harmony.Role.ASSISTANT}
    theirs = [openai_harmony.Message.from_role_and_content(roles[m.role], m.content) for m in messages]
    for message, one in zip(messages, theirs, strict=True):
        one.channel = message.channel
    conversation = openai_harmony.Conversation.from_messages(theirs)
    tokens = encoding.render_conversation_for_completion(conversation, openai_harmony.Role.ASSISTANT)
    assert form.encode_prompt(messages).tolist()[-len(tokens) :] == tokens


# --- declarations -----------------------------------------------------------------------------------------------------

WORDS = st.sampled_from(["a", "A b", 'with "quotes"', "null", "two\nlines", "naïve\ttab", "crlf\r\nx", "", "x\n"])
# The package's JSON reader rounds twice: it is exact up to 15 digits and where the power of ten has no rounding error.
DECIMALS = st.builds(
    lambda digits, power: float(f"{digits}e{power}"), st.integers(-(10**15), 10**15), st.integers(-22, 7)
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**31), 2**31) | DECIMALS | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
KINDS = st.sampled_from(
    [
        *["object", "object", "object", "array", "string", "number", "integer", "boolean", "null", "other", None],
        *[["string", "null"], ["integer", "string"], [], [3]],
    ]
)
SCHEMAS = st.recursive(
    st.fixed_dictionaries({"type": KINDS}) | st.just(True),
    lambda inner: st.fixed_dictionaries(
        {"type": KINDS},
        optional={
            "description": WORDS | st.just(3),
            "title": WORDS,
            "default": VALUES,
            "nullable": st.booleans(),
            "enum": st.lists(WORDS | st.integers(), max_size=3),
            "examples": st.lists(WORDS | st.integers(), max_size=3),
            "oneOf": st.lists(inner, max_size=3) | st.none(),
            "items": inner,
            "properties": st.dictionaries(st.sampled_from("abcd"), inner, max_size=4),
            "required": st.lists(st.sampled_from("abcd"), max_size=3) | st.just("a"),
        },
    ),
    max_leaves=12,
)
FUNCTIONS = st.fixed_dictionaries(
    {"name": NAMES, "description": WORDS, "parameters": st.none() | SCHEMAS.filter(lambda schema: schema is not True)}
)


@settings(max_examples=300)
@given(functions=st.lists(FUNCTIONS, min_size=1, max_size=2))
def test_functions_are_declared_alike(functions, encoding):
    tools = [openai_harmony.ToolDescription.new(**function) for function in functions]
    content = openai_harmony.DeveloperContent.new().with_function_tools(tools)
    message = openai_harmony.Message.from_role_and_content(openai_harmony.Role.DEVELOPER, content)
    ours = f"# Tools\n\n## functions\n\n{declarations('functions', functions)}"
    assert encoding.decode(encoding.render(message)) == f"<|start|>developer<|message|>{ours}<|end|>"


# --- completions ------------------------------------------------------------------------------------------------------

HEADERS = st.sampled_from(
    [
        *("<|channel|>analysis", "<|channel|>final", "<|channel|>commentary", "<|channel|>commentary to=functions.f"),
        *(f" to=functions.f<|channel|>commentary{kind}" for kind in ("", " json", " <|constrain|>json")),
        *(
            f"<|channel|>commentary to=functions.f{kind}"
            for kind in (" code", " <|constrain|>json", "<|constrain|>json")
        ),
        *("<|channel|>analysis to=python code", "", " functions.f<|channel|>commentary"),
    ]
)


@given(parts=st.lists(st.tuples(HEADERS, TEXTS), min_size=1, max_size=4), truncated=st.integers(0, 3))
def test_completions_are_parsed_alike(parts, truncated, encoding, form):
    texts = [f"{header}<|message|>" for header, _ in parts]
    tokens: list[int] = []
    for i, (text, (_, content)) in enumerate(zip(texts, parts, strict=True)):
        tokens += encoding.encode(("<|end|><|start|>assistant" if i else "") + text, allowed_special="all")
        tokens += encoding.encode(content, disallowed_special=())
    tokens = tokens[: len(tokens) - truncated]
    try:
        theirs = encoding.parse_messages_from_completion_tokens(tokens, openai_harmony.Role.ASSISTANT)
    except openai_harmony.HarmonyError:  # it was cut off in a header
        form.parse(tokens)
        return
    wanted = [
        Message("assistant", text, message.channel, message.recipient, message.content_type)
        for message in theirs
        if (text := "".join(part.text for part in message.content))
    ]
    assert form.parse(tokens) == wanted
