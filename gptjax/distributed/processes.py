"""Multi-process runs (JAX's multi-controller SPMD): startup, agreement, ordering and termination of the processes.

All processes run the same program on one mesh of all their devices. This module finds the other processes, checks that
they agree, orders what process 0 must do first, and ends them together. With a single process its functions do nothing.
"""

import importlib.metadata
import os
import sys
import time
import uuid
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from gptjax.config import UserError
from gptjax.distributed.meeting import TOKEN, reserve_port
from gptjax.distributed.peers import Boundaries, Peers, relay

START_TIMEOUT = 300  # seconds, as in jax.distributed: the machines of a job start minutes apart
APPEARS_WITHIN = 10  # seconds: delay until a file written on one machine is visible on another (NFS, mounted bucket)

# Packages whose versions affect the results.
PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_BY_HAND = "--coordinator_address=HOST:PORT --num_processes=N --process_id=I"

_peers: Peers | None = None  # None: one process
_boundaries = Boundaries()  # used with a single process

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Rank of this process, and the address of process 0.

    Attributes:
      host, port: address on which process 0 listens.
      num_processes: number of processes of the job.
      process_id: rank of this process, from 0.
      local_device_ids: GPUs of the machine that this process uses; None: all visible ones.
    """

    host: str
    port: int
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


# --- finding each other -----------------------------------------------------------------------------------------------


def given_place(address: str | None, num_processes: int | None, process_id: int | None) -> Place | None:
    """Returns the place given by the command-line flags; None without flags or with --num_processes=1.

    Raises:
      UserError: flags are missing or contradict each other.
    """
    values = {"coordinator_address": address, "num_processes": num_processes, "process_id": process_id}
    if all(value is None for value in values.values()) or (num_processes == 1 and address is None):
        if process_id is not None and process_id != 0:
            raise UserError(f"--process_id={process_id} of --num_processes=1: the only process is 0")
        return None
    if address is None or num_processes is None or process_id is None:
        missing = next(name for name, value in values.items() if value is None)
        raise UserError(f"--{missing} is missing: every process needs {_BY_HAND}")
    if num_processes < 1 or not 0 <= process_id < num_processes:
        raise UserError(
            f"--process_id={process_id} of --num_processes={num_processes}: "
            f"the numbers go from 0 to {max(0, num_processes - 1)}, one for each process"
        )
    host, port = _split(address)
    return None if num_processes == 1 else Place(host, port, num_processes, process_id)


def _split(address: str) -> tuple[str, int]:
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise UserError(f"--coordinator_address={address} is not HOST:PORT, such as 10.0.0.1:8476")
    return host.strip("[]"), int(port)


def launcher() -> str | None:
    """Returns the launcher of a multi-process job, detected from environment variables alone; None without one."""
    if all(name in os.environ for name in _SLURM) and int(os.environ["SLURM_NTASKS"]) > 1:
        return "SLURM"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return "Kubernetes"
    return None


def detected_place() -> Place | None:
    """Returns the place given by SLURM, Open MPI, Kubernetes or TPU metadata; None for a single process.

    Raises:
      UserError: there are several processes, and the rank of this one cannot be determined.
    """
    cluster = launcher()
    if cluster is None:
        # TPU chips are detected when jax is imported; the metadata server is queried only if there are some.
        from jax._src import cloud_tpu_init

        if not cloud_tpu_init.running_in_cloud_tpu_vm or "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
            return None
        cluster = "TPU"
    # jax.distributed.initialize() does the same internally, but does not return the values.
    from jax._src import clusters

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            address, num_processes, process_id, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, START_TIMEOUT
            )
        if address is None or num_processes is None or process_id is None:
            raise ValueError("jax does not know it")
    except Exception as error:  # raised by many libraries: requests, kubernetes, ...
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot determine the rank of this process in the {cluster} job ({reason}): pass {_BY_HAND} to each, "
            "or --num_processes=1 to run a single process"
        ) from None
    if num_processes == 1:
        return None
    host, port = _split(address)
    return Place(host, port, num_processes, process_id, None if devices is None else list(devices))


# --- start and end ----------------------------------------------------------------------------------------------------


def start(place: Place | None, same: Mapping[str, Any]) -> None:
    """Connects to the other processes; must be called before JAX initialises its devices.

    If set, the environment variable `GPTJAX_JOB_TOKEN` authenticates the processes to each other.

    Args:
      place: rank and address; None: a single process, for which nothing is done.
      same: values that must be equal in all processes, such as flags; package versions are checked as well.

    Raises:
      UserError: the processes do not connect within `START_TIMEOUT`, or their values differ.
    """
    global _peers
    if place is None:
        return
    _redirect_stdout(place.process_id)
    token = os.environ.get(TOKEN, "")
    _peers = Peers(place.host, place.port, place.process_id, place.num_processes, START_TIMEOUT, token)
    check_same({f"version of {name}": importlib.metadata.version(name) for name in PACKAGES}, "install the same in all")
    check_same(same, "start all processes with the same flags")
    import jax

    # JAX's SIGTERM handler would only set a flag that nothing reads here, so the process would not end.
    jax.config.update("jax_enable_preemption_service", False)
    # Otherwise gRPC would connect to this machine through the cluster's web proxy.
    os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)
    # Port of JAX's coordination service. JAX ends with a segmentation fault if another program has taken it.
    with reserve_port() as reserved:
        port = of_first(lambda: reserved.getsockname()[1])
        if place.process_id != 0:
            port = relay(place.host, port)
        jax.distributed.initialize(
            f"127.0.0.1:{port}",
            place.num_processes,
            place.process_id,
            place.local_device_ids,
            cluster_detection_method="deactivate",
            initialization_timeout=START_TIMEOUT,
        )


def _redirect_stdout(process_id: int) -> None:
    """Reserves stdout for process 0; redirects output of C++ libraries (gloo reports each new group) to stderr."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    # Line-buffered, as the process may end without flushing.
    sys.stdout = open(stdout if process_id == 0 else os.devnull, "w", buffering=1, encoding="utf-8")  # noqa: SIM115


