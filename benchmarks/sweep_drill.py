"""Kills workers and the driver of a sweep, and compares its table with an undisturbed one.

    python -m benchmarks.sweep_drill
    python -m benchmarks.sweep_drill --engines=local,ray

Trains a sweep of tiny runs (learning rates x seeds) undisturbed, with processes of this machine. Then trains it again
on each engine, and kills (SIGKILL) randomly chosen worker processes and the driver at random moments; a killed driver
is started again by the same command. With ray, the cluster has two nodes on this machine, every other kill hits the
actor of a run in place of the run's own process, and one node is removed, as by a preemption, and replaced. At the end
table.txt and table.csv must be equal to the undisturbed ones, byte for byte.

Also measures what the sweep adds to its runs: processor time of a driver that finds all runs done (imports, configs,
table), and the time during which no run ran in a sweep of one run at a time.

--seed determines the kills and their order, not the instruction at which a process is stopped.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from absl import app, flags

ROOT = Path(__file__).parents[1]
TABLES = ("table.txt", "table.csv")
MEMBER, ACTOR = b"gptjax.launch.member", b"ray::MemberActor"
PATIENCE = 1800  # seconds: a sweep that takes longer hangs

CONFIG = """
from gptjax import config as c
from gptjax.launch import grid

BATCH = 8 * 64


def get_config(arg=None):
    return c.config_dict(
        c.Config(
            model=c.GPTConfig(
                context_length=64, num_layers=2, num_heads=2, embed_dim=64, residual_dropout=0.1, dtype="float32"
            ),
            data=c.DataConfig(
                source="text:{directory}/text.txt", tokenizer="bytes", validation_fraction=0.1,
                cache_dir="{directory}/cache",
            ),
            batch=c.BatchConfig(total_tokens={steps} * BATCH, tokens_per_batch=BATCH),
            optimizer=c.OptimizerConfig(warmup_tokens=BATCH, ema_decay=0.9),
            evaluation=c.EvaluationConfig(every_tokens={every} * BATCH, max_tokens=4096, sample_tokens=0),
            checkpoint=c.CheckpointConfig(every_tokens={every} * BATCH, keep_last=1),
            logging=c.LoggingConfig(every_steps=10, tensorboard=False),
        )
    )


def sweep():
    rates = grid.values("optimizer.peak_lr", [1e-3 * 2**i for i in range({rates})])
    return grid.product(rates, grid.values("seed", range({seeds})))
"""


class Sweep:
    """A sweep in `directory` whose driver is started repeatedly."""

    def __init__(self, directory: Path, name: str, arguments: list[str], environment: dict[str, str]) -> None:
        self.workdir, self._log = directory / name, directory / f"{name}.log"
        self._command = [sys.executable, "-m", "gptjax.sweep", f"--config={directory}/config.py", *arguments]
        self._command += [f"--workdir={self.workdir}", "--retries=100"]
        self._environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", **environment}

    def start(self) -> "subprocess.Popen[bytes]":
        with self._log.open("ab") as log:
            return subprocess.Popen(self._command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)

    def finish(self) -> None:
        """Runs the sweep to its end."""
        if self.start().wait(PATIENCE) != 0:
            raise SystemExit(self._log.read_text()[-3000:])

    def processes(self, kind: bytes) -> list[int]:
        """The workers of a kind: processes of runs, or the actors that are their parents."""
        found = []
        for path in Path("/proc").glob("[0-9]*"):
            try:
                command = (path / "cmdline").read_bytes()
                if MEMBER in command and f"--workdir={self.workdir}/".encode() in command:
                    parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
                    found.append(int(path.name) if kind == MEMBER else parent)
            except (OSError, ValueError):
                continue
        return found

    def tables(self) -> list[bytes]:
        return [(self.workdir / name).read_bytes() for name in TABLES]


def disturb(sweep: Sweep, kills: list[str], rng: random.Random, cluster: Any) -> dict[str, int]:
    """Runs a sweep to its end under kills; returns how many of each kind hit."""
    hits: dict[str, int] = {}
    deadline = time.monotonic() + PATIENCE
    driver = sweep.start()
    while driver.poll() is None and time.monotonic() < deadline:
        if not kills:
            driver.wait(PATIENCE)
            break
        victims = sweep.processes(ACTOR if kills[0] == "actor" else MEMBER)
        if not victims:
            time.sleep(0.05)
            continue
        time.sleep(rng.uniform(0.5, 8))
        kind = kills.pop(0)
        if kind == "driver":
            driver.kill()
            driver.wait()
            driver = sweep.start()
        elif kind == "node":
            replace_node(cluster)
        else:
            victims = sweep.processes(ACTOR if kind == "actor" else MEMBER)
            if not victims or driver.poll() is not None:
                kills.insert(0, kind)
                continue
            os.kill(rng.choice(victims), signal.SIGKILL)
        hits[kind] = hits.get(kind, 0) + 1
        print(f"  killed: {kind}", flush=True)
    if driver.wait(PATIENCE) != 0 or kills:
        raise SystemExit(f"exit code {driver.returncode}, kills left: {kills}\n{sweep._log.read_text()[-3000:]}")
    return hits


def start_cluster() -> Any:
    """A Ray cluster of two nodes on this machine, each with one processor."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    return cluster


