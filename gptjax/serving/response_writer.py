"""The object and the events of a response of /v1/responses, written while its pieces come."""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gptjax.serving.answering import Answer, Piece
from gptjax.serving.api_errors import ApiError
from gptjax.serving.chat_endpoint import ChatPlan
from gptjax.serving.completion_readers import Delta
from gptjax.serving.completion_settings import without_nulls
from gptjax.serving.event_stream import event
from gptjax.serving.token_logprobs import chat_logprobs

# The type of the output item that a piece belongs to.
_ITEM_OF = {"content": "message", "reasoning": "reasoning", "call": "function_call", "arguments": "function_call"}


class ResponseWriter:
    """Writes a response, as an object and as events, while its pieces come."""

    def __init__(self, plan: ChatPlan, answer: Answer, body: Mapping[str, Any]) -> None:
        self._plan, self._answer, self._body = plan, answer, body
        self._id, self._created = f"resp_{secrets.token_hex(16)}", time.time()
        self._output: list[dict[str, Any]] = []  # items, the last one maybe in progress
        self._logprobs: list[dict[str, Any]] = []
        self._status = "in_progress"
        self._reason: str | None = None
        self._number = 0
        self._open: str | None = None  # kind of the item in progress

    # --- events -------------------------------------------------------------------------------------------------------

    def begin(self) -> Iterator[str]:
        """Yields the events before the first piece."""
        yield self._event("response.created", response=self.response())
        yield self._event("response.in_progress", response=self.response())

    def write(self, piece: Piece) -> Iterator[str]:
        """Appends a piece; yields its events."""
        entries = chat_logprobs(self._plan.model, piece.tokens, int(self._body.get("top_logprobs", 0)))
        self._logprobs += entries
        for delta in piece.deltas:
            kind = _ITEM_OF[delta.kind]
            if self._open is not None and (self._open != kind or delta.kind == "call"):
                yield from self._end_item("completed")
            if delta.kind == "call":
                yield from self._begin_call(delta.text)
                continue
            if self._open is None:
                yield from self._begin_item(kind)
            yield from self._append(delta, entries)
            entries = []
        if piece.finish_reason is None:
            return
        cut = piece.finish_reason == "length"
        answers = any(item["type"] in ("message", "function_call") for item in self._output)
        if not answers and not cut:
            yield from self._end_item("completed") if self._open is not None else ()
            yield from self._begin_item("message")
        if self._open is not None:
            yield from self._end_item("incomplete" if cut else "completed")
        self._status, self._reason = ("incomplete", "max_output_tokens") if cut else ("completed", None)

    def end(self) -> Iterator[str]:
        """Yields the last event."""
        yield self._event(f"response.{self._status}", response=self.response())

    def fail(self, error: ApiError) -> Iterator[str]:
        """Yields the event of an error in mid-stream."""
        yield self._event("error", code=error.code, message=error.message, param=error.param)

    def _event(self, name: str, /, **content: Any) -> str:
        self._number += 1
        return event({"type": name, "sequence_number": self._number - 1, **content}, name)

    # --- items --------------------------------------------------------------------------------------------------------

    @property
    def _place_of_item(self) -> dict[str, Any]:
        return {"item_id": self._output[-1]["id"], "output_index": len(self._output) - 1}

    @property
    def _place(self) -> dict[str, Any]:
        return {**self._place_of_item, "content_index": 0}

    def _begin_call(self, name: str) -> Iterator[str]:
        self._open = "function_call"
        item = {
            "id": f"fc_{secrets.token_hex(12)}",
            "type": "function_call",
            "status": "in_progress",
            "call_id": f"call_{secrets.token_hex(12)}",
            "name": name,
            "arguments": "",
        }
        self._output.append(item)
        yield self._event("response.output_item.added", output_index=len(self._output) - 1, item=dict(item))

    def _begin_item(self, kind: str) -> Iterator[str]:
        self._open = kind
        identity = f"{'rs' if kind == 'reasoning' else 'msg'}_{secrets.token_hex(12)}"
        item: dict[str, Any] = {"id": identity, "type": kind, "status": "in_progress", "content": []}
        item["summary" if kind == "reasoning" else "role"] = [] if kind == "reasoning" else "assistant"
        self._output.append(item)
        index = len(self._output) - 1
        yield self._event("response.output_item.added", output_index=index, item={**item, "content": []})
        part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        if kind == "message":
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        item["content"].append(part)
        yield self._event("response.content_part.added", **self._place, part=dict(part))

    def _append(self, delta: Delta, entries: Sequence[dict[str, Any]]) -> Iterator[str]:
        if self._open == "function_call":
            self._output[-1]["arguments"] += delta.text
            yield self._event("response.function_call_arguments.delta", **self._place_of_item, delta=delta.text)
            return
        part = self._output[-1]["content"][0]
        part["text"] += delta.text
        if self._open == "reasoning":
            yield self._event("response.reasoning_text.delta", **self._place, delta=delta.text)
            return
        shown = list(entries) if self._with_logprobs else []
        yield self._event("response.output_text.delta", **self._place, delta=delta.text, logprobs=shown)

    def _end_item(self, status: str) -> Iterator[str]:
        item, kind = self._output[-1], self._open
        if kind == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._place_of_item, **done)
        else:
            yield from self._end_part(item["content"][0])
        item["status"] = status
        yield self._event("response.output_item.done", output_index=len(self._output) - 1, item=item)
        self._open = None

    def _end_part(self, part: dict[str, Any]) -> Iterator[str]:
        if self._open == "reasoning":
            yield self._event("response.reasoning_text.done", **self._place, text=part["text"])
        else:
            part["annotations"] = self._annotations(len(part["text"]))
            part["logprobs"] = self._logprobs if self._with_logprobs else []
            done = {"text": part["text"], "logprobs": part["logprobs"]}
            yield self._event("response.output_text.done", **self._place, **done)
        yield self._event("response.content_part.done", **self._place, part=part)

    @property
    def _with_logprobs(self) -> bool:
        return "message.output_text.logprobs" in self._body.get("include", ())

    def _annotations(self, end: int) -> list[dict[str, Any]]:
        return [
            {
                "type": "file_citation",
                "file_id": passage.place,
                "filename": passage.place.rpartition(":")[0],
                "index": end,
            }
            for passage in self._plan.sources
        ]

    # --- the object ---------------------------------------------------------------------------------------------------

    def response(self) -> dict[str, Any]:
        """Returns the response object as it is so far."""
        body, answer = self._body, self._answer
        usage = None
        if self._status != "in_progress":
            usage = {
                "input_tokens": answer.prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": answer.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": answer.reasoning_tokens},
                "total_tokens": answer.prompt_tokens + answer.completion_tokens,
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": None,
            "incomplete_details": None if self._reason is None else {"reason": self._reason},
            "instructions": body.get("instructions"),
            "max_output_tokens": body.get("max_output_tokens"),
            "metadata": body.get("metadata", {}),
            "model": self._plan.model.name,
            "output": list(self._output),
            "parallel_tool_calls": body.get("parallel_tool_calls", True),
            "previous_response_id": None,
            "reasoning": {"effort": without_nulls(body.get("reasoning", {})).get("effort"), "summary": None},
            "store": False,
            "temperature": body.get("temperature", 1.0),
            "text": body.get("text", {"format": {"type": "text"}}),
            "tool_choice": body.get("tool_choice", "auto"),
            "tools": [
                {"description": None, "parameters": None, "strict": True, **tool} for tool in body.get("tools", [])
            ],
            "top_p": body.get("top_p", 1.0),
            "truncation": body.get("truncation", "disabled"),
            "usage": usage,
        }
