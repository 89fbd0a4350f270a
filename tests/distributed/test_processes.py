"""Multi-process logic that one process can test: flags, environments, handshakes, and rows."""

import json
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import numpy as np
import pytest

from gptjax.config import MeshConfig, UserError
from gptjax.distributed import meeting, peers, processes
from gptjax.distributed.processes import Place, given_place
from gptjax.parallel.mesh import batch_sharding, make_mesh
from gptjax.parallel.rows import global_array, process_rows
from tests.multi_process.conftest import LIMIT, free_port

SLURM = {"SLURM_JOB_ID": "7", "SLURM_STEP_NODELIST": "node[3-4]", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"}


@pytest.fixture(autouse=True)
def bare_environment(monkeypatch):
    for name in (*SLURM, "SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"):
        monkeypatch.delenv(name, raising=False)


# --- flags and environments -------------------------------------------------------------------------------------------


def test_places_that_flags_give():
    assert given_place(None, None, None) is None
    assert given_place(None, 1, None) is None
    assert given_place("host:80", 1, 0) is None
    assert given_place("host:80", 4, 3) == Place("host", 80, 4, 3)
    assert given_place("[::1]:80", 2, 0) == Place("::1", 80, 2, 0)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ((None, 2, 0), "--coordinator_address is missing"),
        (("host:80", None, 0), "--num_processes is missing"),
        (("host:80", 2, None), "--process_id is missing"),
        (("host:80", 2, 2), "--process_id=2 of --num_processes=2: the numbers go from 0 to 1"),
        (("host:80", 2, -1), "--process_id=-1"),
        (("host:80", 0, 0), "--num_processes=0"),
        (("host", 2, 0), "--coordinator_address=host is not HOST:PORT"),
        (("host:99999", 2, 0), "is not HOST:PORT"),
        ((":80", 2, 0), "is not HOST:PORT"),
        ((None, 1, 1), "--process_id=1 of --num_processes=1"),
        ((None, None, 3), "--coordinator_address is missing"),
    ],
)
def test_flags_that_are_missing_or_contradict_each_other(flags, words):
    with pytest.raises(UserError, match=words.replace("[", r"\[")):
        given_place(*flags)


@pytest.mark.parametrize(
    "environment",
    [
        {},
        SLURM | {"SLURM_NTASKS": "1"},
        {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"},  # a batch script, outside of srun
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},  # a pod that belongs to no indexed job
    ],
)
def test_one_process_is_not_taken_for_several(environment, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert processes.launcher() is None
    assert processes.detected_place() is None


def test_slurm_gives_the_place(monkeypatch):
    for name, value in (SLURM | {"SLURM_NTASKS": "2"}).items():
        monkeypatch.setenv(name, value)
    place = processes.detected_place()
    assert place == Place("node3", 65535 - 2**12 + 1 + 7, num_processes=2, process_id=1, local_device_ids=[0])


def test_a_job_that_jax_does_not_understand_names_the_flags(monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"rank of this process in the Open MPI job .* --coordinator_address=HOST:PORT"):
        processes.detected_place()


# --- meeting ----------------------------------------------------------------------------------------------------------


def greeting(connection: socket.socket) -> dict[str, Any]:
    """What process 0 says next."""
    return meeting._read_message(connection, time.monotonic() + LIMIT)


def line(hello: dict[str, int] | str, challenge: dict[str, str], token: str = "") -> bytes:
    """A hello that answers a challenge; text as it is."""
    if isinstance(hello, str):
        return hello.encode() + b"\n"
    proof = meeting.proof_of(token, challenge["challenge"], "join", hello["gptjax"], hello["of"])
    return json.dumps(hello | {"challenge": "", "proof": proof}).encode() + b"\n"


def test_process_0_out_of_reach():
    port = free_port()
    with pytest.raises(UserError, match=f"process 1 cannot reach process 0 at 127.0.0.1:{port} within 0.5 s"):
        peers.Peers("127.0.0.1", port, 1, 2, timeout=0.5)


def test_a_process_that_does_not_come():
    with pytest.raises(UserError, match=r"process 1, 2 of 3 did not connect within 0\.5 s"):
        peers.Peers("127.0.0.1", free_port(), 0, 3, timeout=0.5)


def test_a_port_that_is_taken():
    with (
        socket.create_server(("", 0), family=socket.AF_INET) as server,
        pytest.raises(UserError, match="cannot listen"),
    ):
        peers.Peers("127.0.0.1", server.getsockname()[1], 0, 2, timeout=0.5)


def test_a_reserved_port_is_taken_for_all_but_grpc():
    with meeting.reserve_port() as reserved:
        port = reserved.getsockname()[1]
        with pytest.raises(OSError, match="in use"):
            socket.create_server(("", port))
        with socket.socket() as shared:  # as gRPC opens its own
            shared.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            shared.bind(("", port))
            shared.listen()
            socket.create_connection(("127.0.0.1", port)).close()


@pytest.mark.parametrize(
    ("hellos", "words"),
    [
        ([{"gptjax": 1, "of": 4}], "--num_processes=4 in process 1, but 3 in process 0"),
        ([{"gptjax": 1, "of": 3}, {"gptjax": 1, "of": 3}], "two processes have --process_id=1"),
        (["GET / HTTP/1.1", {"gptjax": 0, "of": 3}], "two processes have --process_id=0"),
    ],
)
def test_processes_that_do_not_fit_are_told_so(hellos, words):
    port, answers = free_port(), []

    def come() -> None:
        with ExitStack() as stack:
            for hello in hellos:
                connection = stack.enter_context(meeting.connect("127.0.0.1", port, LIMIT))
                connection.sendall(line(hello, greeting(connection)))
            answers.append(greeting(connection))

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(UserError, match=words):
        peers.Peers("127.0.0.1", port, 0, 3, timeout=LIMIT)
    thread.join()
    assert words in answers[0]["stop"]


@pytest.mark.parametrize("given", ["", "another"])
def test_a_stranger_without_the_token_takes_no_place(given):
    port, made = free_port(), {}
    first = threading.Thread(
        target=lambda: made.update({0: peers.Peers("127.0.0.1", port, 0, 2, timeout=LIMIT, token="secret")})
    )
    first.start()
    with pytest.raises(UserError, match="GPTJAX_JOB_TOKEN differs from that of process 0: set the same in all"):
        peers.Peers("127.0.0.1", port, 1, 2, timeout=LIMIT, token=given)
    made[1] = peers.Peers("127.0.0.1", port, 1, 2, timeout=LIMIT, token="secret")
    first.join()
    for process in made.values():
        process.leave()


def test_a_stranger_does_not_pass_for_process_0():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port, seen = server.getsockname()[1], []

        def answer() -> None:
            with server.accept()[0] as connection:
                connection.sendall(b'{"challenge": "c"}\n')
                seen.append(greeting(connection))
                connection.sendall(b'{"met": 2, "proof": "' + b"0" * 64 + b'"}\n')

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UserError, match="another program listens on that port"):
            peers.Peers("127.0.0.1", port, 1, 2, timeout=LIMIT, token="secret")
        thread.join()
    assert "secret" not in str(seen)


