"""Control connections between the processes of one command: failure detection and exchange of small values.

Process 0 listens; every other process keeps one TCP connection to it, which carries lines of JSON. A connection that
closes is a process that ended. The kernel closes it when a process is killed, and gives it up when the machine at its
other end is silent for `SILENCE` seconds; a process that only compiles for an hour keeps it. Any input that is not a
whole, well-formed message (a line cut off by a kill, or garbage) ends the job in the same way: the peer is lost.

How they connect is in `gptjax.distributed.meeting`.

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
import traceback
from contextlib import suppress
from typing import Any, NoReturn

from gptjax.distributed.meeting import SILENCE, accept, connect, join, line_of, proof_of

MAX_MESSAGE = 2**28  # bytes of a line
GRACE = 2  # seconds: the end of another process often shows as a failed collective, before it shows here
# Exit codes: a user error; anything else; stopped on request, to be started again (EX_TEMPFAIL of sysexits.h);
# interrupted at once, as a shell reports it.
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

    def __init__(self, host: str, port: int, process: int, count: int, timeout: float, token: str = ""):
        """Connects all processes, and waits for them.

        Args:
          host, port: where process 0 listens.
          timeout: seconds to wait for the others.
          token: secret of the job, equal in all processes. Empty: anyone who reaches the port is accepted.

        Raises:
          UserError: the port is taken, process 0 cannot be reached, the tokens differ, or the processes are not `count`
            different ones, after `timeout` seconds at most.
        """
        self.process, self.count = process, count
        self._ending, self._sending, self._agreeing = threading.Lock(), threading.Lock(), threading.Lock()
        self._leaving = False
        self.boundaries = Boundaries()
        self._why: str | None = None  # process 0: a stop is asked for
        self._passed: dict[int, int] = {}  # process 0: boundaries, by process
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
        line = line_of(message)
        if len(line) > MAX_MESSAGE:
            raise ValueError(f"{len(line):,} bytes are too many to exchange between processes (limit {MAX_MESSAGE:,})")
        # Threads send too. One that never gets through, as nobody reads, must not keep the process from ending.
        locked = self._sending.acquire(timeout=GRACE if self._ending.locked() else -1)
        try:
            with suppress(OSError):  # of a closed connection `_listen` hears
                self._sockets[peer].sendall(line)
        finally:
            if locked:
                self._sending.release()

    def _listen(self, peer: int) -> None:
        """Receives messages until the connection ends or breaks the protocol; both end this process."""
        problem = details = ""
        try:
            with self._sockets[peer].makefile("rb") as lines:
                while line := lines.readline(MAX_MESSAGE + 1):
                    self._take(peer, _parse(line, peer, self.count))
        except OSError:
            pass  # the connection was reset or timed out
        except (ValueError, RecursionError) as error:
            problem = f" in the middle of a message, or it sent none of this protocol ({error})"
        except Exception:
            details = traceback.format_exc()
        if not self._leaving:
            gone = (
                f"process {peer} is gone{problem}: it was killed, or its machine is out of reach; "
                "run the same command again in all processes, and it resumes from what was saved"
            )
            self._end(gone, gone, FAILED, details)

    def _take(self, peer: int, message: dict[str, Any]) -> None:
        """Acts on a message that `_parse` returned; ValueError when it does not fit what was sent before."""
        if "value" in message:
            if not self._inbox[peer].empty():  # a process sends its next value when it has received all of this one
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
                raise ValueError("a number of boundaries that was not asked for")
            self._learn(peer, message["passed"])
        else:
            self.boundaries.decide(*message["decision"])

    def _end(self, line: str, line_of_others: str, code: int, details: str = "") -> NoReturn:
        """Says `line` and ends the process; process 0 tells the others first, as they hear of each other through it."""
        if not self._ending.acquire(blocking=False):
            threading.Event().wait()  # another thread is ending the process
        for peer, sock in self._sockets.items():
            with suppress(OSError):
                sock.settimeout(GRACE)  # a peer that reads nothing must not keep this process from ending
            self._send(peer, {"stop": line_of_others, "code": code})
            with suppress(OSError):
                sock.shutdown(socket.SHUT_WR)
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
            try:
                far = connect(host, port, SILENCE)
            except OSError:
                near.close()  # the client tries again, or reports it
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
    """The message of a line.

    Args:
      sender: number of the process that sent it; process 0 and the others send different messages.
      count: processes of the job.

    Raises:
      ValueError or RecursionError: the line is cut off, too long, or no message that `sender` may send.
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
