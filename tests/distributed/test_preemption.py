"""Preemption: all processes stop at one boundary, and none waits for another before it."""

import http.server
import os
import signal
import threading
from collections.abc import Iterator

import pytest

from gptjax.distributed import preemption, processes
from gptjax.distributed.peers import Boundaries, Peers
from tests.multi_process.conftest import LIMIT, free_port


@pytest.fixture(autouse=True)
def boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own for each test."""
    monkeypatch.setattr(processes, "_boundaries", Boundaries())
    monkeypatch.setattr(preemption, "_deferring", True)


def reached(process: Peers, until: int) -> list[str | None]:
    return [process.boundaries.reach() for _ in range(until)]


@pytest.fixture
def three() -> Iterator[list[Peers]]:
    """Three processes, in the threads of this one."""
    port, made = free_port(), {}

    def join(number: int) -> None:
        made[number] = Peers("127.0.0.1", port, number, 3, LIMIT)

    threads = [threading.Thread(target=join, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    yield [made[number] for number in range(3)]
    for process in made.values():
        process.leave()


@pytest.mark.parametrize("asked", [[0], [2], [1, 2]])
def test_processes_at_different_boundaries_stop_at_the_same(three, asked):
    before = (3, 5, 0)
    for process, count in zip(three, before, strict=True):
        assert reached(process, count) == [None] * count
    for number in asked:
        three[number].ask_to_stop("SIGTERM")
    stopped: dict[int, int] = {}

    def go_on(number: int) -> None:
        count = before[number] + 1
        while (why := three[number].boundaries.reach()) is None:
            count += 1
        assert why == "SIGTERM"
        stopped[number] = count

    threads = [threading.Thread(target=go_on, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    assert len(stopped) == 3
    assert len(set(stopped.values())) == 1
    assert stopped[0] > max(before)


def test_a_boundary_waits_for_nobody_until_a_stop_is_asked_for(three):
    assert reached(three[2], 100) == [None] * 100


def test_a_signal_stops_at_the_next_boundary():
    with preemption.watch():
        preemption.check()
        asked = threading.Event()
        original = processes.ask_to_stop

        def ask(why: str) -> None:
            original(why)
            asked.set()

        processes.ask_to_stop = ask
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            assert asked.wait(LIMIT)
        finally:
            processes.ask_to_stop = original
        with pytest.raises(preemption.PreemptedError, match="SIGTERM"):
            preemption.check()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Machine(http.server.BaseHTTPRequestHandler):
    """A metadata server whose answers change after the first of each."""

    answers: dict[str, list[str]]

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        assert self.headers["Metadata-Flavor"] == "Google"
        values = self.answers[name]
        value = values.pop(0) if len(values) > 1 else values[0]
        self.send_response(200)
        self.end_headers()
        self.wfile.write(value.encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.mark.parametrize(
    ("answers", "asks"),
    [
        ({"preempted": ["FALSE", "FALSE", "TRUE"], "maintenance-event": ["NONE"]}, "preempted=TRUE"),
        ({"preempted": ["FALSE"], "maintenance-event": ["NONE", "TERMINATE_ON_HOST_MAINTENANCE"]}, "TERMINATE_ON_HOST"),
        # A notice that was there before the run is no reason to stop; the other may still come.
        ({"preempted": ["FALSE", "TRUE"], "maintenance-event": ["TERMINATE_ON_HOST_MAINTENANCE"]}, "preempted=TRUE"),
    ],
)
def test_the_notice_of_a_machine_stops_at_the_next_boundary(answers, asks, monkeypatch):
    monkeypatch.setattr(preemption, "ASK_EVERY", 0.01)
    handler = type("Handler", (Machine,), {"answers": answers})
    with http.server.HTTPServer(("127.0.0.1", 0), handler) as server:
        monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{server.server_port}")
        threading.Thread(target=server.serve_forever, daemon=True).start()
        preemption.watch_machine()
        server.shutdown()
    with pytest.raises(preemption.PreemptedError, match=asks):
        preemption.check()


def test_without_a_metadata_server_nothing_is_asked(monkeypatch):
    monkeypatch.setenv("GCE_METADATA_IP", f"127.0.0.1:{free_port()}")
    preemption.watch_machine()
    preemption.check()
