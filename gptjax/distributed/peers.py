"""Control connections between the processes of one command: failure detection and exchange of small values.

Process 0 listens; every other process keeps one TCP connection to it, which carries lines of JSON. A closed connection
means that the process ended. The kernel closes it when a process is killed, or when the other machine does not respond
for `SILENCE` seconds; a process that compiles for an hour keeps it. Any input that is not a complete, well-formed
message (a line truncated by a kill, or garbage) is treated in the same way: the peer is lost, and the job ends.

The handshake is in `gptjax.distributed.meeting`.

JAX's own coordination service detects failures too: the death of process 0 immediately, of others after 100 seconds. It
then ends the process from C++ with a page of text. To report the failure first, other processes reach the service
through a `relay`, whose local end stays open when the remote end closes.
"""

import json
import os
import queue
import socket
import sys
import threading
import time
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from gptjax.distributed.meeting import SILENCE, accept, connect, join, line_of, proof_of

MAX_MESSAGE = 2**28  # maximum size of a line in bytes
GRACE = 2  # seconds: the death of a peer process often appears as a failed collective before it is detected here
# Exit codes: user error; any other failure; stopped on request, to be restarted (EX_TEMPFAIL of sysexits.h);
# interrupted immediately, as a shell reports it.
STOPPED, FAILED, PREEMPTED, INTERRUPTED = 2, 1, 75, 130


class Boundaries:
    """Points at which a program can stop, which all processes pass in the same order, counted from 1.

    Passing a boundary needs no communication until a stop is requested. Then each process waits at its next boundary
    until process 0 decides at which boundary, not yet passed by any process, all of them stop.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._passed = 0
        self._frozen = False
        self._stop: tuple[int, str] | None = None

    def freeze(self) -> int:
        """Blocks further boundaries until `decide`; returns the number of boundaries passed."""
        with self._changed:
            self._frozen = True
            return self._passed

    def decide(self, boundary: int, why: str) -> None:
        """Makes `reach` return `why` at all boundaries from `boundary` on."""
        with self._changed:
            self._stop = boundary, why
            self._changed.notify_all()

    def reach(self) -> str | None:
        """Passes the next boundary; returns why to stop there, or None."""
        with self._changed:
            while self._frozen and self._stop is None:
                self._changed.wait()
            self._passed += 1
            return self._stop[1] if self._stop is not None and self._passed >= self._stop[0] else None


class Peers:
    """Connections of this process: from process 0 to all others, or from another process to process 0.

    Attributes:
      process, count: rank of this process, and number of processes.
      boundaries: points at which all processes stop together after one has called `ask_to_stop`.
    """

    def __init__(self, host: str, port: int, process: int, count: int, timeout: float, token: str = ""):
        """Connects all processes, and waits for them.

        Args:
          host, port: address on which process 0 listens.
          process, count: rank of this process, and number of processes.
          timeout: seconds to wait for the other processes.
          token: secret of the job, equal in all processes. Empty: any connection is accepted.

        Raises:
          UserError: the port is in use, process 0 cannot be reached, the tokens differ, or not all `count` processes
            connect within `timeout` seconds.
        """
        self.process, self.count = process, count
        self._ending, self._sending, self._agreeing = threading.Lock(), threading.Lock(), threading.Lock()
        self._leaving = False
        self.boundaries = Boundaries()
        self._why: str | None = None  # process 0: reason of the requested stop
        self._passed: dict[int, int] = {}  # process 0: boundaries passed, by process
        if process == 0:
            members = accept(port, count, timeout, token)
            self._sockets = {number: member.sock for number, member in members.items()}
            for peer, member in members.items():
                self._send(peer, {"met": count, "proof": proof_of(token, member.their_challenge, "met", peer, count)})
        else:
            self._sockets = {0: join(host, port, process, count, timeout, token)}
        self._inbox: dict[int, queue.SimpleQueue[Any]] = {peer: queue.SimpleQueue() for peer in self._sockets}
        for peer in self._sockets:
            threading.Thread(target=self._listen, args=(peer,), daemon=True).start()

    def gather(self, value: Any) -> list[Any]:
        """Returns the values of all processes, ordered by rank; a collective that every process must call.

        Args:
          value: serialisable as JSON; tuples are returned as lists.
        """
        if self.process != 0:
            self._send(0, {"value": value})
            return self._inbox[0].get()
        values = [json.loads(json.dumps(value)), *(self._inbox[peer].get() for peer in range(1, self.count))]
        for peer in self._sockets:
            self._send(peer, {"value": values})
        return values

    def ask_to_stop(self, why: str) -> None:
        """Requests that all processes stop at the same boundary; callable from any thread of any process."""
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
        """Process 0: records how many boundaries a process has passed, and decides once it has the counts of all."""
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
        """Ends this process and all others; the others report that this process stopped, with `message`."""
        time.sleep(GRACE)
        name = f"process {self.process}"
        self._end(f"{name}: {message}", f"{name} stopped: {message}", code, details)

    def leave(self) -> None:
        """Stops failure detection, so that processes may end; each calls this after all have finished."""
        self._leaving = True

    def _send(self, peer: int, message: dict[str, Any]) -> None:
        line = line_of(message)
        if len(line) > MAX_MESSAGE:
            raise ValueError(f"{len(line):,} bytes are too many to exchange between processes (limit {MAX_MESSAGE:,})")
        # Threads send too. One that blocks because the peer does not read must not keep the process from ending.
        locked = self._sending.acquire(timeout=GRACE if self._ending.locked() else -1)
        try:
            with suppress(OSError):  # `_listen` detects a closed connection
                self._sockets[peer].sendall(line)
        finally:
            if locked:
                self._sending.release()

    def _listen(self, peer: int) -> None:
        """Receives messages until the connection closes or violates the protocol; both end this process."""
        problem = details = ""
        try:
            with self._sockets[peer].makefile("rb") as lines:
                while line := lines.readline(MAX_MESSAGE + 1):
                    self._take(peer, _parse(line, peer, self.count))
        except OSError:
            pass  # the connection was reset or timed out
        except (ValueError, RecursionError) as error:
            problem = f" (malformed or truncated message: {error})"
        except Exception:
            details = traceback.format_exc()
        if not self._leaving:
            death = (
                f"process {peer} died{problem}: it was killed, or its machine is unreachable; "
                "run the same command again in all processes to resume from what was saved"
            )
            self._end(death, death, FAILED, details)

    def _take(self, peer: int, message: dict[str, Any]) -> None:
        """Handles a message from `_parse`; raises ValueError if it violates the order of the protocol."""
        if "value" in message:
            if not self._inbox[peer].empty():  # a process sends its next value only after this exchange is complete
                raise ValueError("a second value before the first was answered")
            self._inbox[peer].put(message["value"])
        elif "stop" in message:
            self._end(message["stop"], message["stop"], message["code"])
        elif "ask" in message:
            self.ask_to_stop(message["ask"])
        elif "freeze" in message:
            self._send(peer, {"passed": self.boundaries.freeze()})
        elif "passed" in message:
            if self._why is None or peer in self._passed:
                raise ValueError("an unrequested number of boundaries")
            self._learn(peer, message["passed"])
        else:
            self.boundaries.decide(*message["decision"])

    def _end(self, line: str, line_of_others: str, code: int, details: str = "") -> NoReturn:
        """Prints `line` and ends the process; process 0 first notifies the others, which have no other connection."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        for peer, sock in self._sockets.items():
            with suppress(OSError):
                sock.settimeout(GRACE)  # a peer that does not read must not keep this process from ending
            self._send(peer, {"stop": line_of_others, "code": code})
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
        # Neither print nor sys.exit: the main thread may hold a lock, or wait in a collective forever. It may also
        # show a progress bar: further output is discarded, so that this line is the last.
        stderr = os.dup(sys.stderr.fileno())
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stderr.fileno())
        os.write(stderr, f"\n{details}error: {line}\n".encode())
        if self.process == 0:
            time.sleep(0.5)  # closing a connection with unread lines discards the lines in transit
        os._exit(code)


