"""The OpenAPI file of the server, and a page that shows it."""

import html
import json
from typing import Any

from gptjax.serving import request_schemas as schemas

_ERRORS = {
    400: "the request is malformed, or can never succeed",
    401: "no API key, or an unknown one",
    404: "no such model or path",
    405: "the path has no such method",
    408: "the body arrived too slowly",
    413: "the body is too large",
    415: "the body is not JSON",
    429: "the queue is full; Retry-After has seconds",
    500: "the server failed",
    503: "the server is shutting down",
    504: "the deadline passed",
}
_POSTS: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "/v1/chat/completions": (
        "Generates completions of a conversation; with stream=true as server-sent events.",
        schemas.CHAT_REQUEST,
        ("id", "object", "created", "model", "choices", "usage"),
    ),
    "/v1/completions": (
        "Generates completions of texts; with stream=true as server-sent events.",
        schemas.COMPLETION_REQUEST,
        ("id", "object", "created", "model", "choices", "usage"),
    ),
    "/v1/responses": (
        "Generates a response to a conversation, of text; with stream=true as server-sent events.",
        schemas.RESPONSES_REQUEST,
        ("id", "object", "created_at", "status", "model", "output", "usage"),
    ),
    "/v1/embeddings": ("Embeds texts.", schemas.EMBEDDING_REQUEST, ("object", "data", "model", "usage")),
    "/v1/classify": (
        "Predicts labels, values, tags or answers by a model that is fine-tuned for a task.",
        schemas.CLASSIFICATION_REQUEST,
        ("object", "data", "model", "task"),
    ),
    "/detokenize": ("Decodes tokens.", schemas.DETOKENIZE_REQUEST, ("prompt",)),
    "/tokenize": ("Encodes a text or a conversation.", schemas.TOKENIZE_REQUEST, ("count", "max_model_len", "tokens")),
}
_GETS = {
    "/v1/models": ("Lists the models.", "application/json"),
    "/v1/models/{name}": ("Describes a model.", "application/json"),
    "/tokenizer_info": ("Describes the tokenizer.", "application/json"),
    "/health": ("200 while the server takes requests.", "application/json"),
    "/metrics": ("Metrics in the format of Prometheus.", "text/plain"),
    "/openapi.json": ("This description.", "application/json"),
    "/docs": ("A page with this description.", "text/html"),
}
_STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")
_ERROR = {"$ref": "#/components/schemas/Error"}
# One event of a stream; OpenAPI 3.1 has no keyword of its own for the items of a stream.
_EVENT = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


def openapi() -> dict[str, Any]:
    """Returns the description of the HTTP interface, OpenAPI 3.1."""
    paths: dict[str, Any] = {}
    for path, (summary, request, required) in _POSTS.items():
        content: dict[str, Any] = {"application/json": {"schema": {"type": "object", "required": list(required)}}}
        if path in _STREAMED:
            content["text/event-stream"] = {"schema": _EVENT}
        paths[path] = {
            "post": {
                "summary": summary,
                "requestBody": {"required": True, "content": {"application/json": {"schema": request}}},
                "responses": {"200": {"description": "done", "content": content}, **_errors(*_ERRORS)},
            }
        }
    for path, (summary, kind) in _GETS.items():
        schema = {"type": "object"} if kind == "application/json" else {"type": "string"}
        responses = {"200": {"description": "done", "content": {kind: {"schema": schema}}}, **_errors(401, 404, 405)}
        operation: dict[str, Any] = {"summary": summary, "responses": responses}
        if "{name}" in path:
            name = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
            operation["parameters"] = [name]
        if path == "/health":
            responses["503"] = {"description": "draining, or the engine fails", "content": {kind: {"schema": schema}}}
        paths[path] = {"get": operation}
    return {
        "openapi": "3.1.0",
        "info": {"title": "gptjax", "version": "1"},
        "paths": paths,
        "security": [{}, {"key": []}],
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {"Error": _error_schema()},
        },
    }


def _errors(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ERROR}}
    return {str(status): {"description": _ERRORS[status], "content": content} for status in statuses}


def _error_schema() -> dict[str, Any]:
    text = {"type": ["string", "null"]}
    return {
        "type": "object",
        "required": ["error"],
        "properties": {
            "error": {
                "type": "object",
                "required": ["message", "type", "param", "code"],
                "properties": {"message": {"type": "string"}, "type": {"type": "string"}, "param": text, "code": text},
            }
        },
    }


def documentation(description: dict[str, Any]) -> str:
    """Returns an HTML page that shows an OpenAPI file, without scripts."""
    parts = []
    for path, methods in description["paths"].items():
        for method, operation in methods.items():
            summary = html.escape(operation["summary"])
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{summary}</p>")
            body = operation.get("requestBody")
            if body is not None:
                parts.append(_parameters(body["content"]["application/json"]["schema"]))
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>gptjax: HTTP interface</title>"
        "<meta name=viewport content='width=device-width'><style>body{font:16px/1.5 system-ui;max-width:56rem;"
        "margin:2rem auto;padding:0 1rem;color-scheme:light dark}table{border-collapse:collapse}td,th{text-align:left;"
        "vertical-align:top;padding:.2rem .8rem .2rem 0;border-bottom:1px solid #8884}</style>"
        f"<h1>gptjax: HTTP interface</h1><p>Compatible with OpenAI's. <a href=openapi.json>OpenAPI file</a>.</p>"
        f"{''.join(parts)}</html>"
    )


def _parameters(schema: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td><code>{html.escape(name)}</code>{' (required)' if name in schema['required'] else ''}</td>"
        f"<td>{html.escape(_kind(part))}</td><td>{html.escape(part.get('description', ''))}</td></tr>"
        for name, part in schema["properties"].items()
    )
    return f"<table><tr><th>parameter</th><th>type</th><th></th></tr>{rows}</table>"


def _kind(schema: dict[str, Any]) -> str:
    """Describes the type and the range of a parameter."""
    if "anyOf" in schema:
        kinds = [_kind(part) for part in schema["anyOf"] if part.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    values = schema.get("enum", [schema["const"]] if "const" in schema else [])
    if values:
        return " or ".join(json.dumps(value) for value in values if value is not None)
    kinds = schema.get("type", "any")
    kind = kinds if isinstance(kinds, str) else next(name for name in kinds if name != "null")
    if kind == "array":
        kind = f"array of {_kind(schema['items'])}"
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    return kind if low is None or abs(high or 0) > 2**30 else f"{kind}, {low} to {high}"
