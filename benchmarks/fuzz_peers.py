"""Sends random input to the control connections of a job: `python -m benchmarks.fuzz_peers --seconds=120`.

Each case forks a process of a job of two, which waits in `gather` for the other. The fuzzer is that other process:
it sends valid messages, messages cut off, mutated or nested deeply, random bytes and long lines, and closes the
connection; before process 0 accepts it, strangers send the same. Every process must end within `LIMIT` seconds with a
documented exit code and one line, without a traceback.
"""

import json
import os
import random
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from contextlib import suppress
from typing import IO

from absl import app, flags

from gptjax.config import UserError
from gptjax.distributed.meeting import accept, connect, join, line_of, proof_of
from gptjax.distributed.peers import FAILED, INTERRUPTED, PREEMPTED, STOPPED, Peers

SECONDS = flags.DEFINE_float("seconds", 120, "Time to run.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random input.")

LIMIT = 20  # seconds
MESSAGES: list[object] = [
    *({"value": value} for value in (None, 1, "text", [1, 2], [1, 2, 3], {"a": [1.5]})),
    *({"stop": "a reason", "code": code} for code in (1, 2, 75, 130, 0, -1, "2", 10**30)),
    *({"ask": why} for why in ("SIGTERM", None, 3)),
    *({"passed": count} for count in (0, 7, -1, None, "3", 10**400)),
    *({"decision": value} for value in ([3, "SIGTERM"], [3], None, "ab", ())),
    *({name: True} for name in ("freeze", "met", "challenge", "gptjax", "x")),
    *(None, 1, "text", [], {}, [[]], float("nan")),
]


def random_input(draw: random.Random) -> bytes:
    """Returns one to four lines, some of them malformed."""
    return b"".join(_random_line(draw) for _ in range(draw.randint(1, 4)))


def _random_line(draw: random.Random) -> bytes:
    line = json.dumps(draw.choice(MESSAGES)).encode() + b"\n"
    match draw.randrange(8):
        case 0 | 1:
            return line
        case 2:
            return line[: draw.randrange(len(line))]
        case 3:
            changed = bytearray(line)
            for _ in range(draw.randint(1, 4)):
                changed[draw.randrange(len(changed))] = draw.randrange(256)
            return bytes(changed)
        case 4:
            return draw.randbytes(draw.randint(1, 200))
        case 5:
            return draw.choice([b"[", b'{"value":']) * draw.choice([10, 1000, 200_000]) + b"\n"
        case 6:
            return b'{"value": "' + b"x" * draw.choice([5000, 10**6]) + draw.choice([b'"}\n', b""])
        case _:
            return draw.choice([b"\n", b"\0\n", b"\xff\xfe\n", b'{"value": "\\ud800"}\n', b"1" * 5000 + b"\n"])


def _child(port: int, process: int, errors: IO[bytes]) -> int:
    """Forks a process of the job, which waits for the other as training does."""
    pid = os.fork()
    if pid:
        return pid
    os.dup2(errors.fileno(), 2)
    try:
        peers = Peers("127.0.0.1", port, process, 2, LIMIT / 2, "token")
        while True:
            peers.gather("x")
            peers.boundaries.reach()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        os._exit(STOPPED)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(99)


def _wait(pid: int) -> int | None:
    """Returns the exit code of a child; None if it hangs, after killing it."""
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, 9)
    os.waitpid(pid, 0)
    return None


def _discard(sock: socket.socket) -> None:
    with suppress(OSError):
        while sock.recv(2**16):
            pass


def _talk(sock: socket.socket, sent: bytes) -> None:
    """Sends the input, and reads the replies until the other end closes."""
    with sock, suppress(OSError):
        reader = threading.Thread(target=_discard, args=(sock,), daemon=True)
        reader.start()
        sock.sendall(sent)
        sock.shutdown(socket.SHUT_WR)
        reader.join(LIMIT)


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def run_case(draw: random.Random) -> tuple[int | None, str, bytes]:
    """Runs one case; returns the exit code (None: it hung), stderr, and the input sent."""
    port, process, sent = _free_port(), draw.randrange(2), random_input(draw)
    with tempfile.TemporaryFile() as errors:
        pid = _child(port, process, errors)
        if process == 0:
            strangers = [connect("127.0.0.1", port, LIMIT) for _ in range(draw.randrange(3))]
            for stranger in strangers:
                with suppress(OSError):
                    stranger.sendall(random_input(draw)[:10_000])
            _talk(join("127.0.0.1", port, 1, 2, LIMIT, "token"), sent)
            for stranger in strangers:
                stranger.close()
        elif draw.randrange(3) == 0:  # a stranger in the place of process 0
            with socket.create_server(("127.0.0.1", port)) as server:
                _talk(server.accept()[0], sent)
        else:
            (member,) = accept(port, 2, LIMIT, "token").values()
            met = {"met": 2, "proof": proof_of("token", member.their_challenge, "met", 1, 2)}
            _talk(member.sock, line_of(met) + sent)
        code = _wait(pid)
        errors.seek(0)
        return code, errors.read().decode(errors="replace"), sent


def main(_: list[str]) -> None:
    draw, until, codes = random.Random(SEED.value), time.monotonic() + SECONDS.value, Counter[int | None]()
    while time.monotonic() < until:
        code, stderr, sent = run_case(draw)
        codes[code] += 1
        lines = [line for line in stderr.splitlines() if line]
        documented = code in (FAILED, STOPPED, PREEMPTED, INTERRUPTED)
        if not documented or len(lines) != 1 or not lines[0].startswith("error: "):
            raise SystemExit(f"exit code {code} after {sent[:1000]!r} ({len(sent):,} bytes):\n{stderr}")
    print(f"{codes.total()} cases, none hung and none had a traceback; exit codes: {dict(codes)}")


if __name__ == "__main__":
    app.run(main)
