"""Reading of a request's JSON body, within limits of size, time and depth."""

import asyncio
import json
import math
import re
from typing import Any

from starlette.requests import Request

from gptjax.serving.api_errors import ApiError, invalid

MAX_DEPTH = 64  # nested arrays and objects
_SURROGATE = re.compile("[\ud800-\udfff]")


async def read_json(request: Request, max_bytes: int, seconds: float) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      max_bytes: size limit of the body.
      seconds: time limit for the client to send it.

    Raises:
      ApiError: 400 for what is not a JSON object, 408 for a slow body, 413 for a large one, 415 for another type.
      ClientDisconnect: the client closed the connection.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another site may send text/plain without asking, but not application/json.
        raise ApiError(415, "the body must be JSON: send the header Content-Type: application/json")
    body = bytearray()
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body += chunk
                if len(body) > max_bytes:
                    raise ApiError(413, f"the body is larger than the limit of {max_bytes} bytes")
    except TimeoutError:
        raise ApiError(408, f"the body did not arrive within {seconds:g} seconds") from None
    return parse_json(bytes(body))


def parse_json(body: bytes) -> dict[str, Any]:
    """Parses a JSON object; raises ApiError 400 for anything else, for numbers that are not finite, and for strings
    with unpaired surrogates, which UTF-8 cannot hold.
    """
    try:
        value = json.loads(body.decode(), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise invalid(f"the body is not UTF-8: invalid byte at position {error.start}") from None
    except RecursionError:
        raise invalid(f"the body is nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise invalid(f"the body is not valid JSON: {str(error)[:200]}") from None
    if not isinstance(value, dict):
        raise invalid("the body is not a JSON object")
    _inspect(value)
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a number of JSON")


def _inspect(root: Any) -> None:
    """Raises ApiError for values that are too deep, or cannot be written as JSON again."""
    level = [root]
    for _ in range(MAX_DEPTH):
        below: list[Any] = []
        for value in level:
            if isinstance(value, dict):
                below += [*value.keys(), *value.values()]
            elif isinstance(value, list):
                below += value
            elif isinstance(value, str):
                if _SURROGATE.search(value):
                    raise invalid("a string has an unpaired surrogate, which is no character")
            elif isinstance(value, float) and not math.isfinite(value):
                raise invalid("a number is too large")
        if not below:
            return
        level = below
    raise invalid(f"the body is nested deeper than {MAX_DEPTH} levels")
