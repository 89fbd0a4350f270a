"""Trains a small model under faults, and compares it with an undisturbed run: `python -m benchmarks.fault_drill`.

A run is killed (SIGKILL) while it starts, tokenises, trains and saves, is stopped (SIGTERM), finds files of its newest
checkpoint damaged and the disk full while it saves, cannot read its checkpoints (EIO, EMFILE), is started with another
config, deletes checkpoints that another process reads, finds the lock of a killed process that its parent has not
reaped (a zombie), and is started as two processes of which one is killed in the middle of a message to the other. It is
started again each time. At the end its losses, and every array of its last checkpoint, must equal those of an
undisturbed run, bit for bit. With --mixture the runs read three sources, one of them many times over, with weights that
change during the run. No privileges are needed: a limit on the size of files fills the disk, a limit on file
descriptors causes EMFILE, a patched reader EIO.

--seed determines the faults and their order, not the instruction at which a kill stops the run.
"""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from absl import app, flags, logging

from benchmarks.drill_texts import data_settings, write_text

ROOT = Path(__file__).parents[1]
KILLED, STOPPED, FULL = -signal.SIGKILL, 75, 2  # exit codes of runs
TOKENS = 16 * 64  # of a batch
STEPS = 20  # maximum number of steps between two faults
INTERVAL = 8  # steps between two checkpoints
FILE_LIMIT = 300_000  # bytes: the records of a run are smaller, the arrays of a checkpoint larger
PATIENCE = 1000  # seconds: a run that takes longer hangs
RESUMED = re.compile(rb"resuming from step (\d+)")  # printed by a run (training/loop.py)

# The phase of the run, of each of 10 kills.
KILLS = ("training",) * 5 + ("saving",) * 2 + ("preparing", "preparing", "starting")
# Faults of a run that has a checkpoint. Under the first three it must refuse to start, and change nothing.
CHANGED, EIO, EMFILE, READER = "changed config", "EIO", "EMFILE", "reader"
ZOMBIE, HALF_LINE = "zombie owner", "half line of a peer"
REFUSED, LOST = 2, 1
FIRST_MESSAGES = 5  # that a process sends before anything is trained: one of them is cut off
FAULTY = ("-m", "benchmarks.faulty_run")
DAMAGED = "damaged checkpoint"
DAMAGES = ("flip", "truncate", "zeros", "remove")


@dataclasses.dataclass
class Outcome:
    """Results of one kind of fault."""

    injected: int = 0
    survived: int = 0
    noticed: int = 0  # damages of files that are read
    redone: list[int] = dataclasses.field(default_factory=list)  # steps, by fault


