"""The ASGI layer around all endpoints: API keys, draining, errors as objects, the request log."""

import asyncio
import hashlib
import hmac
import json
import logging
import secrets
import time
from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptjax.config import UserError
from gptjax.serving.answering import Serving
from gptjax.serving.api_errors import ApiError

DRAIN_RETRY_SECONDS = 5
# What needs no key, as it shows nothing of the models: liveness, documentation and the page.
_PROTECTED = ("/v1/", "/tokenize", "/detokenize", "/metrics")


class ApiKeys:
    """The keys that requests may have. Compared in constant time."""

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def client(self, authorization: bytes) -> str | None:
        """Returns the identity behind an Authorization header, digits that do not reveal the key; None: no key fits."""
        scheme, _, key = authorization.partition(b" ")
        given = hashlib.sha256(key.strip()).digest()
        fits = False
        for digest in self._digests:  # all of them, whichever fits
            fits |= hmac.compare_digest(digest, given)
        return given.hex()[:12] if fits and scheme.lower() == b"bearer" else None


class Guard:
    """Wraps an application: checks keys, refuses while draining, answers exceptions, and logs each request."""

    def __init__(self, app: ASGIApp, serving: Serving) -> None:
        self._app, self._serving = app, serving
        self._keys = ApiKeys(serving.options.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        serving = self._serving
        exchange = _Exchange(scope, send, serving)
        serving.active += 1
        try:
            self._admit(scope)
            # Beyond the deadlines of bodies and completions: a client that does not read its response.
            async with asyncio.timeout(serving.options.request_seconds + 2 * serving.options.body_seconds):
                await self._app(scope, receive, exchange.send)
        except ClientDisconnect:
            exchange.disconnected = True
            serving.metrics.disconnects.inc()
        except Exception as error:
            await exchange.fail(_as_api_error(error), scope, receive)
        except BaseException:  # cancelled
            exchange.disconnected = True
            raise
        finally:
            serving.active -= 1
            self._log(scope, exchange)

    def _admit(self, scope: Scope) -> None:
        """Raises ApiError for a request without a key, or while the server shuts down; notes who the client is."""
        path, options = scope["path"], self._serving.options
        host = (scope.get("client") or ("",))[0]
        scope["gptjax.client"] = host
        if options.api_keys and path.startswith(_PROTECTED) and scope["method"] != "OPTIONS":
            header = dict(scope["headers"]).get(b"authorization", b"")
            client = self._keys.client(header)
            if client is None:
                reason = "it needs the header Authorization: Bearer KEY" if not header else "the API key is not known"
                raise ApiError(
                    401, f"not authorised: {reason}", code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"}
                )
            scope["gptjax.client"] = client
        if self._serving.draining and scope["method"] == "POST":
            raise ApiError(
                503,
                "the server is shutting down",
                code="shutting_down",
                headers={"Retry-After": str(DRAIN_RETRY_SECONDS)},
            )

    def _log(self, scope: Scope, exchange: "_Exchange") -> None:
        seconds = time.monotonic() - exchange.started
        metrics, log = self._serving.metrics, self._serving.options.log
        route = getattr(scope.get("route"), "path", None) or "other"
        metrics.requests.labels(route, "disconnected" if exchange.disconnected else str(exchange.status)).inc()
        metrics.request_seconds.observe(seconds)
        if log is None:
            return
        record: dict[str, Any] = {
            "time": round(time.time(), 3),
            "id": exchange.identity,
            "client": scope.get("gptjax.client", ""),
            "method": scope["method"],
            "path": scope["path"][:200],
            "status": exchange.status,
            "seconds": round(seconds, 4),
            **({"disconnected": True} if exchange.disconnected else {}),
            **({} if exchange.error is None else {"error": exchange.error}),
            **scope.get("gptjax.log", {}),
        }
        print(json.dumps(record), file=log, flush=True)


class _Exchange:
    """One request and its response."""

    def __init__(self, scope: Scope, send: Send, serving: Serving) -> None:
        self._send, self._serving = send, serving
        self.identity = secrets.token_hex(8)
        self.started = time.monotonic()
        self.status: int | None = None
        self.disconnected = False
        self.error: str | None = None
        self._scope = scope

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            # The connection of a server that shuts down will be closed: clients must not send further requests on it.
            closes = [(b"connection", b"close")] if self._serving.draining else []
            message["headers"] = [*message["headers"], (b"x-request-id", self.identity.encode()), *closes]
        await self._send(message)

    async def fail(self, error: ApiError, scope: Scope, receive: Receive) -> None:
        """Answers with an error object; a response that has begun is cut off: the server closes the connection."""
        self.error = error.message
        if self.status is None:
            await JSONResponse(error.body(), error.status, error.headers)(scope, receive, self.send)


def _as_api_error(error: Exception) -> ApiError:
    if isinstance(error, ApiError):
        return error
    if isinstance(error, TimeoutError):
        return ApiError(504, "the deadline of the request passed", code="deadline_exceeded")
    if isinstance(error, UserError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):
        return ApiError(error.status_code, error.detail, headers=error.headers)
    logging.getLogger("gptjax.serving").error("a request failed", exc_info=error)
    return ApiError(500, "the server failed, see its log")
