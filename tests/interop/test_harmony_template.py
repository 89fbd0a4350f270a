"""The exported chat template writes what the library writes, by transformers' Jinja."""

import json
from typing import Any

import pytest

from gptjax.config import ChatConfig
from gptjax.data.harmony_schema import declarations
from gptjax.data.templates import chat_format
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.interop.harmony_template import harmony_template
from gptjax.interop.tokenizer_files import write_tokenizer
from tests.interop.write_harmony import CASES, FIXTURE

jinja2 = pytest.importorskip("jinja2")
GOLDENS = json.loads(FIXTURE.read_text())
PLAIN = [name for name in CASES if name not in ("messages of channels", "special tokens as text")]


def rendered(record: dict, settings: dict, *, prompt: bool) -> str:
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters["tojson"] = lambda value: json.dumps(value, ensure_ascii=False)  # as in transformers

    def refuse(message: str) -> None:
        raise ValueError(message)

    template = environment.from_string(harmony_template(ChatConfig(template="harmony", **settings)))
    return template.render(**record, add_generation_prompt=prompt, raise_exception=refuse)


@pytest.mark.parametrize("name", PLAIN)
def test_the_template_writes_the_same(name, o200k_harmony):
    (record, settings), golden = CASES[name], GOLDENS[name]
    is_prompt = "prompt" in golden
    tokens = golden["prompt"] if is_prompt else golden["turns"][-1]["tokens"]
    assert rendered(record, settings, prompt=is_prompt) == o200k_harmony.decode(tokens)


SCHEMAS: list[Any] = [
    *(
        {"type": "array"},
        {"type": ["integer", "null", 3]},
        {"type": []},
        {"type": 7},
        {"oneOf": [True, {"type": "string"}]},
    ),
    {"type": "object", "description": "", "properties": {"a": {"type": "object", "properties": {"b": True}}}},
    {"type": "string", "enum": [1, 2]},
    {
        "type": "object",
        "required": "ab",
        "properties": {"a": {"default": -1.5e-5}, "b": {"default": [1e22, 2e-9, -0.5]}},
    },
    {
        "type": "object",
        "properties": {"a": {"oneOf": [], "description": "x", "examples": [1, "y"], "default": {"k": None}}},
    },
    {"type": "object", "properties": {"a": {"oneOf": {"x": 1}, "default": 1, "description": "x", "title": "t"}}},
    {
        "type": "object",
        "properties": {
            "a": {
                "description": "same",
                "oneOf": [
                    {"description": "same", "default": "v", "enum": ["v"], "type": "string"},
                    {"description": "same", "nullable": True, "type": ["null", "string"]},
                ],
            },
            "b": {"type": "string", "enum": ["x"], "default": "x", "nullable": True},
        },
    },
]


@pytest.mark.parametrize("schema", SCHEMAS)
@pytest.mark.parametrize("description", ["one\r\ntwo\n", ""])
def test_it_declares_functions_as_the_library_does(schema, description):
    """Of schemas that the goldens lack, at the top and as a property."""
    wrapped = {"type": "object", "properties": {"inner": schema, "list": {"type": "array", "items": schema}}}
    functions = [
        {"name": f"f{i}", "description": description, "parameters": p} for i, p in enumerate((schema, wrapped))
    ]
    tools = [{"type": "function", "function": functions[0]}, functions[1]]
    text = rendered({"messages": [{"role": "user", "content": "q"}], "tools": tools}, {}, prompt=True)
    assert declarations("functions", functions) in text
    assert text.count("<|start|>developer<|message|># Tools") == 1


def test_it_is_written_with_the_tokenizer(tmp_path):
    form = chat_format(ChatConfig(template="harmony"), BytesTokenizer())
    write_tokenizer(BytesTokenizer(), tmp_path, 64, form)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == harmony_template(ChatConfig(template="harmony"))
    assert settings["eos_token"] == "<|return|>"
