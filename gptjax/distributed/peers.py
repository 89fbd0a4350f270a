"""The processes of one command, in touch: one that ends is known to all at once, and small values are exchanged.

Process 0 listens; every other process keeps one TCP connection to it, which carries lines of JSON. A connection that
closes is a process that ended. The kernel closes it when a process is killed, and gives it up when the machine at its
other end is silent for `SILENCE` seconds; a process that only compiles for an hour keeps it.

JAX's own coordination service would notice as well: the death of process 0 at once, that of others after 100 seconds.
It then ends the process from C++ with a page of text, so it is kept from noticing first: other processes reach it
through a `relay`, whose near end stays open when its far end closes.
"""

import json
import os
import queue
import socket
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NoReturn

from gptjax.config import UserError

SILENCE = 30  # seconds
GRACE = 2  # seconds: the end of another process often shows as a failed collective, before it shows here
# Exit codes: a mistake that the user can mend; anything else; stopped on request, to go on when it is started again
# (EX_TEMPFAIL of sysexits.h); interrupted at once, as a shell has it.
STOPPED, FAILED, PREEMPTED, INTERRUPTED = 2, 1, 75, 130


class Boundaries:
    """Places where a program can stop, which all processes pass in the same order, counted from 1.

    Passing one costs nothing and waits for nobody, until a stop is asked for: then a process waits at its next boundary
    to be told at which one, that nobody has passed yet, all are to stop.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passed = 0
        self._frozen = False
        self._stop: tuple[int, str] | None = None

    def freeze(self) -> int:
        """Lets no further boundary be passed until `decide`; how many have been."""
        with self._changed:
            self._frozen = True
            return self._passed

    def decide(self, boundary: int, why: str) -> None:
        """Has all boundaries from `boundary` on answer `why`."""
        with self._changed:
            self._stop = boundary, why
            self._changed.notify_all()

    def reach(self) -> str | None:
        """Passes the next boundary: None; or why to stop there."""
        with self._changed:
            while self._frozen and self._stop is None:
                self._changed.wait()
            self._passed += 1
            return self._stop[1] if self._stop is not None and self._passed >= self._stop[0] else None


class Peers:
    """This process and its connections: process 0's to all others, or that of another to process 0.

    Attributes:
      process, count: this one's number, and how many there are.
      boundaries: where this process can stop together with the others, when one calls `ask_to_stop`.
    """

    def __init__(self, host: str, port: int, process: int, count: int, timeout: float):
        """Waits for all processes.

        Raises:
          UserError: the port is taken, process 0 cannot be reached, or the processes are not `count` different ones,
            after `timeout` seconds at most.
        """
        self.process, self.count = process, count
        self._ending, self._sending, self._agreeing = threading.Lock(), threading.Lock(), threading.Lock()
        self._leaving = False
        self.boundaries = Boundaries()
        self._why: str | None = None  # process 0: a stop is asked for
        self._passed: dict[int, int] = {}  # process 0: boundaries, by process
        if process == 0:
            self._sockets = _accept(port, count, timeout)
            for peer in self._sockets:
                self._send(peer, {"met": count})
        else:
            self._sockets = {0: _join(host, port, process, count, timeout)}
        self._inbox: dict[int, queue.SimpleQueue[Any]] = {peer: queue.SimpleQueue() for peer in self._sockets}
        for peer in self._sockets:
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in their order; each calls this at the same place, and waits for the others.

        Args:
          value: what JSON can hold; tuples come back as lists.
        """
        if self.process != 0:
            self._send(0, {"value": value})
            return self._inbox[0].get()
        values = [json.loads(json.dumps(value)), *(self._inbox[peer].get() for peer in range(1, self.count))]
        for peer in self._sockets:
            self._send(peer, {"value": values})
        return values

    def ask_to_stop(self, why: str) -> None:
        """Has all processes stop at the same one of their boundaries; any thread of any process may call this."""
        if self.process != 0:
            self._send(0, {"ask": why})
            return
        with self._agreeing:
            if self._why is not None:
                return
            self._why = why
        for peer in self._sockets:
            self._send(peer, {"freeze": True})
        self._learn(0, self.boundaries.freeze())

    def _learn(self, process: int, passed: int) -> None:
        """Process 0: takes how many boundaries a process has passed, and decides when it knows that of all."""
        with self._agreeing:
            self._passed[process] = passed
            if len(self._passed) < self.count:
                return
        assert self._why is not None
        decision = (max(self._passed.values()) + 1, self._why)
        for peer in self._sockets:
            self._send(peer, {"decision": decision})
        self.boundaries.decide(*decision)

    def stop(self, message: str, code: int, details: str) -> NoReturn:
        """Ends this process and all others, which say that this one stopped, and why."""
        time.sleep(GRACE)
        name = f"process {self.process}"
        self._end(f"{name}: {message}", f"{name} stopped: {message}", code, details)

    def leave(self) -> None:
        """From here on a process may end without being missed; each calls this when all have done their work."""
        self._leaving = True

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        # Threads send too. One that never gets through, as nobody reads, must not keep the process from ending.
        locked = self._sending.acquire(timeout=GRACE if self._ending.locked() else -1)
        try:
            with suppress(OSError):  # of a closed connection `_listen` hears
                self._sockets[peer].sendall(json.dumps(message).encode() + b"\n")
        finally:
            if locked:
                self._sending.release()

    def _listen(self, peer: int) -> None:
        with suppress(OSError), self._sockets[peer].makefile("rb") as lines:
            for line in lines:
                self._take(peer, json.loads(line))
        if not self._leaving:
            gone = (
                f"process {peer} is gone: it was killed, or its machine is out of reach; "
                "run the same command again in all processes, and it goes on from what was saved"
            )
            self._end(gone, gone, FAILED)

    def _take(self, peer: int, message: dict[str, Any]) -> None:
        if "value" in message:
            self._inbox[peer].put(message["value"])
        elif "stop" in message:
            self._end(message["stop"], message["stop"], message["code"])
        elif "ask" in message:
            self.ask_to_stop(message["ask"])
        elif "freeze" in message:
            self._send(peer, {"passed": self.boundaries.freeze()})
        elif "passed" in message:
            self._learn(peer, message["passed"])
        else:
            self.boundaries.decide(*message["decision"])

    def _end(self, line: str, line_of_others: str, code: int, details: str = "") -> NoReturn:
        """Says `line` and ends the process; process 0 tells the others first, as they hear of each other through it."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        for peer in self._sockets:
            self._send(peer, {"stop": line_of_others, "code": code})
            with suppress(OSError):
                self._sockets[peer].shutdown(socket.SHUT_WR)
        # Neither print nor sys.exit: the main thread may hold a lock, or wait in a collective without end. Or it
        # draws its progress: what it still says goes nowhere, so that this line is the last.
        stderr = os.dup(sys.stderr.fileno())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.write(stderr, f"\n{details}error: {line}\n".encode())
        if self.process == 0:
            time.sleep(0.5)  # a connection that closes with lines unread loses those on their way
        os._exit(code)


def relay(host: str, port: int) -> int:
    """Passes connections to the port returned, of this machine, on to `host`:`port`."""
    server = socket.create_server(("127.0.0.1", 0))
    open_ends: list[socket.socket] = []  # so that a near end outlives its far end

    def serve() -> None:
        while True:
            near, _ = server.accept()
            far = _connect(host, port, SILENCE)
            open_ends.extend((near, far))
            threading.Thread(target=_pump, args=(near, far), daemon=True).start()
            threading.Thread(target=_pump, args=(far, near), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)


# --- how they meet ----------------------------------------------------------------------------------------------------


def _accept(port: int, count: int, timeout: float) -> dict[int, socket.socket]:
    """The connections of all others, by their numbers."""
    deadline = time.monotonic() + timeout
    sockets: dict[int, socket.socket] = {}

    def refuse(message: str, *others: socket.socket) -> NoReturn:
        for sock in (*sockets.values(), *others):
            with suppress(OSError):
                sock.sendall(json.dumps({"stop": message, "code": STOPPED}).encode() + b"\n")
            sock.close()
        raise UserError(message)

    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(("", port), family=family, dualstack_ipv6=both, backlog=count)
    except OSError as error:
        raise UserError(f"--coordinator_address: cannot listen at port {port}, {error.strerror}: try another") from None
    with server:
        while missing := [number for number in range(1, count) if number not in sockets]:
            server.settimeout(max(0.01, deadline - time.monotonic()))
            try:
                sock, _ = server.accept()
            except TimeoutError:
                names = ", ".join(map(str, missing))
                refuse(f"process {names} of {count} did not come within {timeout:g} s: start all, with the same flags")
            try:
                sock.settimeout(5)
                hello = json.loads(_read_line(sock))
                number, of = int(hello["gptjax"]), int(hello["of"])
            except (OSError, ValueError, KeyError, TypeError):
                sock.close()  # a stranger, such as a port scanner
                continue
            if of != count:
                refuse(f"--num_processes={of} in process {number}, and {count} in process 0: give all the same", sock)
            if number not in missing:
                refuse(f"there are two processes with --process_id={number}: give each its own", sock)
            sock.settimeout(None)
            _watch(sock)
            sockets[number] = sock
    return sockets


def _join(host: str, port: int, process: int, count: int, timeout: float) -> socket.socket:
    """The connection to process 0, once all processes have met."""
    try:
        sock = _connect(host, port, timeout)
    except OSError as error:
        raise UserError(
            f"process {process} cannot reach process 0 at {host}:{port} within {timeout:g} s ({error}): "
            "start all processes, with a --coordinator_address of process 0's machine that all can reach"
        ) from None
    sock.sendall(json.dumps({"gptjax": process, "of": count}).encode() + b"\n")
    try:
        sock.settimeout(2 * timeout)  # process 0 itself says who is missing, after `timeout`
        message = json.loads(_read_line(sock))
        if message != {"met": count} and "stop" not in message:
            raise ValueError(message)
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"process 0 at {host}:{port} ended while the processes met, or another program answers there: "
            "see what process 0 says"
        ) from None
    if "stop" in message:
        raise UserError(message["stop"])
    sock.settimeout(None)
    return sock


def _connect(host: str, port: int, timeout: float) -> socket.socket:
    """A connection, tried until it succeeds; OSError after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while True:
        try:
            sock = socket.create_connection((host, port), timeout=max(0.1, min(5, deadline - time.monotonic())))
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)
        else:
            sock.settimeout(None)
            _watch(sock)
            return sock


def _watch(sock: socket.socket) -> None:
    """Has the kernel give up the connection when the other machine is silent."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", (SILENCE - 10) // 5)):
        if hasattr(socket, name):  # macOS lacks the first
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
    if hasattr(socket, "TCP_USER_TIMEOUT"):  # Linux: the same where data waits to be acknowledged
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 1000 * SILENCE)


def _read_line(sock: socket.socket) -> bytes:
    """Up to the first line end, and nothing after it."""
    line = b""
    while not line.endswith(b"\n"):
        if not (byte := sock.recv(1)) or len(line) > 4096:
            raise OSError("closed")
        line += byte
    return line


def free_port() -> int:
    """One that nothing listens on, at this moment."""
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
