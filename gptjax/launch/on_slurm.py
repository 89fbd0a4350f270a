"""Members of a sweep as a SLURM array, by submitit: a job for each.

Jobs outlive the command that submitted them: it only waits. When it is started again, it finds the jobs that are still
queued or running by the file jobs.json. SLURM's announcement that a job is preempted or that its time ends makes the
member save, and the job is queued again by submitit.
"""

import json
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.files import read_json, write_whole
from gptjax.launch import attempts
from gptjax.launch.attempts import Task
from gptjax.launch.members import Member

FOLDER = ".submitit"  # in the directory of the sweep: submitit's scripts, results and logs, and jobs.json
ASK_EVERY = 5.0  # seconds between two questions to the scheduler
LOST_AFTER = 20.0  # seconds for which a job is neither queued nor has a result; file servers delay the latter
LOST = -9  # the exit code of such a member, as of SIGKILL


class MemberJob:
    """The function of a job: runs a member."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self) -> int:
        process = attempts.start_when_free(self._task)
        # A thread waits, since the signal handler that calls `checkpoint` interrupts this one.
        waiting = threading.Thread(target=process.wait)
        waiting.start()
        self._process, self._waiting = process, waiting
        while waiting.is_alive():
            waiting.join(0.5)
        code = process.returncode
        attempts.record(Path(self._task.workdir), code)
        return code

    def checkpoint(self) -> Any:
        """Called by submitit before a job is preempted or its time ends: waits until the member has saved."""
        from submitit.helpers import DelayedSubmission

        if self._process is not None:  # else it waits for an earlier one, or is being started, and ends with this job
            self._process.send_signal(signal.SIGUSR2)  # SLURM may have sent it already: a second does nothing
            while self._waiting.is_alive():
                self._waiting.join(0.5)
        return DelayedSubmission(MemberJob(self._task))


class SlurmEngine:
    """Submits members as arrays.

    Args:
      workdir: of the sweep, on a disk that all nodes share.
      resources: parameters of submitit's AutoExecutor, such as {"timeout_min": 60, "slurm_partition": "gpu"}.
      cluster: "slurm", or submitit's "local", which runs jobs as processes here.

    Attributes:
      detached: whether members outlive this process.

    Raises:
      UserError: submitit or SLURM is not installed, or there is no such parameter.
    """

    detached = True

    def __init__(self, workdir: Path, resources: Mapping[str, Any], cluster: str = "slurm") -> None:
        try:
            import submitit
        except ImportError:
            raise UserError("--engine=slurm needs submitit: pip install 'gptjax[sweep]'") from None
        self._folder, self._is_slurm = workdir.absolute() / FOLDER, cluster == "slurm"
        try:
            self._executor = submitit.AutoExecutor(folder=self._folder / "%j", cluster=cluster)
            self._executor.update_parameters(name=workdir.name or "sweep", **resources)
        except (RuntimeError, NameError, ValueError, TypeError, AssertionError) as error:
            raise UserError(f"--engine=slurm: {' '.join(str(error).split())}") from None
        self._submitted: list[Member] = []  # not yet an array
        self._jobs: dict[str, tuple[Member, Any]] = {}  # by name: its job, or the id of a job of an earlier driver
        self._seen: dict[str, float] = {}  # by name: when its job was last known to exist
        self._asked = 0.0
        self._ids: dict[str, str] = self._read_ids()
        self._queued = self._queue() if self._is_slurm else set()

    def _read_ids(self) -> dict[str, str]:
        try:
            found = read_json(self._folder / "jobs.json")
        except (OSError, ValueError):
            return {}
        return {str(name): str(job) for name, job in found.items()} if isinstance(found, dict) else {}

    def _queue(self) -> set[str]:
        """Returns the ids of this user's jobs that wait or run."""
        found = subprocess.run(
            ["squeue", "--me", "--array", "--noheader", "--format=%i"], capture_output=True, text=True
        )
        if found.returncode != 0:
            raise UserError(f"--engine=slurm: squeue failed: {' '.join(found.stderr.split())}")
        return set(found.stdout.split())

    def room(self) -> int:
        return 1_000_000

    def start(self, member: Member) -> bool:
        if self._ids.get(member.name) in self._queued:
            self._watch(member, self._ids[member.name])
        else:
            attempts.forget(member.workdir)
            self._submitted.append(member)
        return True

    def _watch(self, member: Member, job: Any) -> None:
        self._jobs[member.name] = member, job
        self._seen[member.name] = time.monotonic()

    def _submit(self) -> None:
        """Submits the members that were started since the last call, as one array."""
        members, self._submitted = self._submitted, []
        with self._executor.batch():
            jobs = [self._executor.submit(MemberJob(attempts.task_of(member))) for member in members]
        for member, job in zip(members, jobs, strict=True):
            self._watch(member, job)
            self._ids[member.name] = job.job_id
            self._queued.add(job.job_id)
        write_whole(self._folder / "jobs.json", json.dumps(self._ids, indent=2) + "\n")

    def ended(self) -> dict[str, int]:
        if self._submitted:
            self._submit()
        now = time.monotonic()
        if now - self._asked > ASK_EVERY:
            self._asked = now
            if self._is_slurm:
                self._queued = self._queue()
            for name, (_, job) in self._jobs.items():
                if self._exists(job):
                    self._seen[name] = now
        codes = {}
        for name, (member, job) in list(self._jobs.items()):
            code = attempts.recorded(member.workdir)
            if code is None and now - self._seen[name] > LOST_AFTER:
                code = LOST
                attempts.record(member.workdir, code)
            # A job that has a result may take a moment to leave the queue.
            if code is not None:
                codes[name] = code
                del self._jobs[name]
                self._queued.discard(job if isinstance(job, str) else job.job_id)
        return codes

    def _exists(self, job: Any) -> bool:
        if not self._is_slurm:
            return not job.done()
        return (job if isinstance(job, str) else job.job_id) in self._queued

    def stop(self, name: str) -> None:
        """Cancels a job: SLURM sends SIGTERM to its processes, and the member saves."""
        if name in self._jobs:
            job = self._jobs[name][1]
            if isinstance(job, str):
                subprocess.run(["scancel", job], check=False)
            else:
                job.cancel(check=False)

    def kill(self) -> None:
        """Jobs stay."""
