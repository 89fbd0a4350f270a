"""One command as many processes, each with its own devices: JAX's multi-controller SPMD.

All processes run the same program; a mesh holds the devices of all, and the partitioner does the rest. Here is what it
does not do: how the processes find each other, what they must agree on, who goes first, how they end together.
With one process, which is the rule, all of it is nothing.
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
from gptjax.distributed.meeting import TOKEN, free_port
from gptjax.distributed.peers import Boundaries, Peers, relay

START_TIMEOUT = 300  # seconds, as jax.distributed's: the machines of a job start minutes apart
APPEARS_WITHIN = 10  # seconds: what one machine writes, another sees late through NFS or a mounted bucket

# What else than the code decides what is computed.
PACKAGES = ("gptjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")

_SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
_BY_HAND = "--coordinator_address=HOST:PORT --num_processes=N --process_id=I"

_peers: Peers | None = None  # None: one process
_boundaries = Boundaries()  # of one process

T = TypeVar("T")


@dataclass(frozen=True)
class Place:
    """Which process this is.

    Attributes:
      host, port: where process 0 listens.
      local_device_ids: the GPUs of the machine that are this process's; None: all it sees.
    """

    host: str
    port: int
    num_processes: int
    process_id: int
    local_device_ids: list[int] | None = None


# --- finding each other -----------------------------------------------------------------------------------------------


def given_place(address: str | None, num_processes: int | None, process_id: int | None) -> Place | None:
    """The place that flags give; None: they give none, or --num_processes=1.

    Raises:
      UserError: some are missing, or contradict each other.
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
    """What started this process as one of several, by its environment variables alone; None: nothing did."""
    if all(name in os.environ for name in _SLURM) and int(os.environ["SLURM_NTASKS"]) > 1:
        return "SLURM"
    if int(os.environ.get("OMPI_COMM_WORLD_SIZE", 1)) > 1:
        return "Open MPI"
    if "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ:
        return "Kubernetes"
    return None


def detected_place() -> Place | None:
    """The place that SLURM, Open MPI, Kubernetes or a TPU machine's metadata give; None: it is one process.

    Raises:
      UserError: there are several, and this one cannot tell which it is.
    """
    cluster = launcher()
    if cluster is None:
        # The chips are looked for when jax is imported; a metadata server is asked only where there are some.
        from jax._src import cloud_tpu_init

        if not cloud_tpu_init.running_in_cloud_tpu_vm or "tpu" not in os.environ.get("JAX_PLATFORMS", "tpu"):
            return None
        cluster = "TPU"
    # What jax.distributed.initialize() does for itself, and does not hand out.
    from jax._src import clusters

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            address, num_processes, process_id, devices = clusters.ClusterEnv.auto_detect_unset_distributed_params(
                None, None, None, None, None, START_TIMEOUT
            )
        if address is None or num_processes is None or process_id is None:
            raise ValueError("jax does not know it")
    except Exception as error:  # of many libraries: requests, kubernetes, ...
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"cannot tell which process of the {cluster} job this is ({reason}): pass {_BY_HAND} to each, "
            "or --num_processes=1 for one alone"
        ) from None
    if num_processes == 1:
        return None
    host, port = _split(address)
    return Place(host, port, num_processes, process_id, None if devices is None else list(devices))


# --- start and end ----------------------------------------------------------------------------------------------------


