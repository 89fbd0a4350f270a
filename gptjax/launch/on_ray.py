"""Members of a sweep on a Ray cluster: an actor for each, which Ray places where its resources are free.

The actor runs the member as a process of its own, since a command ends its process. All machines share the directory of
the sweep, and have the library and the config file under the same paths.
"""

import subprocess
import threading
from collections.abc import Mapping
from typing import Any

from gptjax.config import UserError
from gptjax.launch import attempts
from gptjax.launch.attempts import Task
from gptjax.launch.members import Member

LOST = -9  # the exit code of a member whose actor died, as of SIGKILL


class MemberActor:
    """Runs one member; `stop` may be called while `run` runs."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._stopped, self._lock = False, threading.Lock()

    def run(self, task: Task, environment: Mapping[str, str]) -> int:
        process = attempts.start_when_free(task, environment)
        with self._lock:
            self._process = process
            if self._stopped:  # while it waited for an earlier process
                process.terminate()
        return process.wait()

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
            if self._process is not None:
                self._process.terminate()


class RayEngine:
    """Gives all members to Ray at once, which queues them.

    Args:
      resources: options of a Ray actor, such as {"num_cpus": 4, "num_gpus": 1}. Default: one processor.

    Attributes:
      detached: whether members outlive this process.

    Raises:
      UserError: Ray is not installed, no cluster answers, or it has no such option.
    """

    detached = False

    def __init__(self, resources: Mapping[str, Any]) -> None:
        try:
            import ray
        except ImportError:
            raise UserError("--engine=ray needs Ray: pip install 'gptjax[ray]'") from None
        self._ray: Any = ray
        cpus = resources.get("num_cpus", 1)
        # XLA makes as many threads as the machine has processors, not as many as Ray grants.
        self._environment = {"PJRT_NPROC": str(max(1, int(cpus)))}
        try:
            if not ray.is_initialized():
                ray.init(log_to_driver=False, logging_level="ERROR")
            options = {"num_cpus": cpus, **resources, "max_restarts": 0, "max_concurrency": 2}
            self._actor = ray.remote(**options)(MemberActor)
        except (ConnectionError, RuntimeError, ValueError, TypeError) as error:
            raise UserError(f"--engine=ray: {' '.join(str(error).split())}") from None
        self._running: dict[str, tuple[Any, Any, Member]] = {}

    def room(self) -> int:
        return 1_000_000

    def start(self, member: Member) -> bool:
        attempts.forget(member.workdir)
        actor = self._actor.remote()
        self._running[member.name] = actor, actor.run.remote(attempts.task_of(member), self._environment), member
        return True

    def ended(self) -> dict[str, int]:
        references = {reference: name for name, (_, reference, _) in self._running.items()}
        if not references:
            return {}
        ready, _ = self._ray.wait(list(references), num_returns=len(references), timeout=0)
        codes = {}
        for reference in ready:
            name = references[reference]
            try:
                code = self._ray.get(reference)
            except self._ray.exceptions.RayError:
                code = LOST
            _, _, member = self._running.pop(name)
            attempts.record(member.workdir, code)
            codes[name] = code
        return codes

    def stop(self, name: str) -> None:
        if name in self._running:
            self._running[name][0].stop.remote()

    def kill(self) -> None:
        for actor, _, _ in self._running.values():
            self._ray.kill(actor)
