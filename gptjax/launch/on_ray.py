"""Members of a sweep on a Ray cluster: an actor for each process, which Ray places where its resources are free.

The actor runs a process of its own, since a command ends its process. A member is one process, or one on each of
several hosts, which find each other as `gptjax.distributed.processes` describes. All machines share the directory of
the sweep, and have the library and the config file under the same paths.
"""

import secrets
import subprocess
import threading
from collections.abc import Mapping
from typing import Any, NamedTuple

from gptjax.config import UserError
from gptjax.distributed.meeting import TOKEN, reserve_port
from gptjax.launch import attempts
from gptjax.launch.attempts import Task
from gptjax.launch.members import Member

LOST = -9  # the exit code of a member of which an actor died, as of SIGKILL


class ProcessActor:
    """Runs one process of a member; `stop` may be called while it runs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped, self._lock = False, threading.Lock()

    def address(self) -> str:
        """HOST:PORT of this machine, with a port that is unused now."""
        import ray

        with reserve_port() as sock:
            return f"{ray.util.get_node_ip_address()}:{sock.getsockname()[1]}"

    def run(self, task: Task, environment: Mapping[str, str]) -> int:
        """Runs the only process of a member, once an earlier one has ended."""
        return self._wait(attempts.start_when_free(task, environment))

    def run_one_of(self, hosts: int, host: int, address: str, task: Task, environment: Mapping[str, str]) -> int:
        """Runs one of several processes, which meet at the address of the first."""
        place = (f"--coordinator_address={address}", f"--num_processes={hosts}", f"--process_id={host}")
        if host == 0:  # which holds the lock of the workdir
            return self.run(task._replace(place=place), environment)
        return self._wait(attempts.start(task._replace(place=place, log=f"log-{host}.txt"), environment=environment))

    def _wait(self, process: "subprocess.Popen[bytes]") -> int:
        with self._lock:
            self._process = process
            if self._stopped:  # before the process was started
                process.terminate()
        return process.wait()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.terminate()


class Attempt(NamedTuple):
    """A running attempt at a member: its actors, what they will return, and Ray's placement group of several hosts."""

    member: Member
    actors: list[Any]
    codes: list[Any]
    group: Any = None


class RayEngine:
    """Gives all members to Ray at once, which queues them.

    Args:
      resources: options of a Ray actor, such as {"num_cpus": 4, "num_gpus": 1}. Default: one processor.
      hosts: number of processes of a member, each with these resources, on hosts of their own if there are as many.

    Attributes:
      detached: whether members outlive this process.

    Raises:
      UserError: Ray is not installed, no cluster answers, or it has no such option.
    """

    detached = False

    def __init__(self, resources: Mapping[str, Any], hosts: int = 1) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--engine=ray needs Ray: pip install 'gptjax[ray]'") from None
        self._ray: Any = ray
        self._hosts = hosts
        cpus = resources.get("num_cpus", 1)
        # XLA makes as many threads as the machine has processors, not as many as Ray grants.
        self._environment = {"PJRT_NPROC": str(max(1, int(cpus)))}
        try:
            if not ray.is_initialized():
                ray.init(log_to_driver=False, logging_level="ERROR")
            options = {"num_cpus": cpus, **resources, "max_restarts": 0, "max_concurrency": 2}
            self._actor = ray.remote(**options)(ProcessActor)
        except (ConnectionError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"--engine=ray: {' '.join(str(error).split())}") from None
        amounts = {"CPU": cpus, "GPU": resources.get("num_gpus", 0), **resources.get("resources", {})}
        self._bundle = {name: amount for name, amount in amounts.items() if amount}
        self._running: dict[str, Attempt] = {}

    def room(self) -> int:
        return 1_000_000

    def start(self, member: Member) -> bool:
        attempts.forget(member.workdir)
        self._running[member.name] = self._attempt(member)
        return True

    def _attempt(self, member: Member) -> Attempt:
        task = attempts.task_of(member)
        if self._hosts == 1:
            actor = self._actor.remote()
            return Attempt(member, [actor], [actor.run.remote(task, self._environment)])
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        # A group gets all of its resources at once, so that no two members wait for each other's.
        group = placement_group([self._bundle] * self._hosts, strategy="SPREAD")
        hosts = range(self._hosts)
        places = [PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=host) for host in hosts]
        actors = [self._actor.options(scheduling_strategy=place).remote() for place in places]
        address = actors[0].address.remote()
        environment = {**self._environment, TOKEN: secrets.token_hex(16)}
        codes = [
            actor.run_one_of.remote(self._hosts, host, address, task, environment) for host, actor in enumerate(actors)
        ]
        return Attempt(member, actors, codes, group)

    def ended(self) -> dict[str, int]:
        references = [code for attempt in self._running.values() for code in attempt.codes]
        if not references:
            return {}
        ready = set(self._ray.wait(references, num_returns=len(references), timeout=0)[0])
        codes = {}
        for name, attempt in list(self._running.items()):
            if ready.issuperset(attempt.codes):  # peers of a process that failed end soon after it
                codes[name] = next((code for code in map(self._code, attempt.codes) if code), 0)
                attempts.record(attempt.member.workdir, codes[name])
                self._free(self._running.pop(name))
        return codes

    def _code(self, reference: Any) -> int:
        try:
            return int(self._ray.get(reference))
        except self._ray.exceptions.RayError:
            return LOST

    def _free(self, attempt: Attempt) -> None:
        """Gives the resources of several hosts back; those of a single actor end with it."""
        if attempt.group is not None:
            self._ray.util.remove_placement_group(attempt.group)

    def stop(self, name: str) -> None:
        if name in self._running:
            for actor in self._running[name].actors:
                actor.stop.remote()

    def kill(self) -> None:
        for attempt in self._running.values():
            for actor in attempt.actors:
                self._ray.kill(actor)
            self._free(attempt)
