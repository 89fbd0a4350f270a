"""What can be told of several processes within one: flags, environments, who meets whom, and rows."""

import json
import socket
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from gptjax.config import MeshConfig, UserError
from gptjax.distributed import peers, processes
from gptjax.distributed.processes import Place, given_place
from gptjax.parallel.mesh import batch_sharding, make_mesh
from gptjax.parallel.rows import global_array, process_rows
from tests.multi_process.conftest import free_port

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
    with pytest.raises(UserError, match=r"process of the Open MPI job this is .* --coordinator_address=HOST:PORT"):
        processes.detected_place()


# --- meeting ----------------------------------------------------------------------------------------------------------


def test_process_0_out_of_reach():
    port = free_port()
    with pytest.raises(UserError, match=f"process 1 cannot reach process 0 at 127.0.0.1:{port} within 0.5 s"):
        peers.Peers("127.0.0.1", port, 1, 2, timeout=0.5)


def test_a_process_that_does_not_come():
    with pytest.raises(UserError, match=r"process 1, 2 of 3 did not come within 0\.5 s"):
        peers.Peers("127.0.0.1", free_port(), 0, 3, timeout=0.5)


def test_a_port_that_is_taken():
    with (
        socket.create_server(("", 0), family=socket.AF_INET) as server,
        pytest.raises(UserError, match="cannot listen"),
    ):
        peers.Peers("127.0.0.1", server.getsockname()[1], 0, 2, timeout=0.5)


@pytest.mark.parametrize(
    ("hellos", "words"),
    [
        ([{"gptjax": 1, "of": 4}], "--num_processes=4 in process 1, and 3 in process 0"),
        ([{"gptjax": 1, "of": 3}, {"gptjax": 1, "of": 3}], "two processes with --process_id=1"),
        (["GET / HTTP/1.1", {"gptjax": 0, "of": 3}], "two processes with --process_id=0"),
    ],
)
def test_processes_that_do_not_fit_are_told_so(hellos, words):
    port, answers = free_port(), []

    def come() -> None:
        connections = [peers._connect("127.0.0.1", port, 10) for _ in hellos]
        for hello, connection in zip(hellos, connections, strict=True):
            text = hello if isinstance(hello, str) else json.dumps(hello)
            connection.sendall(text.encode() + b"\n")
        answers.append(json.loads(peers._read_line(connections[-1])))
        for connection in connections:
            connection.close()

    thread = threading.Thread(target=come)
    thread.start()
    with pytest.raises(UserError, match=words):
        peers.Peers("127.0.0.1", port, 0, 3, timeout=10)
    thread.join()
    assert words in answers[0]["stop"]


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
    with pytest.raises(UserError, match=r"^process 2 has b=3, process 0 has b=2: mend it$"):
        processes.check_same({}, "mend it")


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