def finish() -> None:
    """Waits until all processes have finished, then disconnects from them."""
    if _peers is None:
        return
    gather(None)
    _peers.leave()
    import jax

    jax.distributed.shutdown()


def stop(message: str, code: int, details: str = "") -> NoReturn:
    """Ends all processes of a multi-process job; each prints that this process stopped, with `message`.

    Args:
      message: one line.
      code: exit code of all processes, one of those in `gptjax.distributed.peers`.
      details: text that this process prints before the message, such as a traceback.
    """
    assert _peers is not None
    _peers.stop(message, code, details)


def end(message: str, code: int) -> NoReturn:
    """Ends this process, and its peers if there are any, immediately and from any thread.

    No cleanup is needed: files on disk are valid whenever a process dies.
    """
    if is_one_of_several():
        stop(message.removeprefix("error: "), code)
    with suppress(Exception):
        sys.stdout.flush()
    # Neither print nor sys.exit: the main thread may hold a lock.
    os.write(sys.stderr.fileno(), f"\n{message}\n".encode())
    os._exit(code)


def is_one_of_several() -> bool:
    """Whether `start` has joined other processes."""
    return _peers is not None


def is_first() -> bool:
    """Whether this is process 0 or the only process, which prints and writes everything that is not sharded."""
    return _peers is None or _peers.process == 0


# --- agreeing ---------------------------------------------------------------------------------------------------------
# These functions have no timeout: if a process ends, `Peers` ends the processes that wait for it.


def gather(value: Any) -> list[Any]:
    """Returns the values of all processes, ordered by rank; a collective that every process must call.

    Args:
      value: serialisable as JSON.
    """
    return [value] if _peers is None else _peers.gather(value)


def ask_to_stop(why: str) -> None:
    """Makes `reach_boundary` return `why` in all processes, from the same boundary on; callable from any thread."""
    if _peers is None:
        _boundaries.decide(_boundaries.freeze() + 1, why)
    else:
        _peers.ask_to_stop(why)


def reach_boundary() -> str | None:
    """Passes a boundary, which all processes reach in the same order; returns why to stop there, or None."""
    return (_boundaries if _peers is None else _peers.boundaries).reach()


def of_first(function: Callable[[], T]) -> T:
    """Calls `function` in process 0 and returns its result in all processes (a broadcast).

    The result must survive a round trip through JSON: no tuples, and only strings as keys.
    """
    return gather(function() if is_first() else None)[0]


def first_then_others(function: Callable[[], T]) -> T:
    """Calls `function` in process 0 first, then in all other processes; returns the result of this process.

    The others find what process 0 has written into a shared cache, such as a tokenised corpus.
    """
    if is_first():
        result = function()
        gather(None)
        return result
    gather(None)
    return function()


def check_same(values: Mapping[str, Any], fix: str) -> None:
    """Raises the same UserError in all processes unless their `values` are equal; its message ends with `fix`."""
    first, *others = gather(dict(values))
    for number, other in enumerate(others, start=1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise UserError(
                    f"process {number} has {name}={other.get(name)}, process 0 has {name}={first.get(name)}: {fix}"
                )


def check_shared(directory: Path) -> None:
    """Raises the same UserError in all processes unless `directory` is a writable directory that all of them share."""
    if _peers is None:
        return

    def mark() -> str:
        try:
            directory.mkdir(parents=True, exist_ok=True)
            (path := directory / f".shared-{uuid.uuid4().hex}").touch()
        except OSError as error:
            raise UserError(f"cannot write in {directory}: {error.strerror}") from None
        return path.name

    path = directory / of_first(mark)
    seen = gather(_appears(path))
    if is_first():
        path.unlink()
    if not all(seen):
        raise UserError(
            f"{directory} of process {seen.index(False)} is not the same directory as in process 0: "
            "give a path that all machines share, such as one on NFS or a mounted bucket"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + APPEARS_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