def test_refused_connections_are_counted_when_a_process_does_not_come(monkeypatch):
    port, refused = free_port(), threading.Event()

    def come() -> None:
        with pytest.raises(UserError):
            peers.Peers("127.0.0.1", port, 1, 2, timeout=LIMIT, token="another")
        refused.set()

    clock = SimpleNamespace(monotonic=lambda: time.monotonic() + 2 * LIMIT * refused.is_set(), sleep=time.sleep)
    monkeypatch.setattr(meeting, "time", clock)
    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(UserError, match="1 connections had a different GPTJAX_JOB_TOKEN"):
        peers.Peers("127.0.0.1", port, 0, 2, timeout=LIMIT, token="secret")
    thread.join()


def test_strangers_that_send_nothing_or_byte_by_byte_delay_nobody():
    port, made = free_port(), {}
    first = threading.Thread(target=lambda: made.update({0: peers.Peers("127.0.0.1", port, 0, 2, timeout=LIMIT)}))
    first.start()
    with ExitStack() as stack:
        strangers = [stack.enter_context(meeting.connect("127.0.0.1", port, LIMIT)) for _ in range(3)]
        strangers[1].sendall(b"{")
        met = threading.Event()

        def drip() -> None:
            while not met.wait(0.05):
                with suppress(OSError):
                    strangers[2].sendall(b" ")

        dripping = threading.Thread(target=drip)
        dripping.start()
        made[1] = peers.Peers("127.0.0.1", port, 1, 2, timeout=LIMIT)
        first.join(LIMIT)
        met.set()
        dripping.join()
    assert sorted(made) == [0, 1]
    for process in made.values():
        process.leave()


@pytest.mark.parametrize("sent", [b"", b" " * 5000, b"{}\n", b"[" * 4000 + b"\n", b"\xff\n"])
def test_what_is_no_process_0_is_one_line(sent):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def answer() -> None:
            with server.accept()[0] as connection, suppress(OSError):
                connection.sendall(sent)

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(UserError, match="another program listens on that port"):
            peers.Peers("127.0.0.1", server.getsockname()[1], 1, 2, timeout=LIMIT)
        thread.join()


# --- lost -------------------------------------------------------------------------------------------------------------

WAITING = """
import sys
from gptjax.distributed.peers import Peers

peers = Peers("127.0.0.1", int(sys.argv[1]), int(sys.argv[2]), 2, 1000)
while True:
    peers.gather("x")
"""
NO_MESSAGES = {
    "cut off": b'{"value": 1',
    "cut off in a number of boundaries": b'{"passed": 1',
    "random": b"\x00\xff\x80garbage\n",
    "nested": b"[" * 200_000 + b"\n",
    "a long number": b'{"passed": ' + b"1" * 5000 + b"}\n",
    "no object": b"[1]\n",
    "unknown": b'{"x": 1}\n',
    "another type": b'{"stop": 1, "code": "x"}\n',
    "unrequested": b'{"passed": 1}\n',
    "of the other side": b'{"freeze": true, "decision": [1, "x"]}\n',
    "two values at once": b'{"value": 1}\n{"value": 1}\n{"value": 1}\n',
}


