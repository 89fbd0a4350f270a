"""TypeScript-like declarations of functions, as the developer message of the harmony format has them.

The result is, character by character, that of OpenAI's renderer, the package openai-harmony 0.0.8. What it ignores in a
JSON schema (`anyOf`, `$ref`, `pattern`, bounds) is ignored here too.
"""

import decimal
import json
from collections.abc import Mapping, Sequence
from typing import Any

_TYPES = {"string": "string", "number": "number", "integer": "number", "boolean": "boolean"}


def declarations(namespace: str, functions: Sequence[Mapping[str, Any]]) -> str:
    """Returns a `namespace` of `functions`, each with a name, a description and parameters (a JSON schema or None)."""
    lines = [f"namespace {namespace} {{\n"]
    for function in functions:
        lines += _comment(function.get("description") or "")
        schema = function.get("parameters")
        argument = "" if schema is None else f"_: {type_of(schema, '')}"
        lines.append(f"type {function['name']} = ({argument}) => any;\n")
    return "\n".join([*lines, f"}} // namespace {namespace}"])


def compact_json(value: Any) -> str:
    """Returns JSON without white space, with floats as Rust's serde_json prints them."""
    if isinstance(value, Mapping):
        return "{" + ",".join(f"{compact_json(key)}:{compact_json(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(compact_json, value)) + "]"
    text = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and "e" in text:
        mantissa, _, exponent = text.partition("e")
        return f"{decimal.Decimal(text):f}" if int(exponent) == -5 else f"{mantissa}e{int(exponent)}"
    return text


def type_of(schema: Any, indent: str) -> str:
    """Returns the type that a JSON schema describes; `indent` precedes each further line."""
    schema = _object(schema)
    if isinstance(schema.get("oneOf"), list):
        return "".join(
            f"\n{indent} | {_nullable_type(variant, indent + '   ')}"
            + _trailing([*_text(variant, "description"), *_default(variant, json_enum=True)])
            for variant in schema["oneOf"]
        )
    kind = schema.get("type")
    if isinstance(kind, list):
        names = ["number" if name == "integer" else name for name in kind if isinstance(name, str)]
        return " | ".join(names) or "any"
    if kind == "object":
        return _object_type(schema, indent)
    if kind == "array":
        return f"{type_of(schema['items'], indent)}[]" if "items" in schema else "Array<any>"
    if kind == "string" and isinstance(schema.get("enum"), list):
        values = [f'"{value}"' for value in schema["enum"] if isinstance(value, str)]
        return " | ".join(values) or "string"
    return _TYPES.get(kind, "any") if isinstance(kind, str) else "any"


def _object_type(schema: Mapping[str, Any], indent: str) -> str:
    required = schema.get("required") if isinstance(schema.get("required"), list) else []
    lines = [f"{indent}// {text}" for text in _text(schema, "description")]
    lines.append("{")
    for key, value in _object(schema.get("properties")).items():
        field = key if key in (required or []) else f"{key}?"
        lines += _property(field, _object(value), indent)
    return "\n".join([*lines, f"{indent}}}"])


def _property(field: str, schema: Mapping[str, Any], indent: str) -> list[str]:
    """Returns the lines of a property; `field`: its name, with "?" if it is optional."""
    comments = [line for title in _text(schema, "title") for line in (title, None)]
    description = _text(schema, "description")
    comments += [] if "oneOf" in schema else description
    examples = schema.get("examples")
    if isinstance(examples, list) and examples:
        comments += ["Examples:", *(f'- "{text}"' for text in examples if isinstance(text, str))]
    if isinstance(schema.get("oneOf"), list):
        return [*_comments(comments, indent), *_union(field, schema, indent)]
    default = [] if "oneOf" in schema else _default(schema)
    line = f"{indent}{field}: {_nullable_type(schema, indent + '    ')},{_trailing(default)}"
    return [*_comments(comments, indent), line]


def _union(field: str, schema: Mapping[str, Any], indent: str) -> list[str]:
    """Returns the lines of a property with `oneOf`: a variant a line, each description once."""
    variants, description = schema["oneOf"], _text(schema, "description")
    above = description if not variants or _text(variants[0], "description") != description else []
    lines = [*_comments([*above, *_default(schema)], indent), f"{indent}{field}:"]
    for i, variant in enumerate(variants):
        own = _text(variant, "description")
        comments = [] if own == description or (i == 0 and above) else own
        comment = _trailing([*comments, *_default(variant)])
        lines.append(f"{indent} | {_nullable_type(variant, indent + '   ')}{comment}")
    return [*lines, f"{indent},"]


def _nullable_type(schema: Any, indent: str) -> str:
    text = type_of(schema, indent)
    return f"{text} | null" if _object(schema).get("nullable") is True and "null" not in text else text


def _default(schema: Any, json_enum: bool = False) -> list[str]:
    """Returns the comment on the default value; `json_enum`: that of an enumeration is written as JSON."""
    schema = _object(schema)
    if "default" not in schema:
        return []
    value, enum = schema["default"], schema.get("enum")
    is_enum = isinstance(enum, list) and bool(enum)
    if isinstance(value, str) and not (is_enum and json_enum):
        return [f"default: {value}" if is_enum else f'default: "{value}"']
    return [f"default: {compact_json(value)}"]


def _text(schema: Any, name: str) -> list[str]:
    """Returns a text of a schema, in a list; empty if it has none."""
    text = _object(schema).get(name)
    return [text] if isinstance(text, str) else []


def _object(schema: Any) -> Mapping[str, Any]:
    """Returns `schema`, or an empty one for what is no object, such as `true`."""
    return schema if isinstance(schema, Mapping) else {}


def _comments(texts: Sequence[str | None], indent: str) -> list[str]:
    return [f"{indent}//" if text is None else f"{indent}// {text}" for text in texts]


def _comment(text: str) -> list[str]:
    """Returns the lines of a text as comments."""
    lines = text.split("\n")
    return [f"// {line.removesuffix(chr(13))}" for line in (lines if lines[-1] else lines[:-1])]


def _trailing(comments: Sequence[str]) -> str:
    return f" // {' '.join(comments)}" if comments else ""
