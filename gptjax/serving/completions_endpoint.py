"""POST /v1/completions."""

import asyncio
import dataclasses
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from gptjax.inference.requests import GenerationRequest, SampledToken
from gptjax.serving.answering import Answer, Piece, PlannedCompletion, Serving
from gptjax.serving.api_errors import invalid
from gptjax.serving.chat_endpoint import room_for
from gptjax.serving.completion_readers import TextReader
from gptjax.serving.completion_settings import CompletionSettings, completion_settings, structure
from gptjax.serving.event_stream import collected, event, event_stream
from gptjax.serving.request_schemas import COMPLETION_REQUEST, MAX_COMPLETIONS, MAX_TEXTS
from gptjax.serving.served_models import GenerativeModel
from gptjax.serving.token_logprobs import TextLogprobs


@dataclasses.dataclass(frozen=True)
class TextPlan:
    """Completions of prompts that are ready to be generated.

    Attributes:
      prompts: tokens of each prompt.
      texts: text of each prompt, for `echo`.
      copies: completions that are generated for each prompt, of which `settings.n` are returned.
      generates: False: only the prompt is scored.
      top_logprobs: number of most probable tokens to report; None: no log-probabilities.
    """

    model: GenerativeModel
    settings: CompletionSettings
    prompts: list[list[int]]
    texts: list[str]
    copies: int
    planned: list[PlannedCompletion]
    echo: bool
    generates: bool
    top_logprobs: int | None

    def prompt_of(self, index: int) -> int:
        """Returns the prompt that a completion belongs to."""
        return index // self.copies


async def create_completion(request: Request) -> Response:
    serving = Serving.of(request)
    body = await serving.body(request, COMPLETION_REQUEST)
    model = serving.models.generative(body["model"])
    plan = await asyncio.to_thread(_plan, model, body)
    num_prompt_tokens = sum(map(len, plan.prompts))
    answer = Answer(request, plan.planned, num_prompt_tokens)
    head = {"id": f"cmpl-{secrets.token_hex(12)}", "created": int(time.time()), "model": model.name}
    head["object"] = "text_completion"
    if plan.settings.stream:
        return await event_stream(request, _events(plan, answer, head))
    pieces = await collected(request, answer.pieces())
    found = [[piece for piece in pieces if piece.index == i] for i in range(len(plan.planned))]
    choices: list[dict[str, Any]] = []
    for start in range(0, len(found), plan.copies):
        best = _best(range(start, start + plan.copies), found, plan.settings.n)
        choices += [_choice(plan, answer, i, found[i], len(choices) + place) for place, i in enumerate(best)]
    return JSONResponse({**head, "choices": choices, "usage": _usage(plan, answer)})


def _usage(plan: TextPlan, answer: Answer) -> dict[str, Any]:
    usage = answer.usage()
    if not plan.generates:
        usage |= {"completion_tokens": 0, "total_tokens": answer.prompt_tokens}
    return usage


def _best(copies: range, found: Sequence[Sequence[Piece]], n: int) -> list[int]:
    """Returns the completions of the highest mean log-probability, best first; all of them in order if n are asked."""
    if len(copies) == n:
        return list(copies)

    def mean(i: int) -> float:
        logprobs = [token.logprob for piece in found[i] for token in piece.tokens]
        return sum(logprobs) / max(1, len(logprobs))

    return sorted(copies, key=mean, reverse=True)[:n]


def _plan(model: GenerativeModel, body: Mapping[str, Any]) -> TextPlan:
    settings = completion_settings(body, model.vocab_size)
    echo, max_tokens, copies = bool(body.get("echo")), int(body.get("max_tokens", 16)), int(body.get("best_of", 0))
    copies = copies or settings.n
    if copies < settings.n:
        raise invalid(f"best_of={copies} is less than n={settings.n}", "best_of")
    if settings.stream and copies > settings.n:
        raise invalid("best_of cannot be streamed: completions are compared when they are complete", "best_of")
    if max_tokens == 0 and not echo:
        raise invalid("max_tokens=0 needs echo=true", "max_tokens")
    prompts = _prompts(model, body)
    if len(prompts) * copies > max(MAX_TEXTS, MAX_COMPLETIONS):
        raise invalid(f"{len(prompts)} prompts with {copies} completions each are too many: send fewer", "prompt")
    top = int(body["logprobs"]) if "logprobs" in body else None
    form, place = structure(body)
    if form is not None and "suffix" in body:
        raise invalid(f"{place.partition('.')[0]} and suffix exclude each other", "suffix")
    texts = [prompt if isinstance(prompt, str) else model.tokenizer.decode(prompt) for prompt, _ in prompts]
    planned = []
    for prompt, (_, tokens) in enumerate(prompts):
        new_tokens = room_for(model, len(tokens), max(1, max_tokens), "prompt")
        for copy in range(copies):
            request = GenerationRequest(
                tokens=tuple(tokens),
                max_new_tokens=new_tokens,
                sampling=settings.sampling,
                seed=(settings.seed + prompt * copies + copy) % 2**32,
                end_tokens=model.text_ends,
                top_logprobs=top or 0,
                prompt_logprobs=echo and top is not None and len(tokens) > 1,
                constraint=model.text_constraint(form, place),
                adapter=model.adapter,
            )
            alone = "suffix" in body  # a middle is encoded on its own
            planned.append(
                PlannedCompletion(request, TextReader(model.tokenizer, settings.stop, () if alone else tokens))
            )
    return TextPlan(
        model, settings, [tokens for _, tokens in prompts], texts, copies, planned, echo, max_tokens > 0, top
    )


