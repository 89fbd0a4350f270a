"""Runs the application on a socket: time limits of connections, and a graceful end on SIGTERM."""

import asyncio
import signal
import socket
import sys
import time
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from gptjax.config import UserError
from gptjax.serving.answering import Serving

HEADER_SECONDS = 10.0  # time limit for a client to send the headers of a request
IDLE_SECONDS = 30.0  # after which a connection without a request is closed
MAX_HEADER_BYTES = 32 << 10
LINGER_SECONDS = 0.5  # after the last answer of a server that ends: requests on their way are refused, not cut off


class TimedProtocol(H11Protocol):
    """HTTP/1.1 that closes connections whose client sends its headers too slowly."""

    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not None and not self.cycle.response_complete:
            self._stop_timer()
        elif self._timer is None and self._has_begun() and not self.transport.is_closing():
            self._await_headers()

    def _has_begun(self) -> bool:
        """Whether some bytes of a further request have arrived."""
        return bool(self.conn.trailing_data[0])

    def _await_headers(self) -> None:
        self._timer = self.loop.call_later(HEADER_SECONDS, self._close_slow)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _close_slow(self) -> None:
        self._timer = None
        if self.transport.is_closing():
            return
        if self._has_begun():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")
        self.transport.close()


class DrainingServer(uvicorn.Server):
    """A server that on SIGTERM or SIGINT refuses new requests, answers those in progress, and then ends.

    Args:
      drain_seconds: after which requests in progress are cut off.
    """

    def __init__(self, config: uvicorn.Config, serving: Serving, drain_seconds: float) -> None:
        super().__init__(config)
        self._serving, self._drain_seconds = serving, drain_seconds
        self._drains_since: float | None = None
        self._drained_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins to drain; a second signal ends the server at once."""
        if self._drains_since is not None:
            self.should_exit = self.force_exit = True
            return
        self._serving.draining = True
        self._drains_since = time.monotonic()
        name = signal.Signals(sig).name
        print(f"{name}: answering {self._serving.active} requests in progress", file=sys.stderr, flush=True)

    async def on_tick(self, counter: int) -> bool:
        if self._drains_since is not None:
            now = time.monotonic()
            if self._drained_at is None and self._serving.active == 0:
                self._drained_at = now
            drained = self._drained_at is not None and now - self._drained_at >= LINGER_SECONDS
            if drained or now - self._drains_since > self._drain_seconds:
                self.should_exit = True
        return await super().on_tick(counter)


def bound_socket(host: str, port: int) -> socket.socket:
    """Returns a socket that listens on an address.

    Args:
      port: 0: a free one.

    Raises:
      UserError: the address is in use, not this machine's, or a port that needs privileges.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, kind, protocol)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
        found.listen(2048)
    except OSError as error:
        raise UserError(f"cannot listen on --host={host} --port={port}: {error.strerror}") from None
    return found


def server_config(app: ASGIApp) -> uvicorn.Config:
    """Returns uvicorn's settings: time limits, HTTP/1.1 only, no log of its own."""
    return uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        lifespan="off",
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=int(IDLE_SECONDS),
        timeout_graceful_shutdown=1,  # the requests have been drained
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
    )


def serve(app: ASGIApp, serving: Serving, listening: socket.socket, drain_seconds: float) -> None:
    """Serves until SIGTERM or SIGINT, and until the requests then in progress are answered."""
    serving.thread.start()
    try:
        DrainingServer(server_config(app), serving, drain_seconds).run(sockets=[listening])
    finally:
        serving.thread.stop()
