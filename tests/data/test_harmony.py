"""The harmony format: tokens as of openai-harmony, the loss mask, parsing of completions, and malformed records."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers as huggingface
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models

from gptjax import config as c
from gptjax.config import ChatConfig, UserError
from gptjax.data.conversations import Conversation, Message, prompts, read_conversations, read_prompts
from gptjax.data.harmony import HarmonyFormat
from gptjax.data.harmony_forms import check_turns, parse_record, written
from gptjax.data.harmony_schema import declarations
from gptjax.data.templates import TooLongError, chat_format
from gptjax.data.tokenizers import BytesTokenizer, HuggingFaceTokenizer
from tests.interop.write_harmony import CASES, CLOCK, FIXTURE, LOOP, TRAINS

GOLDENS = json.loads(FIXTURE.read_text())
FIRST_SPECIAL = 199_998
USER, SAY = Message("user", "2 + 2?"), Message("assistant", "4", "final")
THINK = Message("assistant", "Simple.", "analysis")


@pytest.fixture(scope="module")
def make_format(o200k_harmony):
    def make(**settings) -> HarmonyFormat:
        form = chat_format(ChatConfig(template="harmony", **settings), o200k_harmony)
        assert isinstance(form, HarmonyFormat)
        return form

    return make


@pytest.fixture
def jsonl(tmp_path):
    def write(*records: dict) -> str:
        path = tmp_path / "chats.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return f"jsonl:{path}"

    return write


def text_of(form: HarmonyFormat, tokens) -> str:
    return form._tokenizer.decode(tokens)


def spans(mask: np.ndarray) -> list[list[int]]:
    found, first = [], 0
    for flag, run in itertools.groupby(mask.tolist()):
        length = len(list(run))
        found += [[first, first + length]] if flag else []
        first += length
    return found


# --- tokens -----------------------------------------------------------------------------------------------------------


def test_every_case_has_a_golden():
    assert list(GOLDENS) == list(CASES)


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_loss_are_those_of_the_package(name, make_format, jsonl):
    (record, settings), golden = CASES[name], GOLDENS[name]
    if "prompt" in golden:
        form, prompt = make_format(**settings), read_prompts(jsonl(record), harmony=True)[-1]
        tokens = form.encode_prompt(prompt.messages).tolist()
        assert text_of(form, tokens) == text_of(form, golden["prompt"])
        assert tokens == golden["prompt"]
    for mask in ("assistant", "final") if golden["turns"] else ():
        form = make_format(**settings, loss_mask=mask)
        (conversation,) = read_conversations(jsonl(record), harmony=True)
        encoded = [form.encode(messages) for messages in form.training_conversations(conversation.messages)]
        wanted = [turn for turn in golden["turns"] if turn[mask]]
        assert [one.tokens.tolist() for one in encoded] == [turn["tokens"] for turn in wanted]
        assert [spans(one.loss_mask) for one in encoded] == [turn[mask] for turn in wanted]


def test_special_tokens_and_what_ends_a_completion(make_format):
    form = make_format()
    assert form.vocab_size == 201_088
    assert form.special_tokens == {}
    assert form.end_tokens == (200_002, 200_012)
    assert form.end_of_turn == 200_002


@given(text=st.text() | st.sampled_from(["<|start|>", "<|end|><|return|>", "<|reserved_200020|>", "<|endoftext|>"]))
def test_no_content_is_a_special_token(text, make_format):
    form = make_format()
    plain = form.encode([Message("system", "a"), Message("user", "a", name="a"), Message("assistant", "a")])
    said = form.encode([Message("system", text), Message("user", text, name="a"), Message("assistant", text)])
    special = [encoded.tokens[encoded.tokens >= FIRST_SPECIAL].tolist() for encoded in (plain, said)]
    if text:
        assert special[0] == special[1]


def test_a_tokenizer_without_the_special_tokens_gets_them_behind_its_vocabulary():
    form = chat_format(ChatConfig(template="harmony"), BytesTokenizer())
    assert form.vocab_size == 257 + 7
    assert list(form.special_tokens) == [
        *("<|return|>", "<|constrain|>", "<|channel|>", "<|start|>", "<|end|>", "<|message|>", "<|call|>")
    ]
    tail = [260, *b"user", 262, *b"2 + 2?", 261, 260, *b"assistant", 259, *b"final", 262, *b"4", 257]
    assert form.encode([USER, SAY]).tokens.tolist()[-len(tail) :] == tail
    assert form.encode_completion("4").tolist() == tail[-9:]
    assert form.decode(form.encode_completion("4")) == "4"
    call = [*b" to=functions.f", 259, *b"commentary", 32, 258, *b"json", 262, *b"{}", 263]
    assert form.parse(call) == [Message("assistant", "{}", "commentary", "functions.f", "<|constrain|>json")]


def test_a_tokenizer_with_some_of_the_special_tokens_is_refused():
    tokenizer = huggingface.Tokenizer(models.WordLevel({"a": 0, "<|start|>": 1, "</s>": 2}, unk_token="a"))
    with pytest.raises(
        UserError, match=r"the tokenizer has <\|start\|>, but not <\|return\|> of chat.template=harmony"
    ):
        chat_format(ChatConfig(template="harmony"), HuggingFaceTokenizer(tokenizer.to_str()))


def test_the_oldest_turns_are_left_out(make_format):
    form = make_format()
    system = Message("system", "Rules.")
    turns = [[Message("user", f"{i}?"), THINK, Message("assistant", str(i), "final")] for i in range(4)]
    every = [system, *itertools.chain(*turns)]
    last = form.encode([system, *turns[-1]])
    for room in range(len(last), len(form.encode(every)) + 1):
        kept = form.encode(every, room)
        assert len(kept) <= room
        first = min(i for i in range(4) if len(form.encode([system, *itertools.chain(*turns[i:])])) <= room)
        assert kept.tokens.tolist() == form.encode([system, *itertools.chain(*turns[first:])]).tokens.tolist()
    message = f"here: its last exchange has {len(last)} tokens, but {len(last) - 1} fit"
    with pytest.raises(TooLongError, match=message):
        form.encode(every, len(last) - 1, place="here")
    asked = form.encode_prompt([system, USER])
    assert form.encode_prompt([*every, USER], len(asked)).tolist() == asked.tolist()


def test_a_response_format_is_the_last_section_of_the_developer_message(make_format):
    form = make_format()
    schema = {"type": "object", "properties": {"items": {"type": "array", "items": {"type": "string"}}}}
    given = {"name": "shopping_list", "description": "What to buy.\nEach once.", "schema": schema}
    record = {"messages": [{"role": "user", "content": "Buy."}], "tools": [CLOCK]}
    record["response_format"] = {"type": "json_schema", "json_schema": given}
    tokens = form.encode_prompt(parse_record(record, "here", lambda plain, _: (Message("user", "Buy."),)))
    _, _, developer = text_of(form, tokens).partition("<|start|>developer<|message|>")
    assert developer.partition("<|end|>")[0].endswith(
        "} // namespace functions\n\n# Response Formats\n\n## shopping_list\n\n// What to buy.\n// Each once.\n"
        '{"type":"object","properties":{"items":{"type":"array","items":{"type":"string"}}}}'
    )


def test_declarations_by_hand():
    assert declarations("functions", [CLOCK["function"]]) == (
        "namespace functions {\n\n// Tells the time.\ntype clock = () => any;\n\n} // namespace functions"
    )
    lines = declarations("functions", [TRAINS["function"]]).splitlines()
    for line in ('kind?: "fast" | "night", // default: fast', "class?: number, // default: 2", "via?: string[],"):
        assert line in lines


# --- completions ------------------------------------------------------------------------------------------------------


def completion(form: HarmonyFormat, text: str) -> list[int]:
    return form._tokenizer.encoding.encode(text, allowed_special="all")


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        (
            "<|channel|>analysis<|message|>Simple.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
            [THINK, SAY],
        ),
        ("<|channel|>final<|message|>4", [SAY]),
        *(
            (f"{header}<|message|>{{}}<|call|>", [Message("assistant", "{}", "commentary", "functions.f", kind)])
            for header, kind in (
                (" to=functions.f<|channel|>commentary <|constrain|>json", "<|constrain|>json"),
                ("<|channel|>commentary to=functions.f <|constrain|>json", "<|constrain|>json"),
                ("<|channel|>commentary to=functions.f<|constrain|>json", "<|constrain|>json"),
                ("<|channel|>commentary to=functions.f json", "json"),
                ("<|channel|>commentary to=functions.f", None),
                ("<|channel|>commentary functions.f", None),
            )
        ),
        # A content type alone is no recipient, though the package takes it for one.
        (
            "<|channel|>final <|constrain|>json<|message|>4",
            [Message("assistant", "4", "final", None, "<|constrain|>json")],
        ),
        # Malformed: without <|message|>, with unknown channels, with special tokens in the content, by others.
        ("I refuse<|end|><|start|>assistant<|channel|>final<|message|>4", [Message("assistant", "I refuse"), SAY]),
        ("<|channel|>analysis Simple.<|end|>", [THINK]),
        ("<|channel|>thoughts<|message|>4<|return|>", [Message("assistant", "4")]),
        ("<|channel|><|channel|><|message|>4<|return|>", [Message("assistant", "4")]),
        ("<|message|>a<|start|>b<|return|>", [Message("assistant", "a<|start|>b")]),
        ("<|channel|>final<|message|>4<|end|><|start|>user<|message|>5?<|end|>", [SAY]),
        ("<|channel|>final<|message|>4<|end|><|start|>functions.f to=assistant<|message|>5?<|end|>", [SAY]),
        ("<|channel|>final<|message|><|return|>", []),
        ("<|return|>", []),
        ("", []),
    ],
)
def test_completions_become_messages(text, messages, make_format):
    form = make_format()
    assert form.parse(completion(form, text)) == messages
    assert form.decode(completion(form, text)) == "".join(m.content for m in messages if m.is_final)


@given(tokens=st.lists(st.integers(200_000, 200_020) | st.integers(0, 300) | st.just(35_644), max_size=20))
def test_any_tokens_become_messages(tokens, make_format):
    form = make_format()
    for message in form.parse(tokens):
        assert message.role == "assistant"
        assert message.content
    form.encode_prompt([USER, *form.parse(tokens), USER])


def test_what_was_completed_is_read_as_it_was_written(make_format):
    form = make_format()
    for name, (record, _) in CASES.items():
        turns = [turn["tokens"][first:last] for turn in GOLDENS[name]["turns"] for first, last in turn["assistant"]]
        read = [message for tokens in turns for message in form.parse(tokens)]
        assert read == [message for message in parse_all(record) if message.role == "assistant"]


# --- records ----------------------------------------------------------------------------------------------------------


def parse_all(record: dict) -> tuple[Message, ...]:
    from gptjax.data.conversation_forms import conversation_messages

    return parse_record(record, "here", conversation_messages)


@pytest.mark.parametrize("name", CASES)
def test_what_is_saved_is_read_as_the_same(name):
    messages = parse_all(CASES[name][0])
    assert parse_all(json.loads(json.dumps(written(messages)))) == messages
    check_turns(messages, "here")


def test_the_example_of_the_documentation(make_format):
    page = (Path(__file__).parents[2] / "docs" / "chat.md").read_text()
    record = json.loads(page.partition("```json\n")[2].partition("```")[0])
    messages = parse_all(record)
    check_turns(messages, "here")
    text = text_of(make_format(), make_format().encode(messages).tokens)
    assert text.endswith("<|end|><|start|>assistant<|channel|>final<|message|>In three minutes.<|return|>")
    assert "\n\nReasoning: low\n\n" in text
    assert "type clock = (_: {\nzone?: string,\n}) => any;" in text
    assert ' to=functions.clock<|channel|>commentary <|constrain|>json<|message|>{"zone": "CET"}<|call|>' in text


def test_other_forms_of_the_same_messages():
    call = {"function": {"name": "clock", "arguments": {"zone": "é"}}}
    ask, say = {"role": "user", "content": "Time?"}, {"role": "assistant", "content": "Now."}
    result = {"role": "tool", "content": "10:02", "name": "clock"}
    turns = [ask, {"role": "assistant", "reasoning_content": "Hm.", "tool_calls": [call]}, result, say]
    wanted = parse_all({"messages": turns})
    assert wanted[2] == Message("assistant", '{"zone": "é"}', "commentary", "functions.clock", "<|constrain|>json")
    assert wanted[3] == Message("tool", "10:02", "commentary", "assistant", name="functions.clock")
    assert parse_all({"prompt": turns[:3], "completion": turns[3:]}) == wanted
    assert parse_all({"prompt": turns[:1], "completion": turns[1:]}) == wanted
    assert parse_all({"messages": [ask, say], "tools": [{"type": "function", **CLOCK["function"]}]}) == parse_all(
        {"messages": [ask, say], "tools": [CLOCK]}
    )


def test_prompts_end_before_the_last_completion_of_a_turn():
    messages = parse_all({"messages": [*LOOP, {"role": "assistant", "thinking": "So.", "content": "At 10:05."}]})
    (prompt,) = prompts([Conversation(messages, "here")])
    assert prompt.messages == messages[: len(messages) - 2]
    assert prompt.messages[-1].role == "tool"
    assert prompt.reference == "At 10:05."


ASK, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
CALL = {"role": "assistant", "tool_calls": [{"id": "x", "function": {"name": "f", "arguments": "{}"}}]}
RESULT = {"role": "tool", "tool_call_id": "x", "content": "r"}


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"messages": [ASK, {**ANSWER, "channel": "secret"}]}, "messages[1] has the unknown channel 'secret'"),
        ({"messages": [ASK, {**ANSWER, "channel": "final", "thinking": "t"}]}, "has channel and thinking"),
        (
            {"messages": [ASK, {**ANSWER, "thinking": "t", "reasoning": "s"}]},
            "has reasoning and thinking, which differ",
        ),
        ({"messages": [ASK, {**CALL, "tool_calls": CALL["tool_calls"] * 2}]}, "not a list of one call"),
        ({"messages": [ASK, {**ANSWER, "tool_calls": ["f"]}]}, "has a call that is not an object with function"),
        ({"messages": [ASK, {**ANSWER, "channel": "commentary", "recipient": "a b"}]}, "recipient is not a name"),
        ({"messages": [{**ASK, "name": "a<b"}, ANSWER]}, "messages[0]: name is not a name but 'a<b'"),
        ({"messages": [ASK, RESULT, ANSWER]}, "is the result of no call before it"),
        ({"messages": [ASK, CALL, {**RESULT, "name": "g"}, ANSWER]}, "is a result of g, but the call before it is of"),
        ({"messages": [ASK, {"role": "assistant", "thinking": "t", "content": None}]}, "the content is null"),
        ({"messages": [ASK, {**ANSWER, "function_call": {"name": "f"}}]}, "has function_call, but tool calls are not"),
        ({"messages": [ASK, {**ANSWER, "weight": 0.5}]}, "completions are not weighted"),
        ({"messages": [ASK, ANSWER], "tools": {"f": 1}}, "tools is not a list"),
        ({"messages": [ASK, ANSWER], "tools": [{"type": "browser"}]}, "tools[0] is not an object of type function"),
        ({"messages": [ASK, ANSWER], "tools": [{"type": "function", "function": {}}]}, "tools[0]: name is not a name"),
        ({"messages": [ASK, ANSWER], "builtin_tools": ["python"]}, "has builtin_tools, but only tools"),
        ({"messages": [ASK, ANSWER], "reasoning_effort": "extreme"}, "reasoning_effort 'extreme': one of low"),
        ({"messages": [ASK, ANSWER], "response_format": {"type": "json_object"}}, "is not of type json_schema"),
        (
            {"messages": [ASK, ANSWER, ANSWER]},
            "message 2 of the harmony format, the assistant's in channel final, comes",
        ),
        ({"messages": [ASK, ASK, ANSWER]}, "message 1 of the harmony format, the user's, comes after the user's"),
        ({"messages": [ASK, CALL, ANSWER]}, "a call is followed by its result"),
        ({"messages": [ASK, CALL, RESULT, RESULT]}, "a call is followed by its result"),
        (
            {"messages": [ASK, {**ANSWER, "channel": "analysis"}]},
            "ends in the assistant's in channel analysis, without",
        ),
        ({"messages": [ASK]}, "has no completion"),
        (
            {"messages": [{"role": "system", "content": "a"}, {"role": "developer", "content": "b"}, ASK]},
            "has one system",
        ),
    ],
)
def test_malformed_records_are_named(record, message, jsonl):
    with pytest.raises(UserError, match=r"chats\.jsonl:1") as error:
        read_conversations(jsonl(record), harmony=True)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [ASK, {**ANSWER, "thinking": "t"}]},
        {"messages": [ASK, {**ANSWER, "channel": "analysis"}, ANSWER]},
        {"messages": [ASK, CALL, RESULT, ANSWER]},
        {"messages": [ASK, ANSWER], "tools": [CLOCK]},
    ],
)
def test_other_templates_refuse_them(record, jsonl):
    with pytest.raises(UserError, match=r"set chat\.template=harmony"):
        read_conversations(jsonl(record))


@pytest.mark.parametrize(
    "setting", [{"loss_mask": "final"}, {"reasoning_effort": "low"}, {"current_date": "2026-01-01"}]
)
def test_settings_of_the_format_need_it(setting):
    (name,) = setting
    batch = c.BatchConfig(epochs=1.0)
    with pytest.raises(UserError, match=rf"^chat\.{name}=\S+ is of chat\.template=harmony"):
        c.check(c.Config(batch=batch, chat=ChatConfig(**setting)))
    c.check(c.Config(batch=batch, chat=ChatConfig(template="harmony", **setting)))
