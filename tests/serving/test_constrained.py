"""Constrained completions of an untrained model: structured output, and calls of tools."""

import json
import re

import jsonschema
import numpy as np
import pytest

MESSAGES = [{"role": "user", "content": "Hi"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Returns the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
TIME = {"type": "function", "function": {"name": "time"}}


def json_schema(schema):
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}


def random_schema(rng, depth=2):
    """A random schema whose values are short."""
    kind = rng.choice(["integer", "boolean", "string", "enum", "object", "array"][: 6 if depth else 4])
    match kind:
        case "integer":
            low = int(rng.integers(-1000, 1000))
            return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 5000))}
        case "boolean":
            return {"type": "boolean"}
        case "string":
            return {"type": "string", "maxLength": int(rng.integers(0, 12))}
        case "enum":
            return {"enum": [["a", 1, None, "ünï", True][i] for i in rng.permutation(5)[: int(rng.integers(1, 5))]]}
        case "array":
            return {"type": "array", "items": random_schema(rng, depth - 1), "maxItems": int(rng.integers(0, 4))}
    names = [f"key{i}" for i in range(int(rng.integers(0, 4)))]
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def check_draws(server, first, count):
    for draw in range(first, first + count):
        rng = np.random.default_rng(draw)
        schema = random_schema(rng)
        choice = server.chat(response_format=json_schema(schema), seed=draw, max_tokens=900)["choices"][0]
        assert choice["finish_reason"] == "stop", schema
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)


def test_json_of_random_schemas_parses_and_validates(server):
    check_draws(server, 0, 20)


@pytest.mark.slow
def test_json_of_a_thousand_random_schemas_parses_and_validates(server):
    check_draws(server, 1000, 1000)


@pytest.mark.parametrize("seed", range(3))
def test_regular_expressions_match(server, seed):
    regex = r"[a-z]{3}/\d{2,4}(\.x)?"
    choice = server.chat(structured_outputs={"regex": regex}, seed=seed, max_tokens=50)["choices"][0]
    assert re.fullmatch(regex, choice["message"]["content"])
    assert choice["finish_reason"] == "stop"


def test_grammars_and_choices(server):
    grammar = 'start: "(" start ")" | "x"'
    found = server.chat(structured_outputs={"grammar": grammar}, max_tokens=100)["choices"][0]
    assert re.fullmatch(r"(\()*x(\))*", found["message"]["content"])
    found = server.post("/v1/completions", prompt="a", structured_outputs={"choice": ["yes", "no"]}).json()
    assert found["choices"][0]["text"] in ("yes", "no")


def test_a_cut_completion_says_so(server):
    form = json_schema({"type": "string", "minLength": 50})
    assert server.chat(response_format=form, max_tokens=20)["choices"][0]["finish_reason"] == "length"


@pytest.mark.parametrize("tool_choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_required_call_has_valid_arguments(server, tool_choice):
    body = {"tools": [WEATHER, TIME][: 1 if tool_choice == "required" else 2], "tool_choice": tool_choice, "seed": 4}
    choice = server.chat(**body, parallel_tool_calls=False, max_tokens=200)["choices"][0]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] is None
    (call,) = choice["message"]["tool_calls"]
    assert call["function"]["name"] == "weather"
    jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])
    events = server.events("/v1/chat/completions", messages=MESSAGES, **body, parallel_tool_calls=False, max_tokens=200)
    deltas = [c["delta"] for event in events[:-1] for c in event["choices"]]
    calls = [part for delta in deltas for part in delta.get("tool_calls", [])]
    assert [part["function"]["name"] for part in calls if "id" in part] == ["weather"]
    streamed = "".join(part["function"].get("arguments", "") for part in calls)
    assert streamed == call["function"]["arguments"]
    assert len(calls) > 5  # in pieces


def test_parallel_calls(server):
    choice = server.chat(tools=[WEATHER, TIME], tool_choice="required", max_tokens=300, seed=3)["choices"][0]
    for call in choice["message"]["tool_calls"]:
        if choice["finish_reason"] == "tool_calls":
            assert isinstance(json.loads(call["function"]["arguments"]), dict)


def test_a_call_and_its_result_are_part_of_the_prompt(server):
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Rome","days":1}'}}
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    tokens = server.post("/tokenize", messages=messages, tools=[WEATHER]).json()["tokens"]
    text = bytes(token for token in tokens if token < 256).decode()
    assert '<tool_call>\n{"name": "weather", "arguments": {"city":"Rome","days":1}}\n</tool_call>' in text
    assert "<tool_response>\nsunny\n</tool_response>" in text
    assert '"description": "Returns the weather."' in text
    refused = server.post("/v1/chat/completions", messages=[*messages[:2], *MESSAGES])
    assert refused.json()["error"]["param"] == "messages[2]"
    assert server.post("/v1/chat/completions", messages=[messages[2]]).status_code == 400


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("response_format", {"response_format": json_schema({"type": "x"})}),
        ("structured_outputs.regex", {"structured_outputs": {"regex": "(?=a)"}}),
        ("structured_outputs.grammar", {"structured_outputs": {"grammar": "start: nothing"}}),
        ("structured_outputs", {"structured_outputs": {"regex": "a", "choice": ["b"]}}),
        ("tool_choice", {"tool_choice": "required"}),
        ("tool_choice", {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "x"}}}),
        ("tools", {"tools": [WEATHER, WEATHER]}),
    ],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused(server, param, body):
    response = server.post("/v1/chat/completions", messages=MESSAGES, **body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


# --- harmony ----------------------------------------------------------------------------------------------------------


def test_harmony_json_is_in_the_final_channel(harmony_server):
    schema = {
        "type": "object",
        "properties": {"a": {"type": "boolean"}},
        "required": ["a"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for seed in range(6):
        choice = harmony_server.chat(response_format=form, seed=seed, max_tokens=500)["choices"][0]
        if choice["finish_reason"] == "stop":
            jsonschema.validate(json.loads(choice["message"]["content"]), schema)
            break
    else:
        raise AssertionError("no completion ended")


def test_a_harmony_call_is_a_tool_call(harmony_server):
    body = {"tools": [WEATHER], "tool_choice": "required"}
    for seed in range(6):
        choice = harmony_server.chat(**body, seed=seed, max_tokens=500)["choices"][0]
        if choice["finish_reason"] == "tool_calls":
            (call,) = choice["message"]["tool_calls"]
            assert call["function"]["name"] == "weather"
            jsonschema.validate(json.loads(call["function"]["arguments"]), WEATHER["function"]["parameters"])
            events = harmony_server.events("/v1/chat/completions", messages=MESSAGES, **body, seed=seed, max_tokens=500)
            deltas = [c["delta"] for event in events[:-1] for c in event["choices"]]
            assert "".join(d.get("reasoning", "") for d in deltas) == choice["message"].get("reasoning", "")
            break
    else:
        raise AssertionError("no completion ended")