class Run:
    """A run in `directory` that is started repeatedly.

    Attributes:
      log: output of its processes.
      zombie: a killed process of the run that has not been reaped; None: there is none.
    """

    def __init__(self, directory: Path, steps: int, mixture: bool = False):
        self.workdir, self.cache, self.log = directory / "run", directory / "cache", directory / "log.txt"
        self.zombie: subprocess.Popen[bytes] | None = None
        self._environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        settings = {
            **data_settings(directory.parent, mixture, TOKENS * steps // 2),
            "data.tokenizer": "bytes",
            "data.cache_dir": self.cache,
            "data.validation_fraction": 0.1,
            "model.context_length": 64,
            "model.num_layers": 2,
            "model.num_heads": 2,
            "model.embed_dim": 64,
            "model.residual_dropout": 0.1,
            "model.dtype": "float32",
            "batch.tokens_per_batch": TOKENS,
            "batch.microbatch_size": 8,
            "batch.ramp_start_tokens": TOKENS // 2,
            "batch.ramp_tokens": TOKENS * steps // 2,
            "batch.total_tokens": TOKENS * steps,
            "optimizer.ema_decay": 0.9,
            "evaluation.every_tokens": TOKENS * 3 * INTERVAL,
            "evaluation.max_tokens": 2048,
            "evaluation.sample_tokens": 0,
            "checkpoint.every_tokens": TOKENS * INTERVAL,
            "checkpoint.keep_last": 3,
            "logging.every_steps": 1,
            "logging.tensorboard": "false",
        }
        self._flags = ["--config=configs/gpt2.py:runlocal", f"--workdir={self.workdir}"]
        self._flags += [f"--config.{key}={value}" for key, value in settings.items()]
        directory.mkdir()

    def start(
        self,
        file_limit: int | None = None,
        program: tuple[str, ...] = ("-m", "gptjax.main"),
        flags: tuple[str, ...] = (),
    ) -> subprocess.Popen[bytes]:
        """Starts `program`, by default the run; without a checkpoint it starts over, whatever was recorded."""
        command = [sys.executable, *program, *self._flags, *flags, *([] if self.checkpoints() else ["--start_over"])]

        def limit() -> None:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, preexec_fn=limit)

    def start_reader(self) -> subprocess.Popen[bytes]:
        """Starts a process that reads the newest weights until SIGTERM; returns when it has read them once."""
        reader = subprocess.Popen(
            [sys.executable, *FAULTY, "reader", self.workdir],
            cwd=ROOT,
            env=self._environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert reader.stdout is not None
        reader.stdout.readline()
        return reader

    def step(self) -> int:
        """The newest step in its records."""
        try:
            *_, last, _ = [b"", *(self.workdir / "metrics.jsonl").read_bytes().split(b"\n")]
            return json.loads(last).get("step", 0)
        except (OSError, ValueError):
            return 0

    def checkpoints(self) -> list[int]:
        return sorted(int(path.name) for path in self.workdir.glob("checkpoints/*") if path.name.isdigit())

    def restored(self, since: int) -> int | None:
        """The step from which the newest process resumed, according to the log after its first `since` bytes."""
        found = RESUMED.findall(self.log.read_bytes()[since:])
        return int(found[-1]) if found else None


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Returns when `condition` holds, the process has ended, or PATIENCE is over."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.0005)


def inject(kind: str, run: Run, rng: random.Random) -> bool:
    """Starts the run and injects a fault; returns whether the run ended as expected."""
    if kind in (CHANGED, EIO, EMFILE):
        return refuses(kind, run)
    if kind == HALF_LINE:
        return loses_peer(run, rng.randrange(FIRST_MESSAGES))
    target = run.step() + rng.randint(1, STEPS)
    reader = run.start_reader() if kind == READER else None
    if kind == "preparing":
        shutil.rmtree(run.cache, ignore_errors=True)
    process = run.start(FILE_LIMIT if kind == "disk full" else None)
    if kind == "starting":
        moment = time.monotonic() + rng.uniform(0, 6)
        wait_until(lambda: time.monotonic() > moment, process)
    elif kind == "preparing":
        wait_until(lambda: any(run.cache.glob("corpora/*.partial")), process)
    elif kind == "saving":
        wait_until(lambda: run.step() >= target and any(run.workdir.glob("checkpoints/*tmp*")), process)
    elif kind != "disk full":
        wait_until(lambda: run.step() >= target, process)
    if kind != "disk full":
        time.sleep(rng.uniform(0, 0.03))
        process.send_signal(signal.SIGTERM if kind in ("SIGTERM", READER) else signal.SIGKILL)
    if kind == ZOMBIE and process.returncode is None:
        ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        run.zombie = process
        return ended is not None and ended.si_status == signal.SIGKILL
    try:
        code = process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        code = process.wait()
        return False
    if reader is not None:
        reader.terminate()
        _, said = reader.communicate(timeout=PATIENCE)
        if reader.returncode != 0 or b"damaged" in said:
            print(said.decode(), file=sys.stderr)
            return False
    return code == {"disk full": FULL, "SIGTERM": STOPPED, READER: STOPPED}.get(kind, KILLED)


def loses_peer(run: Run, messages: int) -> bool:
    """Starts the run as two processes, one of which is killed in a message; whether the other ends by itself.

    Both end before anything is trained: two processes do not compute the same bits as one.
    """
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"--coordinator_address=127.0.0.1:{server.getsockname()[1]}"
    logged, step = run.log.stat().st_size, run.step()
    job = [address, "--num_processes=2"]
    one = run.start(flags=(*job, "--process_id=0"))
    other = run.start(program=(*FAULTY, f"half_line={messages}"), flags=(*job, "--process_id=1"))
    codes = [process.wait(PATIENCE) for process in (one, other)]
    named = b"error: process 1 died" in run.log.read_bytes()[logged:]
    return codes == [LOST, KILLED] and named and run.step() <= step


def refuses(kind: str, run: Run) -> bool:
    """Whether the run refuses to start under a fault, and leaves its files as they are."""

    def files() -> dict[Path, bytes]:
        return {
            path: path.read_bytes()
            for name in ("checkpoints", "damaged", "metrics.jsonl", "config.json")
            for path in [run.workdir / name, *(run.workdir / name).rglob("*")]
            if path.is_file()
        }

    before = files()
    if kind == CHANGED:
        process = run.start(flags=("--config.optimizer.first_moment_dtype=bfloat16",))
    else:
        process = run.start(program=(*FAULTY, kind))
    return process.wait(PATIENCE) == REFUSED and files() == before


def damage(run: Run, rng: random.Random) -> str:
    """Damages a file of the newest checkpoint; returns its name and the damage."""
    newest = run.workdir / "checkpoints" / str(run.checkpoints()[-1])
    sizes = {path: path.stat().st_size for path in sorted(newest.rglob("*")) if path.is_file()}
    (path,) = rng.choices(list(sizes), list(sizes.values()))  # in proportion to its size
    content, kind = bytearray(path.read_bytes()), rng.choice(DAMAGES)
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        content = content[: rng.randrange(len(content))]
    elif kind == "zeros":
        content = bytearray(len(content))
    path.write_bytes(content)
    if kind == "remove":
        path.unlink()
    return f"{kind} {path.relative_to(newest.parent)}"


def plan(kills: int, disk_full: int, others: int, rng: random.Random) -> list[str]:
    """Returns the faults of processes in random order; damages occur between them."""
    faults = ["disk full"] * disk_full + [KILLS[i % len(KILLS)] for i in range(kills)]
    faults += [CHANGED, EIO, EMFILE, READER, ZOMBIE, HALF_LINE] * others
    faults += ["SIGTERM"] * 2  # more follow until all damages are done, as each needs a start that detects it
    rng.shuffle(faults)
    return faults


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """The arrays of the newest checkpoint by name."""
    import jax
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(workdir / "checkpoints")
    items = {name: ocp.args.StandardRestore() for name in ("params", "ema", "train")}
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(**items))
    leaves = jax.tree_util.tree_leaves_with_path(dict(restored.items()))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def records(workdir: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, without values that depend on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()[1:]
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second", "mfu")}
        for line in lines
    ]


