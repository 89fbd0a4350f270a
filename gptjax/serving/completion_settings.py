"""Sampling settings, stop strings and structure that a request asks for."""

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.inference.sampling import Sampling
from gptjax.serving.api_errors import invalid
from gptjax.serving.grammars import Structure, Tools

ANY_OBJECT = {"type": "object"}
ANY_ARGUMENTS = {"type": "object", "properties": {}}


@dataclasses.dataclass(frozen=True)
class CompletionSettings:
    """What completions of chat and of text have in common.

    Attributes:
      seed: sampling seed of the first of `n` completions.
      stream: whether the completion is sent in pieces, and whether usage follows.
    """

    sampling: Sampling
    seed: int
    n: int
    stop: tuple[str, ...]
    stream: bool
    include_usage: bool


def without_nulls(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a checked request without its parameters that are null, which count as absent."""
    return {name: value for name, value in body.items() if value is not None}


def completion_settings(body: Mapping[str, Any], vocab_size: int) -> CompletionSettings:
    """Reads the settings of a checked request.

    Raises:
      ApiError: 400: stream_options without stream, or a logit bias for a token outside of the vocabulary.
    """
    stop = body.get("stop", ())
    stream = bool(body.get("stream", False))
    if "stream_options" in body and not stream:
        raise invalid("stream_options needs stream=true", "stream_options")
    seed = int(body["seed"]) % 2**32 if "seed" in body else secrets.randbelow(2**32)
    return CompletionSettings(
        sampling=_sampling(body, vocab_size),
        seed=seed,
        n=int(body.get("n", 1)),
        stop=(stop,) if isinstance(stop, str) else tuple(stop),
        stream=stream,
        include_usage=bool(body.get("stream_options", {}).get("include_usage")),
    )


def _sampling(body: Mapping[str, Any], vocab_size: int) -> Sampling:
    biases = {int(token): float(bias) for token, bias in body.get("logit_bias", {}).items()}
    if outside := [token for token in biases if token >= vocab_size]:
        raise invalid(f"logit_bias has the token {outside[0]}, outside of the vocabulary of {vocab_size}", "logit_bias")
    return Sampling(
        temperature=float(body.get("temperature", 1.0)),
        top_k=int(body["top_k"]) if "top_k" in body else None,
        top_p=float(body["top_p"]) if body.get("top_p", 1) != 1 else None,
        min_p=body.get("min_p"),
        repetition_penalty=body.get("repetition_penalty"),
        frequency_penalty=body.get("frequency_penalty") or None,
        presence_penalty=body.get("presence_penalty") or None,
        logit_bias=tuple(sorted(biases.items())),
    )


def structure(body: Mapping[str, Any]) -> tuple[Structure | None, str]:
    """Reads `response_format` or `structured_outputs`; returns the structure and the parameter that gives it.

    Raises:
      ApiError: 400: both are given, or none or several forms at once.
    """
    found = response_structure(body.get("response_format"))
    given = body.get("structured_outputs")
    if given is None:
        return found, "response_format"
    if found is not None:
        raise invalid("response_format and structured_outputs exclude each other", "structured_outputs")
    forms = without_nulls(given)
    if len(forms) != 1:
        raise invalid("structured_outputs needs exactly one of json, regex, choice and grammar", "structured_outputs")
    ((kind, value),) = forms.items()
    if kind == "json" and isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise invalid(f"structured_outputs.json is not valid JSON: {error}", "structured_outputs.json") from None
        if not isinstance(value, dict):
            raise invalid("structured_outputs.json is not a JSON schema", "structured_outputs.json")
    return Structure(kind, value), f"structured_outputs.{kind}"  # type: ignore[arg-type]


def response_structure(form: Mapping[str, Any] | None) -> Structure | None:
    """Returns the structure of a `response_format`; None: text."""
    if form is None or form["type"] == "text":
        return None
    if form["type"] == "json_object":
        return Structure("json", ANY_OBJECT)
    inner = form.get("json_schema", form)
    return Structure("json", inner.get("schema") or ANY_OBJECT)


def tools_of(body: Mapping[str, Any]) -> tuple[Sequence[Mapping[str, Any]], Tools | None]:
    """Reads `tools` and `tool_choice`; returns the tools that the prompt shows, and what the completion may call.

    Raises:
      ApiError: 400: two tools of one name, a choice of an unknown tool, or a choice without tools.
    """
    given, wanted = body.get("tools", []), body.get("tool_choice", "auto")
    functions = {tool["function"]["name"]: tool["function"].get("parameters") or ANY_ARGUMENTS for tool in given}
    if len(functions) < len(given):
        raise invalid("two tools have one name", "tools")
    if not functions:
        if wanted in ("none", "auto"):
            return (), None
        raise invalid("tool_choice needs tools", "tool_choice")
    parallel = bool(body.get("parallel_tool_calls", True))
    if wanted == "none":
        return (), None
    if isinstance(wanted, dict):
        name = wanted["function"]["name"]
        if name not in functions:
            raise invalid(f"tool_choice names the function {name!r}, which is not in tools", "tool_choice")
        return given, Tools({name: functions[name]}, required=True, parallel=False)
    return given, Tools(functions, required=wanted == "required", parallel=parallel)
