"""Grammars of constrained completions, in llguidance's JSON form: structured output, and calls of tools.

A model without the harmony format writes a call as text, in the form of Hermes 2 Pro and Qwen:

    <tool_call>
    {"name": "NAME", "arguments": {...}}
    </tool_call>
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal

CALL_BEGINS = "<tool_call>"
CALL_ENDS = "}\n</tool_call>"
# JSON without blanks between its tokens: a model could write any number of them.
_COMPACT = {"whitespace_flexible": False}

Grammar = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Structure:
    """The form of a completion's content.

    Attributes:
      kind: of the value: a JSON schema, a regular expression, a Lark grammar, or a list of texts.
    """

    kind: Literal["json", "regex", "grammar", "choice"]
    value: Any

    def entry(self, name: str) -> Grammar:
        """Returns the named grammar of the content."""
        match self.kind:
            case "json":
                return {"name": name, "json_schema": _compact(self.value)}
            case "regex":
                return {"name": name, "lark_grammar": f"start: CONTENT\nCONTENT: /(?:{_slashed(self.value)})/"}
            case "choice":
                choices = " | ".join(json.dumps(text, ensure_ascii=False) for text in self.value)
                return {"name": name, "lark_grammar": f"start: {choices}"}
        return {"name": name, "lark_grammar": self.value}


@dataclasses.dataclass(frozen=True)
class Tools:
    """The tools that a completion may call.

    Attributes:
      functions: JSON schemas of the arguments by the function's name.
      required: the completion is a call.
      parallel: it may have several calls.
    """

    functions: Mapping[str, Any]
    required: bool
    parallel: bool


def text_grammar(structure: Structure | None, tools: Tools | None) -> str:
    """Returns the grammar of a completion that is text: of its content, of calls, or of either."""
    if tools is None:
        assert structure is not None
        return json.dumps({"grammars": [structure.entry("content")]})
    names = list(tools.functions)
    rules = [f"body: {' | '.join(f'body{i}' for i in range(len(names)))}"]
    for i, name in enumerate(names):
        head, tail = (json.dumps(text) for text in (call_head(name), CALL_ENDS))
        rules.append(f"body{i}: {head} @args{i} {tail}")
    more = f' ("\\n{CALL_BEGINS}" body)*' if tools.parallel else ""
    calls = f'"{CALL_BEGINS}" body{more}'
    if tools.required:
        rules.insert(0, f"start: {calls}")
    elif structure is not None:
        rules.insert(0, f"start: @content | {calls}")
    else:
        rules.insert(0, f"start: TEXT | before body{more}")
        rules += [
            f"before[lazy]: /(?s:.*){CALL_BEGINS}/",
            f"TEXT: /(?s:.*)/ & ~/(?s:.*{CALL_BEGINS}.*)/",
        ]
    grammars = [{"name": "main", "lark_grammar": "\n".join(rules)}, *_arguments(tools)]
    if structure is not None:
        grammars.append(structure.entry("content"))
    return json.dumps({"grammars": grammars})


def call_head(name: str) -> str:
    """Returns the text between the beginning of a call and its arguments."""
    return f'\n{{"name": {json.dumps(name)}, "arguments": '


def harmony_grammar(ids: Mapping[str, int], structure: Structure | None, tools: Tools | None) -> str:
    """Returns the grammar of a completion in the harmony format, behind `<|start|>assistant`.

    It may begin with a message of the channel analysis. Then follows a message of the channel final, whose content is
    constrained, or if tools are required a call of one, with its arguments.

    Args:
      ids: of the format's special tokens, by name.
    """
    channel, message, end, start, constrain = (
        f"<[{ids[name]}]>" for name in ("<|channel|>", "<|message|>", "<|end|>", "<|start|>", "<|constrain|>")
    )
    rules = [
        f'analysis: {channel} "analysis" {message} TEXT {end} {start} "assistant"',
        "TEXT: /(?s:.*)/",
    ]
    grammars: list[Grammar] = []
    ways = []
    if tools is not None:
        for i, name in enumerate(tools.functions):
            to = json.dumps(f"commentary to=functions.{name} ")
            ways.append(f'{channel} {to} {constrain} "json" {message} @args{i}')
        grammars += _arguments(tools)
    if structure is not None and not (tools is not None and tools.required):
        ways.append(f'{channel} "final" {message} @content')
        grammars.append(structure.entry("content"))
    rules.insert(0, f"start: analysis? ({' | '.join(ways)})")
    return json.dumps({"grammars": [{"name": "main", "lark_grammar": "\n".join(rules)}, *grammars]})


def _arguments(tools: Tools) -> list[Grammar]:
    return [{"name": f"args{i}", "json_schema": _compact(schema)} for i, schema in enumerate(tools.functions.values())]


def _compact(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {**schema, "x-guidance": _COMPACT}


def _slashed(regex: str) -> str:
    """Escapes the slashes of a regular expression that Lark writes between slashes."""
    pieces, escaped = [], False
    for letter in regex:
        pieces.append("\\/" if letter == "/" and not escaped else "\\n" if letter == "\n" and not escaped else letter)
        escaped = letter == "\\" and not escaped
    return "".join(pieces)
