"""POST /v1/chat/completions."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptjax.data.conversation_forms import Message
from gptjax.inference.requests import GenerationRequest, SampledToken
from gptjax.inference.retrieval import Documents, Passage, with_passages
from gptjax.serving.answering import Answer, Piece, PlannedCompletion, Serving
from gptjax.serving.api_errors import invalid
from gptjax.serving.chat_prompts import conversation
from gptjax.serving.completion_settings import CompletionSettings, completion_settings, structure, tools_of
from gptjax.serving.event_stream import collected, event, event_stream
from gptjax.serving.grammars import Structure, Tools
from gptjax.serving.request_schemas import CHAT_REQUEST
from gptjax.serving.served_models import GenerativeModel
from gptjax.serving.token_logprobs import chat_logprobs


@dataclasses.dataclass(frozen=True)
class ChatPlan:
    """A chat completion that is ready to be generated.

    Attributes:
      sources: retrieved passages that the prompt has, best first.
      top_logprobs: number of most probable tokens to report; None: no log-probabilities.
    """

    model: GenerativeModel
    settings: CompletionSettings
    planned: list[PlannedCompletion]
    num_prompt_tokens: int
    sources: list[Passage]
    top_logprobs: int | None = None


async def create_chat_completion(request: Request) -> Response:
    serving = Serving.of(request)
    body = await serving.body(request, CHAT_REQUEST)
    model = serving.models.generative(body["model"])
    plan = await asyncio.to_thread(_plan, serving, model, body)
    answer = Answer(request, plan.planned, plan.settings.n * plan.num_prompt_tokens)
    head = {"id": f"chatcmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model.name}
    if plan.settings.stream:
        return await event_stream(request, _events(plan, answer, head))
    pieces = await collected(request, answer.pieces())
    choices = [_choice(plan, i, [piece for piece in pieces if piece.index == i]) for i in range(plan.settings.n)]
    usage = {**answer.usage(), "prompt_tokens": plan.num_prompt_tokens}
    usage["total_tokens"] = usage["prompt_tokens"] + usage["completion_tokens"]
    more = {"sources": _sources(plan.sources)} if plan.sources else {}
    return JSONResponse({**head, "object": "chat.completion", "choices": choices, "usage": usage, **more})


def _plan(serving: Serving, model: GenerativeModel, body: Mapping[str, Any]) -> ChatPlan:
    top = body.get("top_logprobs", 0)
    if top and not body.get("logprobs"):
        raise invalid("top_logprobs needs logprobs=true", "top_logprobs")
    shown, tools = tools_of(body)
    form, place = structure(body)
    messages = conversation(
        model.chat_form,
        body["messages"],
        tools=shown,
        response_format=body.get("response_format"),
        reasoning_effort=body.get("reasoning_effort"),
    )
    documents = serving.documents if body.get("retrieval", True) else None
    plan = plan_chat(
        model,
        messages,
        completion_settings(body, model.vocab_size),
        max_tokens=body.get("max_completion_tokens", body.get("max_tokens")),
        form=form,
        form_param=place if form is not None else "tools",
        tools=tools,
        top_logprobs=top,
        documents=documents,
    )
    return dataclasses.replace(plan, top_logprobs=int(top) if body.get("logprobs") else None)


def plan_chat(
    model: GenerativeModel,
    messages: list[Message],
    settings: CompletionSettings,
    *,
    max_tokens: int | None,
    form: Structure | None = None,
    form_param: str = "",
    tools: Tools | None = None,
    top_logprobs: int = 0,
    documents: Documents | None = None,
    drop_turns: bool = False,
) -> ChatPlan:
    """Prepares the completions of a conversation.

    Args:
      max_tokens: maximum tokens of a completion; None: the rest of the context.
      form: what constrains the content, and the request's parameter that gives it.
      tools: what the completion may call.
      documents: source of passages for the last message of the user.
      drop_turns: leaves out the oldest turns if the context is full.

    Raises:
      ApiError: 400: the conversation does not fit into the context, or the constraint cannot be compiled.
      UserError: an image cannot be decoded, or the text has an `<image>` without one.
    """
    room = model.context_length - int(max_tokens or 1)
    sources: list[Passage] = []
    if documents is not None:
        messages, sources = _with_passages(model, messages, documents, room)
    encoded = model.chat_form.encode_prompt_with_images(messages, max(1, room) if drop_turns else None)
    tokens = encoded.tokens
    new_tokens = room_for(model, len(tokens), max_tokens, "messages")
    images = model.read_images(encoded.images)
    planned = [
        PlannedCompletion(
            GenerationRequest(
                tokens=tuple(tokens.tolist()),
                max_new_tokens=new_tokens,
                sampling=settings.sampling,
                seed=(settings.seed + i) % 2**32,
                end_tokens=model.chat_ends,
                top_logprobs=int(top_logprobs),
                constraint=model.chat_constraint(form, tools, form_param),
                adapter=model.adapter,
                images=images,
            ),
            model.chat_reader(settings.stop, tools),
        )
        for i in range(settings.n)
    ]
    return ChatPlan(model, settings, planned, len(tokens), sources)


def room_for(model: GenerativeModel, prompt: int, max_tokens: int | None, param: str) -> int:
    """Returns the maximum number of new tokens; ApiError 400 if they and the prompt exceed the context."""
    context = model.context_length
    new = context - prompt if max_tokens is None else int(max_tokens)
    if new < 1 or prompt + new > context:
        wanted = "" if max_tokens is None else f" and {new} tokens of the completion"
        raise invalid(
            f"the model's context is {context} tokens, and this request needs more: {prompt} in {param}{wanted}",
            param,
            "context_length_exceeded",
        )
    return new


def _with_passages(
    model: GenerativeModel, messages: list[Message], documents: Documents, room: int
) -> tuple[list[Message], list[Passage]]:
    """Inserts the best passages that fit before the last message of the user."""
    asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=None)
    kept: list[Passage] = []
    if asked is None:
        return messages, kept
    question = messages[asked].content

    def inserted(passages: Sequence[Passage]) -> list[Message]:
        message = dataclasses.replace(messages[asked], content=with_passages(question, passages))
        return [*messages[:asked], message, *messages[asked + 1 :]]

    for passage in documents.find(question):
        if len(model.chat_form.encode_prompt(inserted([*kept, passage]))) <= room:
            kept.append(passage)
    return inserted(kept), kept


def _sources(passages: Sequence[Passage]) -> list[dict[str, Any]]:
    return [{"number": i, "place": p.place, "text": p.text} for i, p in enumerate(passages, start=1)]


# --- one object -------------------------------------------------------------------------------------------------------


def _choice(plan: ChatPlan, index: int, pieces: Sequence[Piece]) -> dict[str, Any]:
    """Returns a completion as one object."""
    deltas = [delta for piece in pieces for delta in piece.deltas]
    content = "".join(delta.text for delta in deltas if delta.kind == "content")
    reasoning = "".join(delta.text for delta in deltas if delta.kind == "reasoning")
    calls: list[dict[str, Any]] = []
    for delta in deltas:
        if delta.kind == "call":
            calls.append(_call(delta.text))
        elif delta.kind == "arguments":
            calls[delta.index]["function"]["arguments"] += delta.text
    message: dict[str, Any] = {"role": "assistant", "content": content or (None if calls else ""), "refusal": None}
    message |= {"reasoning": reasoning} if reasoning else {}
    message |= {"tool_calls": calls} if calls else {}
    tokens = [token for piece in pieces for token in piece.tokens]
    return {
        "index": index,
        "message": message,
        "logprobs": _logprobs(plan, tokens),
        "finish_reason": pieces[-1].finish_reason,
    }


def _call(name: str) -> dict[str, Any]:
    return {"id": f"call_{secrets.token_hex(12)}", "type": "function", "function": {"name": name, "arguments": ""}}


def _logprobs(plan: ChatPlan, tokens: Sequence[SampledToken]) -> dict[str, Any] | None:
    if plan.top_logprobs is None:
        return None
    return {"content": chat_logprobs(plan.model, tokens, plan.top_logprobs), "refusal": None}


# --- a stream ---------------------------------------------------------------------------------------------------------


async def _events(plan: ChatPlan, answer: Answer, head: Mapping[str, Any]) -> AsyncGenerator[str, None]:
    """Yields the chunks of a streamed completion."""
    usage: dict[str, Any] = {"usage": None} if plan.settings.include_usage else {}

    def chunk(index: int, delta: Mapping[str, Any], finish: str | None = None, logprobs: Any = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**head, "object": "chat.completion.chunk", "choices": [choice], **usage})

    begun: set[int] = set()
    pieces = answer.pieces()
    try:
        async for piece in pieces:
            if piece.index not in begun:
                begun.add(piece.index)
                yield chunk(piece.index, {"role": "assistant", "content": "", "refusal": None})
            logprobs = _logprobs(plan, piece.tokens) if piece.tokens else None
            for delta in _chunk_deltas(piece):
                yield chunk(piece.index, delta, logprobs=logprobs)
                logprobs = None
            if piece.finish_reason is not None:
                yield chunk(piece.index, {}, piece.finish_reason, logprobs)
    finally:
        await pieces.aclose()
    if plan.sources:
        yield event(
            {**head, "object": "chat.completion.chunk", "choices": [], "sources": _sources(plan.sources), **usage}
        )
    if plan.settings.include_usage:
        found = {**answer.usage(), "prompt_tokens": plan.num_prompt_tokens}
        found["total_tokens"] = found["prompt_tokens"] + found["completion_tokens"]
        yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": found})
    yield "data: [DONE]\n\n"


def _chunk_deltas(piece: Piece) -> list[dict[str, Any]]:
    """Returns the `delta` objects of a piece's chunks."""
    found: list[dict[str, Any]] = []
    for delta in piece.deltas:
        if delta.kind == "call":
            found.append({"tool_calls": [{"index": delta.index, **_call(delta.text)}]})
        elif delta.kind == "arguments":
            found.append({"tool_calls": [{"index": delta.index, "function": {"arguments": delta.text}}]})
        else:
            found.append({delta.kind: delta.text})
    return found
