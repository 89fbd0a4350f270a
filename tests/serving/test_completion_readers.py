"""Readers of completions, token by token, on texts that no untrained model would write."""

import numpy as np
import pytest

from gptjax.config import ChatConfig
from gptjax.data.conversation_forms import Message
from gptjax.data.harmony import HarmonyFormat
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.serving.completion_readers import CallTextReader, HarmonyReader

TOKENIZER = BytesTokenizer()


def read(reader, tokens):
    """The text of each kind of deltas, and the calls."""
    deltas = []
    for token in tokens:
        deltas += reader.push(int(token))
        if reader.stopped:
            break
    deltas += reader.finish()
    texts = {kind: "".join(d.text for d in deltas if d.kind == kind) for kind in ("content", "reasoning")}
    calls = [[delta.text, ""] for delta in deltas if delta.kind == "call"]
    for delta in deltas:
        if delta.kind == "arguments":
            calls[delta.index][1] += delta.text
    return texts["content"], texts["reasoning"], [tuple(call) for call in calls]


def call(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


@pytest.mark.parametrize(
    ("text", "content", "calls"),
    [
        ("only text", "only text", []),
        ("a < b <tool", "a < b <tool", []),
        (call("f", '{"a":"}"}'), "", [("f", '{"a":"}"}')]),
        ("First. " + call("f", "{}") + "\n" + call("g", '{"x":1}'), "First. ", [("f", "{}"), ("g", '{"x":1}')]),
        (call("f", '{"a":1}')[:-12], "", [("f", '{"a":1}')]),
        ('<tool_call>\n{"name": "f"', '<tool_call>\n{"name": "f"', []),
        ("日本 " + call("f", '{"a":"日"}'), "日本 ", [("f", '{"a":"日"}')]),
    ],
)
def test_calls_in_text(text, content, calls):
    assert read(CallTextReader(TOKENIZER, ()), text.encode()) == (content, "", calls)


def test_a_stop_string_ends_the_text_before_a_call():
    assert read(CallTextReader(TOKENIZER, ["t. <"]), ("Wait. " + call("f", "{}")).encode()) == ("Wai", "", [])


def harmony_tokens(*messages):
    """The tokens of a completion, behind <|start|>assistant."""
    form = HarmonyFormat(ChatConfig(template="harmony"), TOKENIZER)
    prompt = form.encode_prompt([Message("user", "q")])
    whole = form.encode([Message("user", "q"), *messages]).tokens
    return form, whole[len(prompt) :]


def test_the_channels_of_a_harmony_completion():
    form, tokens = harmony_tokens(
        Message("assistant", "Let me think: 日", "analysis"), Message("assistant", "Yes. STOP here", "final")
    )
    assert read(HarmonyReader(form, TOKENIZER, ()), tokens) == ("Yes. STOP here", "Let me think: 日", [])
    assert read(HarmonyReader(form, TOKENIZER, [" ST", "think"]), tokens) == ("Yes.", "Let me think: 日", [])


def test_a_harmony_call():
    message = Message("assistant", '{"a":1}', "commentary", "functions.f", "<|constrain|>json")
    form, tokens = harmony_tokens(Message("assistant", "hm", "analysis"), message)
    assert read(HarmonyReader(form, TOKENIZER, ()), tokens) == ("", "hm", [("f", '{"a":1}')])


def test_malformed_harmony_is_content_and_messages_of_others_are_not():
    form, _ = harmony_tokens(Message("assistant", "x", "final"))
    assert read(HarmonyReader(form, TOKENIZER, ()), b"just text") == ("just text", "", [])
    end, start, message = (form.id_of(f"<|{name}|>") for name in ("end", "start", "message"))
    tokens = np.array([*b"hi", end, start, *b"user", message, *b"me too"])
    assert read(HarmonyReader(form, TOKENIZER, ()), tokens)[0] == "hi"