def _prompts(model: GenerativeModel, body: Mapping[str, Any]) -> list[tuple[str | list[int], list[int]]]:
    """Returns the prompts as they are given, and as tokens."""
    given = body["prompt"]
    if isinstance(given, str) or isinstance(given[0], int | float):
        given = [given]
    if "suffix" in body:
        if model.infilling is None:
            raise invalid("suffix needs a model that is trained to fill in the middle", "suffix")
        if body.get("echo"):
            raise invalid("suffix and echo exclude each other", "suffix")
        if not all(isinstance(prompt, str) for prompt in given):
            raise invalid("suffix needs prompts that are texts", "prompt")
        return [(prompt, model.infilling.prompt(prompt, body["suffix"])) for prompt in given]
    return [(prompt, tokens_of(model, prompt, "prompt")) for prompt in given]


def tokens_of(model: GenerativeModel, given: str | Sequence[int], param: str) -> list[int]:
    """Returns the tokens of a text, or checked tokens; those of an empty text are end-of-text.

    Raises:
      ApiError: 400: a token is outside of the vocabulary, or the text is empty and there is no end-of-text.
    """
    if isinstance(given, str):
        tokens = model.tokenizer.encode(given).tolist()
        if not tokens and model.tokenizer.end_of_text is None:
            raise invalid(f"{param} is empty, and this model has no end-of-text token to start from", param)
        return tokens or [model.tokenizer.end_of_text]
    tokens = [int(token) for token in given]
    if outside := [token for token in tokens if token >= model.vocab_size]:
        raise invalid(f"{param} has the token {outside[0]}, outside of the vocabulary of {model.vocab_size}", param)
    return tokens


class _ChoiceWriter:
    """Writes the text and log-probabilities of one completion, in one piece or several."""

    def __init__(self, plan: TextPlan, answer: Answer, index: int) -> None:
        self._plan, self._answer, self._index = plan, answer, index
        self._begun = False
        top = plan.top_logprobs
        self._logprobs = None if top is None else TextLogprobs(plan.model, top)

    def write(self, pieces: Sequence[Piece]) -> tuple[str, dict[str, Any] | None]:
        plan = self._plan
        if self._logprobs is not None:
            self._logprobs.clear()
        text = ""
        if plan.echo and not self._begun:
            text = plan.texts[plan.prompt_of(self._index)]
            self._add_prompt()
        self._begun = True
        if plan.generates:
            text += "".join(delta.text for piece in pieces for delta in piece.deltas)
            for token in (token for piece in pieces for token in piece.tokens):
                self._add(token)
        return text, None if self._logprobs is None else self._logprobs.as_json()

    def _add(self, token: SampledToken) -> None:
        if self._logprobs is not None:
            self._logprobs.add(token.token, token.logprob, token.top)

    def _add_prompt(self) -> None:
        if self._logprobs is None:
            return
        first, *rest = self._plan.prompts[self._plan.prompt_of(self._index)]
        self._logprobs.add(first, None, ())
        found = self._answer.prompt_logprobs[self._index]
        if rest:
            for token, logprob, top in zip(rest, found.logprobs.tolist(), found.top, strict=True):
                self._logprobs.add(token, logprob, top)


def _choice(plan: TextPlan, answer: Answer, index: int, pieces: Sequence[Piece], place: int) -> dict[str, Any]:
    text, logprobs = _ChoiceWriter(plan, answer, index).write(pieces)
    reason = pieces[-1].finish_reason if plan.generates else "length"
    return {"index": place, "text": text, "logprobs": logprobs, "finish_reason": reason}


async def _events(plan: TextPlan, answer: Answer, head: Mapping[str, Any]) -> AsyncGenerator[str, None]:
    """Yields the chunks of streamed completions."""
    usage: dict[str, Any] = {"usage": None} if plan.settings.include_usage else {}
    writers = [_ChoiceWriter(plan, answer, i) for i in range(len(plan.planned))]
    pieces = answer.pieces()
    try:
        async for piece in pieces:
            text, logprobs = writers[piece.index].write([piece])
            reason = piece.finish_reason if plan.generates or piece.finish_reason is None else "length"
            choice = {"index": piece.index, "text": text, "logprobs": logprobs, "finish_reason": reason}
            yield event({**head, "choices": [choice], **usage})
    finally:
        await pieces.aclose()
    if plan.settings.include_usage:
        yield event({**head, "choices": [], "usage": _usage(plan, answer)})
    yield "data: [DONE]\n\n"
