"""Runs the items of a step: in this process, in several of this machine, by Ray Data, or shared between machines.

A step is a function of the workspace and the number of an item. It commits a result atomically, and the result depends
on nothing else, so items may run anywhere, in any order, and again.
"""

import concurrent.futures
import functools
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import tqdm

from gptjax.config import UserError
from gptjax.corpus.workspace import Workspace
from gptjax.data.packages import require_package

Run = Callable[[Workspace, int], None]

POLL = 1.0  # seconds between two looks for the results of other machines
REMIND = 60.0  # seconds between two lines about a machine that is waited for


class Executor:
    """Where the items of steps run; a context manager that ends its processes.

    Attributes:
      processes: of this machine; with Ray, the CPUs of the Ray that is started if no cluster is running.
      engine: "processes" or "ray".
      shard: (i, n): this machine runs the items i, i + n, ... and waits for the others', in a directory of all.
    """

    def __init__(
        self,
        processes: int = 1,
        engine: Literal["processes", "ray"] = "processes",
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        self.processes, self.engine, self.shard = processes, engine, shard
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def check(self) -> None:
        """Raises UserError for settings that exclude each other, or if Ray is not installed."""
        index, count = self.shard
        if not 0 <= index < count:
            raise UserError(f"--shard={index}/{count}: write --shard=i/n with i from 0 to n - 1")
        if self.engine == "ray":
            require_package("ray", "pip install 'gptjax[ray]'", "--engine=ray")
            if count > 1:
                raise UserError("--shard and --engine=ray exclude each other: Ray distributes the work itself")

    @property
    def is_first(self) -> bool:
        """Whether this machine writes what is written once."""
        return self.shard[0] == 0

    def run(self, name: str, run: Run, workspace: Workspace, results: Sequence[Path]) -> None:
        """Runs the items of a step whose results do not exist, and waits until all exist.

        Args:
          name: of the step, for the progress bar.
          run: the step.
          workspace: its first argument.
          results: the path that each item writes.

        Raises:
          UserError: that of an item; or a process died.
        """
        index, count = self.shard
        items = [item for item in range(index, len(results), count) if not results[item].exists()]
        call = functools.partial(_call, run, workspace)
        with tqdm.tqdm(items, desc=name, unit="item", disable=not items) as progress:
            for error in self._map(call, items):
                if error is not None:
                    raise UserError(error)
                progress.update()
        self._wait(name, workspace, results)

    def _map(self, call: Callable[[int], str | None], items: list[int]) -> Iterator[str | None]:
        if not items:
            return iter(())
        if self.engine == "ray":
            return _ray_map(call, items, self.processes)
        if self.processes == 1 or len(items) == 1:
            return map(call, items)
        return self._process_map(call, items)

    def _process_map(self, call: Callable[[int], str | None], items: list[int]) -> Iterator[str | None]:
        if self._pool is None:
            # Processes are not forked, as libraries of this one may have threads.
            spawn = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(self.processes, spawn, _start_worker)
        try:
            for future in concurrent.futures.as_completed([self._pool.submit(call, item) for item in items]):
                yield future.result()
        except concurrent.futures.process.BrokenProcessPool:
            raise UserError(
                "a worker process died, maybe for lack of memory: the same command resumes; use fewer --processes or "
                "a smaller --part_bytes"
            ) from None

    def _wait(self, name: str, workspace: Workspace, results: Sequence[Path]) -> None:
        """Waits for the results of other machines."""
        reminded = time.monotonic() - REMIND
        for item, path in enumerate(results):
            while not path.exists() and not workspace.is_complete:
                if time.monotonic() - reminded >= REMIND:
                    other = f"--shard={item % self.shard[1]}/{self.shard[1]}"
                    print(f"{name}: waiting for {other}, which writes {path}", flush=True)
                    reminded = time.monotonic()
                time.sleep(POLL)


def _call(run: Run, workspace: Workspace, item: int) -> str | None:
    """Runs an item; returns the message of a user error, as not every engine hands over exceptions unchanged."""
    try:
        run(workspace, item)
    except UserError as error:
        return str(error)
    except FileNotFoundError:  # another machine may have finished, see `prepare_corpus`
        raise
    except OSError as error:
        return f"cannot write {workspace.output}, fix this and run the same command again: {error}"
    return None


def _start_worker() -> None:
    """Makes a worker process end with its parent, and leave interrupts to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        multiprocessing.connection.wait([parent.sentinel])
        os._exit(1)  # a killed parent does not end its workers

    threading.Thread(target=watch, daemon=True).start()


def _ray_map(call: Callable[[int], str | None], items: list[int], processes: int) -> Iterator[str | None]:
    """Runs the items by Ray Data, which repeats those of workers that die."""
    import ray
    import ray.data

    if not ray.is_initialized():
        _start_ray(ray, processes)

    def run(row: dict[str, Any]) -> dict[str, Any]:
        return {"error": call(int(row["item"])) or ""}

    rows = ray.data.from_items([{"item": item} for item in items], override_num_blocks=len(items))
    for row in rows.map(run, num_cpus=1).iter_rows():
        yield row["error"] or None


def _start_ray(ray: Any, processes: int) -> None:
    """Connects to the cluster that RAY_ADDRESS or the machine's configuration names, or else starts Ray here."""
    quiet = {"log_to_driver": False, "logging_level": "ERROR"}
    try:
        ray.init(address="auto", **quiet)
    except ConnectionError:
        ray.init(num_cpus=processes, include_dashboard=False, **quiet)
    ray.data.DataContext.get_current().enable_progress_bars = False