def replace_node(cluster: Any) -> None:
    """Removes the node that is not the head, without notice, and adds another."""
    (node,) = (node for node in cluster.list_all_nodes() if node is not cluster.head_node)
    cluster.remove_node(node, allow_graceful=False)
    cluster.add_node(num_cpus=1)


def measure_gaps(directory: Path) -> tuple[float, float]:
    """Runs four members one at a time; returns the seconds with a running member, and those without."""
    from gptjax.launch import local
    from gptjax.launch.members import Member, make_members, read_sweep
    from gptjax.launch.scheduler import Scheduler

    path = f"{directory}/config.py"
    members = make_members(path, {}, read_sweep(path, [])[:4], directory / "one_at_a_time")
    durations: list[float] = []

    class Timed(local.LocalEngine):
        """Measures the life of each process."""

        def start(self, member: Member) -> bool:
            begin = time.monotonic()
            started = super().start(member)
            process = self._running[member.name][2]

            def wait() -> None:
                process.wait()
                durations.append(time.monotonic() - begin)

            threading.Thread(target=wait).start()
            return started

    scheduler = Scheduler(Timed(local.slots(1, 1)), 0, lambda text: None)
    scheduler.add(members)
    begin = time.monotonic()
    scheduler.run()
    return sum(durations), time.monotonic() - begin - sum(durations)


def main(_: list[str]) -> None:
    values = flags.FLAGS
    directory = Path(values.directory or tempfile.mkdtemp(prefix="sweep_drill_")).absolute()
    (directory / "text.txt").write_text("\n".join(f"{i} squared is {i * i}." for i in range(20_000)))
    settings = {"rates": 4, "seeds": -(-values.runs // 4), "steps": values.steps, "every": max(1, values.steps // 10)}
    config = CONFIG
    for name, value in {**settings, "directory": directory}.items():
        config = config.replace(f"{{{name}}}", str(value))
    (directory / "config.py").write_text(config)
    processes = ["--engine=local", "--processes=2"]
    undisturbed = Sweep(directory, "undisturbed", processes, {})
    print(f"{4 * settings['seeds']} runs of {values.steps} steps in {directory}", flush=True)
    begin = time.monotonic()
    undisturbed.finish()
    print(f"undisturbed: {time.monotonic() - begin:.0f} s\n{undisturbed.tables()[0].decode()}", flush=True)
    for engine in values.engines:
        compare_disturbed(engine, undisturbed, directory, processes)
    if values.overhead:
        running, gaps = measure_gaps(directory)
        begin = time.monotonic()
        undisturbed.finish()
        fixed = time.monotonic() - begin
        print(
            f"4 runs one at a time: {running:.1f} s of runs, {gaps:.2f} s between them; start and table {fixed:.1f} s"
        )
        print(f"overhead: {gaps / running:.2%} between runs, {fixed / (3 * running):.2%} of 12 runs once")


def compare_disturbed(engine: str, undisturbed: Sweep, directory: Path, processes: list[str]) -> None:
    """Runs the sweep on an engine under kills; raises SystemExit unless the tables are equal."""
    values = flags.FLAGS
    kills = ["worker"] * values.worker_kills + ["driver"] * values.driver_kills
    cluster: Any = None
    environment, arguments = {}, processes
    if engine == "ray":
        cluster = start_cluster()
        environment, arguments = {"RAY_ADDRESS": cluster.address}, ["--engine=ray"]
        kills[: values.worker_kills] = ["node", *["worker", "actor"] * values.worker_kills][: values.worker_kills]
    rng = random.Random(values.seed)
    rng.shuffle(kills)
    disturbed, begin = Sweep(directory, engine, arguments, environment), time.monotonic()
    hits = disturb(disturbed, kills, rng, cluster)
    same = disturbed.tables() == undisturbed.tables()
    print(f"{engine}: {hits} in {time.monotonic() - begin:.0f} s; tables {'equal' if same else 'DIFFER'}", flush=True)
    if cluster is not None:
        cluster.shutdown()
    if not same:
        raise SystemExit(f"the tables of {disturbed.workdir} differ from those of {undisturbed.workdir}")


if __name__ == "__main__":
    flags.DEFINE_list("engines", ["local"], "Engines whose workers are killed: local, ray.")
    flags.DEFINE_integer("runs", 12, "Runs of the sweep, a multiple of 4.", lower_bound=4)
    flags.DEFINE_integer("steps", 200, "Steps of each run.", lower_bound=10)
    flags.DEFINE_integer("worker_kills", 6, "SIGKILLs of workers.", lower_bound=0)
    flags.DEFINE_integer("driver_kills", 2, "SIGKILLs of the driver.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Seed of the kills.")
    flags.DEFINE_bool("overhead", True, "Also measure what a sweep adds to its runs.")
    flags.DEFINE_string("directory", None, "Existing empty directory, which is kept; default: a temporary one.")
    app.run(main)
