"""Checks a request against its JSON schema, the one that the OpenAPI file serves.

The subset of JSON Schema that `request_schemas` uses: type, enum, const, bounds, lengths, items, properties, required,
additionalProperties, anyOf, and patterns of strings and of property names, which are anchored.
"""

import re
from collections.abc import Mapping
from typing import Any

from gptjax.serving.api_errors import ApiError, invalid

_TYPES: dict[str, tuple[type, ...]] = {
    "object": (dict,),
    "array": (list,),
    "string": (str,),
    "integer": (int,),
    "number": (int, float),
    "boolean": (bool,),
    "null": (type(None),),
}


def check(schema: Mapping[str, Any], value: Any, place: str = "") -> None:
    """Checks a value.

    Args:
      place: the value's path in the request, such as "messages[0].content"; empty: the request itself.

    Raises:
      ApiError: 400 with the place as `param`.
    """
    if "anyOf" in schema:
        _check_any(schema["anyOf"], value, place)
        return
    if "const" in schema and not _equals(value, schema["const"]):
        raise invalid(f"{_named(place)} must be {_shown(schema['const'])}, not {_shown(value)}", place or None)
    if "enum" in schema and not any(_equals(value, choice) for choice in schema["enum"]):
        choices = ", ".join(_shown(choice) for choice in schema["enum"])
        raise invalid(f"{_named(place)} must be one of {choices}, not {_shown(value)}", place or None)
    kinds = _kinds(schema)
    if kinds and not any(_is_of(value, kind) for kind in kinds):
        raise invalid(f"{_named(place)} must be of type {' or '.join(kinds)}, not {_shown(value)}", place or None)
    if isinstance(value, bool):
        return
    if isinstance(value, int | float):
        _check_number(schema, value, place)
    elif isinstance(value, str):
        _check_length(schema, "Length", len(value), "characters", place)
        if "pattern" in schema and re.fullmatch(schema["pattern"], value) is None:
            raise invalid(f"{_named(place)} must match {schema['pattern']}, unlike {_shown(value)}", place)
    elif isinstance(value, list):
        _check_length(schema, "Items", len(value), "elements", place)
        for i, item in enumerate(value) if "items" in schema else ():
            check(schema["items"], item, f"{place}[{i}]")
    elif isinstance(value, dict):
        _check_object(schema, value, place)


def _equals(value: Any, constant: Any) -> bool:
    """Equality of JSON values, where false is not 0."""
    return bool(value == constant) and isinstance(value, bool) == isinstance(constant, bool)


def _kinds(schema: Mapping[str, Any]) -> list[str]:
    kinds = schema.get("type", [])
    return [kinds] if isinstance(kinds, str) else list(kinds)


def _is_of(value: Any, kind: str) -> bool:
    if isinstance(value, bool):
        return kind == "boolean"
    if kind == "integer" and isinstance(value, float):
        return value.is_integer()
    return isinstance(value, _TYPES[kind])


def _check_any(choices: list[Mapping[str, Any]], value: Any, place: str) -> None:
    """Raises the error of the choice that fits best: of the value's type and, for objects, of its `type` or `role`."""
    errors: list[ApiError] = []
    for choice in choices:
        try:
            check(choice, value, place)
            return
        except ApiError as error:
            errors.append(error)
    kinds = [[kind for kind in _kinds(choice) if _is_of(value, kind)] for choice in choices]
    fitting = [i for i, found in enumerate(kinds) if found]
    if isinstance(value, dict):
        named = [i for i in fitting if _is_named(choices[i], value)]
        fitting = named or fitting
    if len(fitting) == 1:
        raise errors[fitting[0]]
    if fitting and isinstance(value, dict):
        tags = {tag: str(value[tag])[:40] for tag in ("type", "role") if tag in value}
        raise invalid(
            f"{_named(place)} has none of the known forms, with {tags or 'neither type nor role'}", place or None
        )
    if fitting:  # arrays: the choice of which most elements fit
        raise max((errors[i] for i in fitting), key=lambda error: (len(error.param or ""), error.param or ""))
    names = list(dict.fromkeys(kind for choice in choices for kind in _kinds(choice)))
    raise invalid(f"{_named(place)} must be of type {' or '.join(names)}, not {_shown(value)}", place or None)


def _is_named(choice: Mapping[str, Any], value: Mapping[str, Any]) -> bool:
    """Whether the tags of an object, such as `type`, are those of a choice."""
    for tag in ("type", "role"):
        allowed = choice.get("properties", {}).get(tag, {})
        names = [allowed["const"]] if "const" in allowed else allowed.get("enum")
        if names is not None and (tag in value or tag in choice.get("required", ())) and value.get(tag) not in names:
            return False
    return True


def _check_number(schema: Mapping[str, Any], value: float, place: str) -> None:
    low, high = schema.get("minimum"), schema.get("maximum")
    if low is not None and value < low:
        raise invalid(f"{_named(place)} must be at least {low}, not {_shown(value)}", place)
    if "exclusiveMinimum" in schema and value <= schema["exclusiveMinimum"]:
        raise invalid(f"{_named(place)} must be above {schema['exclusiveMinimum']}, not {_shown(value)}", place)
    if high is not None and value > high:
        raise invalid(f"{_named(place)} must be at most {high}, not {_shown(value)}", place)


def _check_length(schema: Mapping[str, Any], of: str, length: int, unit: str, place: str) -> None:
    if length < schema.get(f"min{of}", 0):
        raise invalid(f"{_named(place)} has {length} {unit}, fewer than {schema[f'min{of}']}", place)
    if length > schema.get(f"max{of}", length):
        raise invalid(f"{_named(place)} has {length} {unit}, more than {schema[f'max{of}']}", place)


def _check_object(schema: Mapping[str, Any], value: Mapping[str, Any], place: str) -> None:
    properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
    inside = f"{place}." if place else ""
    pattern = schema.get("propertyNames", {}).get("pattern")
    for name, item in value.items():
        if pattern is not None and re.fullmatch(pattern, name) is None:
            raise invalid(f"{_named(place)} has the key {_shown(name)}, which does not match {pattern}", place)
        if name in properties:
            check(properties[name], item, f"{inside}{name}")
        elif others is False:
            shown = f"{inside}{name[:80]}"
            raise invalid(f"unknown parameter {shown!r}", shown, "unknown_parameter")
        elif isinstance(others, Mapping):
            check(others, item, f"{inside}{name[:80]}")
    for name in schema.get("required", ()):
        if name not in value:
            raise invalid(f"{inside}{name} is missing", f"{inside}{name}", "missing_required_parameter")
    _check_length(schema, "Properties", len(value), "keys", place)


def _named(place: str) -> str:
    return place or "the request"


def _shown(value: Any) -> str:
    """Shows a value in a message: its text, cut, or the kind of a list or object."""
    if isinstance(value, dict | list):
        return "an object" if isinstance(value, dict) else "an array"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, str) else str(value)[:40]
    return text if len(text) <= 60 else f"{text[:57]}..."