def relay(host: str, port: int) -> int:
    """Forwards connections from a local port to `host`:`port`; returns the local port."""
    server = socket.create_server(("127.0.0.1", 0))
    open_ends: list[socket.socket] = []  # references, so that a local end outlives its remote end

    def serve() -> None:
        while True:
            near, _ = server.accept()
            try:
                far = connect(host, port, SILENCE)
            except OSError:
                near.close()  # the client retries, or reports it
                continue
            open_ends.extend((near, far))
            threading.Thread(target=_pump, args=(near, far), daemon=True).start()
            threading.Thread(target=_pump, args=(far, near), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return server.getsockname()[1]


def _pump(source: socket.socket, target: socket.socket) -> None:
    with suppress(OSError):
        while data := source.recv(2**16):
            target.sendall(data)


# --- messages ---------------------------------------------------------------------------------------------------------


def _parse(line: bytes, sender: int, count: int) -> dict[str, Any]:
    """Parses a line as a message.

    Args:
      line: as received.
      sender: rank of the process that sent it; process 0 and the others send different messages.
      count: number of processes.

    Raises:
      ValueError or RecursionError: the line is truncated, too long, or not a message that `sender` may send.
    """
    if not line.endswith(b"\n"):
        raise ValueError(f"a line that ends after {len(line):,} bytes")
    message = json.loads(line)
    match message:
        case {"stop": str(), "code": int(code)} if code in (FAILED, STOPPED, PREEMPTED, INTERRUPTED):
            return message
        case {"value": list(values)} if sender == 0 and len(values) == count:
            return message
        case {"freeze": True} | {"decision": [int(), str()]} if sender == 0:
            return message
        case {"value": _} | {"ask": str()} if sender != 0:
            return message
        case {"passed": int(passed)} if sender != 0 and passed >= 0:
            return message
    raise ValueError(f"{line[:40]!r}")
