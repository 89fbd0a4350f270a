"""Connects the processes of a job to process 0 by an authenticated handshake.

Both ends prove by challenge and response (HMAC-SHA256) that they know the job's token, which is never sent:

  process 0 -> other  {"challenge": C}
  other -> process 0  {"gptjax": number, "of": count, "challenge": D, "proof": HMAC(token, C join number count)}
  process 0 -> other  {"met": count, "proof": HMAC(token, D met number count)}, or {"stop": reason}

Without a token anyone who reaches the port can take a process's place. Nothing is encrypted or signed afterwards: the
network must be trusted.
"""

import hmac
import json
import secrets
import selectors
import socket
import time
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from gptjax.config import UserError

TOKEN = "GPTJAX_JOB_TOKEN"  # environment variable
SILENCE = 30  # seconds after which a machine that sends nothing, not even acknowledgements, counts as unreachable
HELLO = 30  # timeout in seconds for the complete first line of a new connection
MAX_HELLO = 4096  # maximum size of a line in bytes
MAX_STRANGERS = 128  # pending connections in addition to those of the job; one more closes the oldest


def line_of(message: dict[str, Any]) -> bytes:
    """Serialises a message as a line of JSON."""
    return json.dumps(message).encode() + b"\n"


def proof_of(token: str, challenge: str, role: str, process: int, count: int) -> str:
    """Returns the HMAC-SHA256 response to a challenge, 64 hex digits, which proves knowledge of the token."""
    return hmac.digest(
        token.encode(errors="surrogateescape"), f"{challenge} {role} {process} {count}".encode(), "sha256"
    ).hex()


def _is_proof(given: Any, token: str, challenge: str, role: str, process: int, count: int) -> bool:
    expected = proof_of(token, challenge, role, process, count).encode()
    return isinstance(given, str) and hmac.compare_digest(given.encode(errors="replace"), expected)


@dataclass
class Newcomer:
    """A connection accepted by process 0 whose handshake is in progress."""

    sock: socket.socket
    deadline: float
    challenge: str
    received: bytes = b""
    their_challenge: str = ""

    def hello(self) -> tuple[int, int, Any] | None:
        """Reads the available bytes; returns (rank, count, proof) once the line is complete, else None.

        Raises:
          OSError, ValueError, RecursionError: the connection is closed, or the line is not a hello.
        """
        chunk = self.sock.recv(MAX_HELLO)
        self.received += chunk
        line, end, rest = self.received.partition(b"\n")
        if not chunk or rest or len(self.received) > MAX_HELLO:
            raise ValueError("no hello")
        if not end:
            return None
        match json.loads(line):
            case {"gptjax": int(number), "of": int(count), "challenge": str(challenge), "proof": proof} if (
                challenge.isascii()
            ):
                self.their_challenge = challenge
                return number, count, proof
        raise ValueError("no hello")


def accept(port: int, count: int, timeout: float, token: str) -> dict[int, Newcomer]:
    """Accepts the connections of all other processes; returns them by rank.

    Raises:
      UserError: the port is in use, or not all `count` processes connect within `timeout` seconds.
    """
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=count + MAX_STRANGERS)
    except OSError as error:
        raise UserError(f"--coordinator_address: cannot listen on port {port}, {error.strerror}: try another") from None
    with server, selectors.DefaultSelector() as selector:
        return _Meeting(server, selector, count, token).run(timeout)


class _Meeting:
    """The handshake in process 0. Reads all connections concurrently, so that a port scanner delays no process."""

    def __init__(self, server: socket.socket, selector: selectors.BaseSelector, count: int, token: str) -> None:
        self._server, self._selector, self._count, self._token = server, selector, count, token
        self._members: dict[int, Newcomer] = {}
        self._pending: dict[socket.socket, Newcomer] = {}  # in order of arrival
        self._refused = 0  # connections with a different token
        server.setblocking(False)
        selector.register(server, selectors.EVENT_READ)

    def run(self, timeout: float) -> dict[int, Newcomer]:
        deadline = time.monotonic() + timeout
        while missing := [number for number in range(1, self._count) if number not in self._members]:
            if (now := time.monotonic()) > deadline:
                names = ", ".join(map(str, missing))
                refused = f"; {self._refused} connections had a different {TOKEN}" if self._refused else ""
                self._fail(
                    f"process {names} of {self._count} did not connect within {timeout:g} s: "
                    f"start all processes with the same flags{refused}"
                )
            for newcomer in [newcomer for newcomer in self._pending.values() if newcomer.deadline < now]:
                self._drop(newcomer)
            for key, _ in self._selector.select(min(deadline - now, 0.1)):
                if key.fileobj is self._server:
                    self._greet()
                elif key.fileobj in self._pending:  # not dropped in this round
                    self._read(self._pending[key.fileobj])
        for newcomer in list(self._pending.values()):
            self._drop(newcomer)
        return self._members

    def _greet(self) -> None:
        """Accepts a connection and sends it a challenge."""
        try:
            sock, _ = self._server.accept()
        except OSError:  # the connection is already closed, or there are too many open files
            time.sleep(0.01)
            return
        if len(self._pending) >= self._count + MAX_STRANGERS:
            self._drop(next(iter(self._pending.values())))
        sock.setblocking(False)
        newcomer = Newcomer(sock, time.monotonic() + HELLO, secrets.token_hex(16))
        with suppress(OSError):
            sock.sendall(line_of({"challenge": newcomer.challenge}))
        self._pending[sock] = newcomer
        self._selector.register(sock, selectors.EVENT_READ)

    def _read(self, newcomer: Newcomer) -> None:
        """Reads from a connection, and accepts or refuses it when its hello is complete."""
        try:
            hello = newcomer.hello()
        except BlockingIOError:
            return
        except (OSError, ValueError, RecursionError):
            self._drop(newcomer)
            return
        if hello is None:
            return
        number, count, proof = hello
        if not _is_proof(proof, self._token, newcomer.challenge, "join", number, count):
            self._refused += 1
            self._drop(newcomer, f"{TOKEN} differs from that of process 0: set the same in all processes")
        elif count != self._count:
            self._fail(
                f"--num_processes={count} in process {number}, but {self._count} in process 0: give all the same"
            )
        elif number in self._members or not 0 < number < count:
            self._fail(f"two processes have --process_id={number}: give each its own")
        else:
            self._forget(newcomer)
            newcomer.sock.setblocking(True)
            _watch(newcomer.sock)
            self._members[number] = newcomer

    def _forget(self, newcomer: Newcomer) -> None:
        self._selector.unregister(newcomer.sock)
        del self._pending[newcomer.sock]

    def _drop(self, newcomer: Newcomer, reason: str | None = None) -> None:
        self._forget(newcomer)
        _dismiss(newcomer.sock, reason)

    def _fail(self, message: str) -> NoReturn:
        """Aborts the handshake of all processes with an error."""
        for newcomer in (*self._members.values(), *self._pending.values()):
            _dismiss(newcomer.sock, message)
        raise UserError(message)


