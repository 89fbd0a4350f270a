"""POST /tokenize and /detokenize, and GET /tokenizer_info; names and forms are those of vLLM."""

import asyncio
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptjax.serving.answering import Serving
from gptjax.serving.api_errors import invalid
from gptjax.serving.chat_prompts import conversation
from gptjax.serving.completion_settings import tools_of
from gptjax.serving.request_schemas import DETOKENIZE_REQUEST, TOKENIZE_REQUEST
from gptjax.serving.served_models import GenerativeModel


def _model(serving: Serving, body: Mapping[str, Any]) -> GenerativeModel:
    return serving.models.generative(body["model"]) if "model" in body else serving.models.first_generative()


async def tokenize(request: Request) -> Response:
    serving = Serving.of(request)
    body = await serving.body(request, TOKENIZE_REQUEST)
    model = _model(serving, body)
    if ("prompt" in body) == ("messages" in body):
        raise invalid("tokenize needs either prompt or messages", "prompt")
    if "tools" in body and "messages" not in body:
        raise invalid("tools needs messages", "tools")

    def encode() -> list[int]:
        if "prompt" in body:
            return model.tokenizer.encode(body["prompt"]).tolist()
        shown, _ = tools_of(body)
        return model.chat_form.encode_prompt(conversation(model.chat_form, body["messages"], tools=shown)).tolist()

    tokens = await asyncio.to_thread(encode)
    found: dict[str, Any] = {"count": len(tokens), "max_model_len": model.context_length, "tokens": tokens}
    if body.get("return_token_strs"):
        found["token_strs"] = [model.piece(token).decode(errors="replace") for token in tokens]
    return JSONResponse(found)


async def detokenize(request: Request) -> Response:
    serving = Serving.of(request)
    body = await serving.body(request, DETOKENIZE_REQUEST)
    model = _model(serving, body)
    return JSONResponse({"prompt": await asyncio.to_thread(model.tokenizer.decode, list(map(int, body["tokens"])))})


async def tokenizer_info(request: Request) -> Response:
    model = Serving.of(request).models.first_generative()
    end = model.tokenizer.end_of_text
    found = {"vocab_size": model.vocab_size, "eos_token": None if end is None else model.tokenizer.decode([end])}
    return JSONResponse({**found, "bos_token": None, "pad_token": None, "chat_template": None})
