"""Constrained completions of an untrained model: structured output, and calls of tools."""

import json
import re
from concurrent.futures import ThreadPoolExecutor

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
    """A random schema that each completion can satisfy in a few hundred characters."""
    kinds = ["integer", "number", "boolean", "null", "string", "pattern", "enum", "const", "any", "reference"]
    match rng.choice([*kinds, "object", "object", "array"] if depth else kinds[:-2]):
        case "integer":
            low = int(rng.integers(-1000, 1000))
            return {"type": "integer", "minimum": low, "maximum": low + int(rng.integers(0, 5000))}
        case "number":
            low = round(float(rng.uniform(-10, 10)), 2)
            return {"type": "number", "minimum": low, "maximum": low + 3}
        case "boolean" | "null" as name:
            return {"type": name}
        case "string":
            least = int(rng.integers(0, 5))
            return {"type": "string", "minLength": least, "maxLength": least + int(rng.integers(0, 12))}
        case "pattern":
            return {"type": "string", "pattern": f"^[a-f]{{1,{rng.integers(1, 5)}}}(-[0-9]{{2}})?$"}
        case "enum":
            return {"enum": [["a", 1, None, "ünï", True][i] for i in rng.permutation(5)[: int(rng.integers(1, 5))]]}
        case "const":
            return {"const": [3, "x y", {"a": [1]}, False][int(rng.integers(4))]}
        case "any":
            return {"anyOf": [random_schema(rng, depth - 1) for _ in range(2)]}
        case "reference":
            return {"$ref": "#/$defs/shared"}
        case "array":
            least = int(rng.integers(0, 2))
            items = random_schema(rng, depth - 1)
            return {"type": "array", "items": items, "minItems": least, "maxItems": least + int(rng.integers(0, 3))}
    names = [f"key{i}" for i in range(int(rng.integers(0, 4)))]
    return {
        "type": "object",
        "properties": {name: random_schema(rng, depth - 1) for name in names},
        "required": [name for name in names if rng.random() < 0.7],
        "additionalProperties": False,
    }


def random_regex(rng, depth=2):
    r"""A random regular expression of bounded length, in the syntax that Rust and Python share.

    Without \w, \d and \S, which are other characters of Unicode there.
    """
    pieces = []
    for _ in range(int(rng.integers(1, 4))):
        kind = rng.choice(["literal", "class", "negated", "escape", "any", "group"][: 6 if depth else 5])
        match kind:
            case "literal":
                piece = "".join(rng.choice(["a", "Z", "7", " ", "/", '"', "é", "日", r"\.", r"\\", r"\/"], 2))
                piece = f"(?:{piece})"
            case "class":
                piece = rng.choice(["[a-z]", "[A-Fx0-9_]", "[äöü]", r"[\]\-]"])
            case "negated":
                piece = rng.choice([r"[^a-z\n]", '[^"]'])
            case "escape":
                piece = rng.choice(["[0-9]", r"\s", r"\n"])
            case "any":
                piece = "."
            case _:
                ways = [random_regex(rng, depth - 1) for _ in range(int(rng.integers(1, 4)))]
                piece = f"({'|'.join(ways)})"
        least = int(rng.integers(0, 3))
        pieces.append(piece + rng.choice(["", "", "?", f"{{{least},{least + int(rng.integers(0, 3))}}}", "{2}"]))
    return "".join(pieces)


def in_parallel(check, first, count):
    """Checks so many draws, a few at a time."""
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, range(first, first + count)))


def check_schemas(server, first, count):
    def check(draw):
        rng = np.random.default_rng(draw)
        schema = {**random_schema(rng), "$defs": {"shared": random_schema(rng, 0)}}
        choice = server.chat(response_format=json_schema(schema), seed=draw, max_tokens=900)["choices"][0]
        assert choice["finish_reason"] == "stop", (schema, choice)
        jsonschema.validate(json.loads(choice["message"]["content"]), schema)

    in_parallel(check, first, count)


def check_regexes(server, first, count):
    def check(draw):
        regex = random_regex(np.random.default_rng(draw))
        choice = server.chat(structured_outputs={"regex": regex}, seed=draw, max_tokens=900)["choices"][0]
        assert choice["finish_reason"] == "stop", (regex, choice)
        assert re.fullmatch(regex, choice["message"]["content"]), (regex, choice)

    in_parallel(check, first, count)


def test_json_of_random_schemas_parses_and_validates(server):
    check_schemas(server, 0, 20)


@pytest.mark.slow
def test_json_of_a_thousand_random_schemas_parses_and_validates(server):
    check_schemas(server, 1000, 1000)


def test_random_regular_expressions_match(server):
    check_regexes(server, 0, 20)


@pytest.mark.slow
def test_a_thousand_random_regular_expressions_match(server):
    check_regexes(server, 1000, 1000)


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
    function = WEATHER["function"]
    items = [
        {"type": "function_call", "call_id": "c1", **call["function"]},
        {"type": "function_call_output", "call_id": "c1", "output": "sunny"},
    ]
    body = {"tools": [{"type": "function", **function}], "tool_choice": "auto", "max_output_tokens": 1}
    response = server.post("/v1/responses", input=[*MESSAGES, *items], **body).json()
    assert response["usage"]["input_tokens"] == len(tokens)
    unanswered = server.post("/v1/responses", input=[*MESSAGES, items[0], *MESSAGES], **body)
    assert unanswered.json()["error"]["param"] == f"input[{len(MESSAGES) + 1}]"
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