def _dismiss(sock: socket.socket, message: str | None) -> None:
    """Closes a connection after sending the peer the reason."""
    if message is not None:
        with suppress(OSError):
            sock.setblocking(False)
            sock.sendall(line_of({"stop": message}))
    sock.close()


def join(host: str, port: int, process: int, count: int, timeout: float, token: str) -> socket.socket:
    """Connects to process 0; returns the socket when all processes are connected.

    Raises:
      UserError: process 0 cannot be reached, refuses this process, or ends.
    """
    try:
        sock = connect(host, port, timeout)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a host name
        raise UserError(
            f"process {process} cannot reach process 0 at {host}:{port} within {timeout:g} s ({error}): "
            "start all processes, with a --coordinator_address of process 0's machine that all of them can reach"
        ) from None
    own = secrets.token_hex(16)
    try:
        message = _read_message(sock, time.monotonic() + SILENCE)
        if "stop" not in message:
            proof = proof_of(token, message["challenge"], "join", process, count)
            sock.settimeout(SILENCE)
            sock.sendall(line_of({"gptjax": process, "of": count, "challenge": own, "proof": proof}))
            # Process 0 itself reports missing processes, after `timeout`.
            message = _read_message(sock, time.monotonic() + 2 * timeout)
        if "stop" not in message and not (
            message["met"] == count and _is_proof(message["proof"], token, own, "met", process, count)
        ):
            raise ValueError(message)
    except (OSError, ValueError, KeyError, RecursionError):
        sock.close()
        raise UserError(
            f"process 0 at {host}:{port} ended during startup, or another program listens on that port: "
            "see the output of process 0"
        ) from None
    if "stop" in message:
        sock.close()
        raise UserError(str(message["stop"]))
    sock.settimeout(None)
    return sock


def connect(host: str, port: int, timeout: float) -> socket.socket:
    """Connects, retrying until it succeeds; raises OSError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=max(0.1, min(5, deadline - time.monotonic())))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            if sock.getsockname() == sock.getpeername():  # self-connection: the kernel chose `port` as the local port
                sock.close()
                continue
            sock.settimeout(None)
            _watch(sock)
            return sock


def _watch(sock: socket.socket) -> None:
    """Enables keepalive, so that the kernel closes the connection if the other machine stops responding."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", (SILENCE - 10) // 5)):
        if hasattr(socket, name):  # macOS lacks the first
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: the same while data is unacknowledged
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE)


def _read_message(sock: socket.socket, deadline: float) -> dict[str, Any]:
    """Reads exactly one line, a JSON object.

    Raises:
      OSError, ValueError, RecursionError: the connection is closed or `deadline` (on the monotonic clock) passes
        before the line ends, or the line is not a JSON object or is longer than `MAX_HELLO`.
    """
    line = b""
    while not line.endswith(b"\n"):
        sock.settimeout(max(0.001, deadline - time.monotonic()))
        if len(line) > MAX_HELLO or time.monotonic() > deadline or not (byte := sock.recv(1)):
            raise OSError("closed, too slow or too long")
        line += byte
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("no JSON object")
    return message


def reserve_port() -> socket.socket:
    """Returns a socket bound to an unused port, which it keeps from other programs until it is closed.

    A gRPC server of this user can listen on the port nevertheless: both set `SO_REUSEPORT`. The socket itself never
    listens, so that it takes no connections.
    """
    sock = socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind(("", 0))
    return sock
