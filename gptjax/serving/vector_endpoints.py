"""POST /v1/embeddings and /v1/classify."""

import asyncio
import base64
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptjax.data.labelled import ROLES, TARGETS, Row
from gptjax.data.records import split_words
from gptjax.serving.answering import Serving, log_record, unless_disconnected
from gptjax.serving.api_errors import invalid
from gptjax.serving.completions_endpoint import tokens_of
from gptjax.serving.request_schemas import CLASSIFICATION_REQUEST, EMBEDDING_REQUEST
from gptjax.serving.served_models import ClassificationModel, GenerativeModel


async def create_embeddings(request: Request) -> Response:
    serving = Serving.of(request)
    body = await serving.body(request, EMBEDDING_REQUEST)
    model = serving.models.generative(body["model"])
    if model.adapter is not None:
        raise invalid(f"embeddings are those of the base model, and {model.name!r} is an adapter", "model")
    given = body["input"]
    if isinstance(given, str) or isinstance(given[0], int | float):
        given = [given]
    texts = await asyncio.to_thread(lambda: [tokens_of(model, text, "input") for text in given])
    for tokens in texts:
        _check_length(model, len(tokens), "input")
    assert serving.embed is not None
    embed, pooling = serving.embed, body.get("pooling", "mean")

    async def compute() -> list[Any]:
        # One call for each text, so that completions run in between.
        return [await serving.thread.call(partial(embed, tokens, pooling)) for tokens in texts]

    vectors = await unless_disconnected(request, compute())
    if "dimensions" in body and int(body["dimensions"]) != len(vectors[0]):
        raise invalid(f"the model's embeddings have {len(vectors[0])} dimensions, not fewer or more", "dimensions")
    if body.get("normalize", True):
        vectors = [vector / max(float(np.linalg.norm(vector)), np.finfo(np.float32).tiny) for vector in vectors]
    data = [
        {"object": "embedding", "index": i, "embedding": _written(vector, body.get("encoding_format", "float"))}
        for i, vector in enumerate(vectors)
    ]
    total = sum(map(len, texts))
    log_record(request)["prompt_tokens"] = total
    usage = {"prompt_tokens": total, "total_tokens": total}
    return JSONResponse({"object": "list", "data": data, "model": model.name, "usage": usage})


def _written(vector: Any, form: str) -> list[float] | str:
    if form == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return [float(value) for value in vector]


def _check_length(model: GenerativeModel, length: int, param: str) -> None:
    if length > model.context_length:
        raise invalid(
            f"{param} has {length} tokens, more than the model's context of {model.context_length}",
            param,
            "context_length_exceeded",
        )


async def classify(request: Request) -> Response:
    serving = Serving.of(request)
    body = await serving.body(request, CLASSIFICATION_REQUEST)
    model = serving.models.classifier(body["model"])
    given = body["input"] if isinstance(body["input"], list) else [body["input"]]
    several = isinstance(body["input"], list)
    rows = [_row(model, example, f"input[{i}]" if several else "input") for i, example in enumerate(given)]
    predictions = await unless_disconnected(request, serving.thread.call(lambda: model.predict(rows)))
    data = [{"index": i, "object": "classification", **found} for i, found in enumerate(predictions.details)]
    return JSONResponse({"object": "list", "model": model.name, "task": model.config.task.kind, "data": data})


def _row(model: ClassificationModel, example: str | Mapping[str, Any], place: str) -> Row:
    """Returns an example as a row of the task's data; ApiError 400 if it lacks an input or has another."""
    kind = model.config.task.kind
    roles = [role for role in ROLES[kind] if role not in TARGETS]
    optional = ["second"] if kind == "regression" else []
    if isinstance(example, str):
        if len(roles) - len(optional) > 1:
            raise invalid(f"{place} must be an object with {', '.join(roles)}, the inputs of the task {kind}", place)
        example = {roles[0]: split_words(example) if roles[0] == "tokens" else example}
    for role in example:
        if role not in roles:
            raise invalid(f"unknown input {place}.{role[:80]}: the task {kind} reads {', '.join(roles)}", place)
    for role in roles:
        if role in optional and example.get(role) is None:
            continue
        value = example.get(role)
        texts = value if role in ("tokens", "choices") else [value]
        if not isinstance(texts, list) or not texts or not all(isinstance(t, str) and t.strip() for t in texts):
            raise invalid(f"{place}.{role} is missing or is not text: the task {kind} reads {', '.join(roles)}", place)
    return Row(dict(example), place)