def disturb(run: Run, faults: list[str], corruptions: int, rng: random.Random) -> dict[str, Outcome]:
    """Trains the run to its end through all faults; returns their outcomes by kind."""
    outcomes = {kind: Outcome() for kind in (*faults, DAMAGED, "SIGTERM")}
    undecided: list[str] = []  # faults that are survived when a later start resumes
    waiting, left, reached, kind = list(faults), corruptions, 0, ""
    while kind != "end":
        kind = waiting.pop(0) if waiting else "SIGTERM" if left else "end"
        if kind in (CHANGED, EIO, EMFILE, READER, HALF_LINE) and not run.checkpoints():
            waiting.append(kind)
            kind = "SIGTERM"  # which saves one
        if kind == READER and DAMAGED in undecided:  # a reader reports the damage
            waiting.append(kind)
            kind = "SIGTERM"
        if left and kind != READER and DAMAGED not in undecided and len(run.checkpoints()) >= 2 and rng.random() < 0.7:
            print(f"  damage: {damage(run, rng)}", flush=True)
            outcomes[DAMAGED].injected += 1
            undecided.append(DAMAGED)
            left -= 1
        reached, logged = max(reached, run.step()), run.log.stat().st_size if run.log.exists() else 0
        zombie, run.zombie = run.zombie, None
        ended_well = run.start().wait(10 * PATIENCE) == 0 if kind == "end" else inject(kind, run, rng)
        if zombie is not None:
            zombie.wait()
        restored = run.restored(logged)
        print(f"  {kind}: resumed from step {restored}, of {reached}", flush=True)
        if not ended_well:
            raise SystemExit(f"{kind}: the run did not end as expected\n{run.log.read_text()[-3000:]}")
        if restored is not None or not run.checkpoints():
            for fault in undecided:
                outcomes[fault].survived += 1
                outcomes[fault].redone.append(reached - (restored or 0))
            if DAMAGED in undecided:
                outcomes[DAMAGED].noticed += b"is damaged (" in run.log.read_bytes()[logged:]
            undecided, reached = [], run.step()
        if kind != "end":
            outcomes[kind].injected += 1
            undecided.append(kind)
    return outcomes