def start(place: Place | None, same: Mapping[str, Any]) -> None:
    """Joins the other processes; before this, no program may have asked JAX for devices.

    The environment variable `GPTJAX_JOB_TOKEN`, where it is set, authenticates the processes to each other.

    Args:
      place: None: there is one process, and nothing to do.
      same: what must be equal in all processes, such as flags; the versions of packages are checked besides.

    Raises:
      UserError: the processes do not find each other within `START_TIMEOUT`, or differ.
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

    # Its handler of SIGTERM would only take a note, and nobody reads it here: the process would not end.
    jax.config.update("jax_enable_preemption_service", False)
    # gRPC would ask a cluster's web proxy for what is on this machine.
    os.environ["no_grpc_proxy"] = "127.0.0.1"  # noqa: SIM112
    jax.config.update("jax_check_proxy_envs", False)
    # Of JAX's coordination service; chosen only now, as another program may take what is free.
    port = of_first(free_port)
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
    """Leaves stdout to what process 0 prints; to stderr goes what C++ libraries do, as gloo of each new group."""
    sys.stdout.flush()
    stdout = os.dup(1)
    os.dup2(2, 1)
    # By lines, as the process may end without flushing.
    sys.stdout = open(stdout if process_id == 0 else os.devnull, "w", buffering=1, encoding="utf-8")  # noqa: SIM115


def finish() -> None:
    """Waits until all processes have done their work, and parts from them."""
    if _peers is None:
        return
    gather(None)
    _peers.leave()
    import jax

    jax.distributed.shutdown()


def stop(message: str, code: int, details: str = "") -> NoReturn:
    """Ends all processes of which there are several: this one says `message`, the others that it stopped, and why.

    Args:
      code: the exit code of all, one of those in `gptjax.distributed.peers`.
      details: for this one to say before.
    """
    assert _peers is not None
    _peers.stop(message, code, details)


def end(message: str, code: int) -> NoReturn:
    """Ends this process, and the others where there are several, from any thread and at once.

    It clears nothing up, and need not: what is on the disk is good whenever a process dies.
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
    """Whether this is process 0, or the only one: the one that prints and writes what is not sharded."""
    return _peers is None or _peers.process == 0


# --- agreeing ---------------------------------------------------------------------------------------------------------
# These wait as long as it takes: when a process ends, `Peers` ends those that wait for it.


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; each process must call this at the same place.

    Args:
      value: what JSON can hold.
    """
    return [value] if _peers is None else _peers.gather(value)


def ask_to_stop(why: str) -> None:
    """Has `reach_boundary` answer `why`, in all processes from the same boundary on; any thread may call this."""
    if _peers is None:
        _boundaries.decide(_boundaries.freeze() + 1, why)
    else:
        _peers.ask_to_stop(why)


def reach_boundary() -> str | None:
    """Why to stop at this place, which all processes come to in the same order; None: go on."""
    return (_boundaries if _peers is None else _peers.boundaries).reach()


def of_first(function: Callable[[], T]) -> T:
    """What `function` returns in process 0, in all processes; it is called in process 0 alone.

    Its result must be what JSON can hold, tuples and keys other than text excepted.
    """
    return gather(function() if is_first() else None)[0]


def first_then_others(function: Callable[[], T]) -> T:
    """What `function` returns in this process: process 0 calls it first, the others when it is done, together.

    So what process 0 leaves in a cache that all share, such as a tokenised corpus, is found there by the others.
    """
    if is_first():
        result = function()
        gather(None)
        return result
    gather(None)
    return function()


def check_same(values: Mapping[str, Any], mend: str) -> None:
    """Raises UserError, the same in all processes, unless all give equal `values`; `mend` is the end of its message."""
    first, *others = gather(dict(values))
    for number, other in enumerate(others, start=1):
        for name in first | other:
            if first.get(name) != other.get(name):
                raise UserError(
                    f"process {number} has {name}={other.get(name)}, process 0 has {name}={first.get(name)}: {mend}"
                )


def check_shared(directory: Path) -> None:
    """Raises UserError, the same in all processes, unless `directory` is one directory, writable, that all see."""
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
            f"{directory} of process {seen.index(False)} is not the directory that process 0 has there: "
            "give a path that all machines share, such as on NFS or a mounted bucket"
        )


def _appears(path: Path) -> bool:
    deadline = time.monotonic() + APPEARS_WITHIN
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.2)
    return True