def waiting(process: int, port: int) -> subprocess.Popen[str]:
    """A process of two that waits for the value of the other."""
    command = [sys.executable, "-c", WAITING, str(port), str(process)]
    return subprocess.Popen(command, cwd=Path(__file__).parents[2], stderr=subprocess.PIPE, text=True)


def is_lost(child: subprocess.Popen[str], other: int) -> None:
    """It ends, as when the other process is killed."""
    try:
        _, err = child.communicate(timeout=LIMIT)
    finally:
        child.kill()
    assert child.returncode == peers.FAILED
    (message,) = [line for line in err.splitlines() if line]
    assert message.startswith(f"error: process {other} died")
    assert "run the same command again in all processes" in message


@pytest.mark.parametrize("sent", NO_MESSAGES.values(), ids=NO_MESSAGES)
def test_process_0_ends_when_what_comes_is_no_message(sent):
    port = free_port()
    child = waiting(0, port)
    with meeting.join("127.0.0.1", port, 1, 2, LIMIT, "") as connection:
        with suppress(OSError):  # it may have ended before all is sent
            connection.sendall(sent)
            connection.shutdown(socket.SHUT_WR)
        is_lost(child, 1)


@pytest.mark.parametrize("sent", [b'{"value": [1', b'{"value": 1}\n', b'{"value": [1]}\n', b'{"passed": 1}\n'])
def test_another_process_ends_when_what_comes_is_no_message(sent):
    port = free_port()
    child = waiting(1, port)
    (member,) = meeting.accept(port, 2, LIMIT, "").values()
    with member.sock:
        met = {"met": 2, "proof": meeting.proof_of("", member.their_challenge, "met", 1, 2)}
        with suppress(OSError):  # it may have ended before all is sent
            member.sock.sendall(meeting.line_of(met) + sent)
            member.sock.shutdown(socket.SHUT_WR)
        is_lost(child, 0)


def test_a_line_without_end_is_no_message(monkeypatch):
    monkeypatch.setattr(peers, "MAX_MESSAGE", 1000)
    near, far = socket.socketpair()
    with near, far:
        process, ended = object.__new__(peers.Peers), []
        process.process, process.count, process._sockets, process._leaving = 0, 2, {1: near}, False
        process._end = lambda *given: ended.append(given)
        far.sendall(b'"' + b"x" * 2000)  # and stays open
        process._listen(1)
        with pytest.raises(ValueError, match="too many to exchange"):
            process._send(1, {"value": "x" * 1000})
    assert "(malformed or truncated message" in ended[0][0]


def test_a_relay_outlives_a_connection_that_fails(monkeypatch):
    calls = []

    def refuse_once(host: str, port: int, timeout: float) -> socket.socket:
        calls.append(port)
        if len(calls) == 1:
            raise ConnectionRefusedError
        return meeting.connect(host, port, timeout)

    monkeypatch.setattr(peers, "connect", refuse_once)
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = peers.relay("127.0.0.1", server.getsockname()[1])
        with meeting.connect("127.0.0.1", near, LIMIT) as first:
            assert first.recv(1) == b""
        with meeting.connect("127.0.0.1", near, LIMIT) as second, server.accept()[0] as far:
            second.sendall(b"x")
            assert far.recv(1) == b"x"


# --- agreeing, alone --------------------------------------------------------------------------------------------------


def test_alone_everything_is_agreed(tmp_path):
    assert not processes.is_one_of_several()
    assert processes.gather((1, 2)) == [(1, 2)]
    assert processes.of_first(lambda: "x") == "x"
    assert processes.first_then_others(lambda: "x") == "x"
    processes.check_same({"a": 1}, "")
    processes.check_shared(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    processes.finish()


def test_what_differs_is_named(monkeypatch):
    monkeypatch.setattr(processes, "gather", lambda _: [{"a": 1, "b": 2}, {"a": 1, "b": 2}, {"a": 1, "b": 3}])
    with pytest.raises(UserError, match=r"^process 2 has b=3, process 0 has b=2: fix it$"):
        processes.check_same({}, "fix it")


def test_a_directory_that_cannot_be_written(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(processes, "_peers", object())
    monkeypatch.setattr(processes, "is_first", lambda: True)
    with pytest.raises(UserError, match="cannot write in"):
        processes.check_shared(Path(tmp_path / "file" / "run"))


# --- rows -------------------------------------------------------------------------------------------------------------


def test_one_process_reads_all_rows():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    assert process_rows(mesh, 6) == [0, 1, 2, 3, 4, 5]


def test_rows_and_columns_land_where_they_belong():
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    local_MBT = np.arange(2 * 3 * 4).reshape(2, 3, 4)
    array = global_array(mesh, [0, 1, 2], local_MBT, 3, None)
    np.testing.assert_array_equal(array, local_MBT)
    assert array.sharding == batch_sharding(mesh, None)