def compare(undisturbed: Path, disturbed: Path) -> bool:
    """Prints how many records and arrays of the last checkpoint are equal in two workdirs; returns whether all are."""
    one, other = records(undisturbed), records(disturbed)
    first, second = arrays(undisturbed), arrays(disturbed)
    same_arrays = sum(name in second and np.array_equal(first[name], second[name]) for name in first)
    print(f"records equal: {sum(a == b for a, b in zip(one, other, strict=False))} of {max(len(one), len(other))}")
    print(f"arrays of the last checkpoint equal, bit for bit: {same_arrays} of {len(first)}")
    return one == other and same_arrays == len(first) and first.keys() == second.keys()


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    rng, begin = random.Random(values.seed), time.monotonic()
    faults = plan(values.kills, values.disk_full, values.others, rng)
    steps = STEPS * (len(faults) + values.corruptions)
    directory = Path(values.directory or tempfile.mkdtemp(prefix="fault_drill_"))
    print(f"{steps} steps, a checkpoint every {INTERVAL}; faults: {dict(Counter(faults))}; in {directory}", flush=True)
    write_text(directory)
    undisturbed, disturbed = (Run(directory / name, steps, values.mixture) for name in ("undisturbed", "disturbed"))
    if undisturbed.start().wait(10 * PATIENCE) != 0:
        raise SystemExit(undisturbed.log.read_text()[-3000:])
    outcomes = disturb(disturbed, faults, values.corruptions, rng)
    print(f"\n{'fault':<24} {'injected':>8} {'survived':>8} {'steps redone':>12} {'at most':>8}")
    for kind, outcome in sorted(outcomes.items()):
        name = f"SIGKILL while {kind}" if kind in KILLS else kind
        counts = f"{outcome.injected:>8} {outcome.survived:>8}"
        print(f"{name:<24} {counts} {sum(outcome.redone):>12} {max(outcome.redone, default=0):>8}")
    print(
        f"\ndamages in files that are read, and so noticed: {outcomes[DAMAGED].noticed} of {outcomes[DAMAGED].injected}"
    )
    equal = compare(undisturbed.workdir, disturbed.workdir)
    print(f"took {(time.monotonic() - begin) / 60:.1f} minutes")
    if not equal:
        raise SystemExit("the disturbed run differs from the undisturbed one")
    if values.directory is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 20, "SIGKILLs.", lower_bound=0)
    flags.DEFINE_integer("corruptions", 10, "Damaged files of checkpoints.", lower_bound=0)
    flags.DEFINE_integer("disk_full", 3, "Saves on a full disk.", lower_bound=0)
    flags.DEFINE_integer("others", 2, "Faults of each other kind.", lower_bound=0)
    flags.DEFINE_bool("mixture", False, "Train on a mixture of three sources.")
    flags.DEFINE_integer("seed", 0, "Seed of the faults.")
    flags.DEFINE_string("directory", None, "Empty directory of the runs, which is kept; default: a temporary one.")
    app.run(main)
