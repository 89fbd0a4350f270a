"""Trains a small model under injected faults, and compares it with a run without: `python -m benchmarks.fault_drill`.

The run is killed (SIGKILL) while it starts, tokenises, trains and saves; it is stopped (SIGTERM), finds files of its
newest checkpoint damaged and the disk full while it saves, cannot read its checkpoints (EIO, EMFILE), is started with
another config, and has a concurrent reader while it deletes checkpoints. It is restarted each time. At the end its
losses, and every array of its last checkpoint, must equal those of the run without faults, bit for bit. No privileges
are needed: a file size limit simulates a full disk, a limit on file descriptors causes EMFILE, and a patched reader
raises EIO.

The order of faults is determined by --seed; the instruction at which a kill arrives is not.
"""

import dataclasses
import json
import os
import random
import re
import resource
import shutil
import signal
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

ROOT = Path(__file__).parents[1]
KILLED, STOPPED, FULL = -signal.SIGKILL, 75, 2  # exit codes of a run
TOKENS = 16 * 64  # tokens of a batch
STEPS = 20  # steps of training for each fault
INTERVAL = 8  # steps from one checkpoint to the next
FILE_LIMIT = 300_000  # bytes: above the size of a run's records, below that of a checkpoint's arrays
PATIENCE = 300  # seconds: a run that takes longer hangs
RESUMED = re.compile(rb"resuming from step (\d+)")  # printed by a run (training/loop.py)

# The phases in which 10 kills arrive.
KILLS = ("training",) * 5 + ("saving",) * 2 + ("preparing", "preparing", "starting")
# Faults of a run that has a checkpoint; except with the reader, the run must refuse to start and change nothing.
CHANGED, EIO, EMFILE, READER = "changed config", "EIO", "EMFILE", "reader"
REFUSED = 2
DAMAGED = "damaged checkpoint"
DAMAGES = ("flip", "truncate", "zeros", "remove")


# `python -m gptjax.main` whose reads of checkpoints fail: argument 1 is the fault, the others are those of the command.
FAILING_READS = """
import errno, os, resource, runpy, sys
from gptjax.checkpoint import read_errors
from gptjax.checkpoint import stored_checkpoint

fault = sys.argv.pop(1)
read_errors.RETRY_DELAYS = (0.05, 0.05)
original = stored_checkpoint.StoredCheckpoint.manifest

def manifest(stored):
    if fault == "EIO":
        raise OSError(errno.EIO, os.strerror(errno.EIO), str(stored.path))
    used = {int(name) for name in os.listdir("/proc/self/fd")}
    lowest = next(number for number in range(len(used) + 1) if number not in used)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    return original(stored)

stored_checkpoint.StoredCheckpoint.manifest = manifest
runpy.run_module("gptjax.main", run_name="__main__", alter_sys=True)
"""

# Reads the newest weights of the workdir in argument 1 again and again until SIGTERM.
READING = """
import signal, sys
from pathlib import Path
import jax
from gptjax.config import MeshConfig
from gptjax.parallel.mesh import make_mesh
from gptjax.stages.saved_weights import load_parts

stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(True))
mesh = make_mesh(MeshConfig())
with jax.set_mesh(mesh):
    while not stop:
        load_parts(Path(sys.argv[1]), mesh)
        print("read", flush=True)
"""


@dataclasses.dataclass
class Outcome:
    """The outcome of one kind of fault."""

    injected: int = 0
    survived: int = 0
    noticed: int = 0  # of damages: those in files that are read
    redone: list[int] = dataclasses.field(default_factory=list)  # steps, by fault


class Run:
    """A run in `directory` that is restarted after each fault.

    Attributes:
      log: the output of its processes.
    """

    def __init__(self, directory: Path, steps: int):
        self.workdir, self.cache, self.log = directory / "run", directory / "cache", directory / "log.txt"
        self._environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_COMPILATION_CACHE_DIR": str(directory.parent / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "PYTHONPATH": str(ROOT),
        }
        settings = {
            "data.source": f"jsonl:{directory.parent / 'text.jsonl'}",
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
        """Starts `program`, by default the run; without a checkpoint it starts from scratch, whatever was recorded."""
        command = [sys.executable, *program, *self._flags, *flags, *([] if self.checkpoints() else ["--start_over"])]

        def limit() -> None:
            if file_limit is not None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))

        with self.log.open("ab") as log:
            return subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log, preexec_fn=limit)

    def start_reader(self) -> subprocess.Popen[bytes]:
        """Starts a process that reads the newest weights until SIGTERM; returns when it has read them once."""
        reader = subprocess.Popen(
            [sys.executable, "-c", READING, self.workdir],
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
        """The step that the newest process resumed from, by the log after its first `since` bytes."""
        found = RESUMED.findall(self.log.read_bytes()[since:])
        return int(found[-1]) if found else None


def wait_until(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    """Returns when `condition` holds, or the process has ended, or hangs."""
    deadline = time.monotonic() + PATIENCE
    while process.poll() is None and time.monotonic() < deadline and not condition():
        time.sleep(0.0005)


def inject(kind: str, run: Run, rng: random.Random) -> bool:
    """Starts the run and injects a fault; returns whether it ended as it should."""
    if kind in (CHANGED, EIO, EMFILE, READER) and not run.checkpoints():
        kind = "training"
    if kind in (CHANGED, EIO, EMFILE):
        return refuses(kind, run)
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


def refuses(kind: str, run: Run) -> bool:
    """Whether the run refuses to start under a fault, and its checkpoints stay as they are."""

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
        process = run.start(program=("-c", FAILING_READS, kind))
    return process.wait(PATIENCE) == REFUSED and files() == before


def damage(run: Run, rng: random.Random) -> str:
    """Damages a file of the newest checkpoint; returns a description of the damage."""
    newest = run.workdir / "checkpoints" / str(run.checkpoints()[-1])
    sizes = {path: path.stat().st_size for path in sorted(newest.rglob("*")) if path.is_file()}
    (path,) = rng.choices(list(sizes), list(sizes.values()))  # weighted by size, as a disk damages bytes
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
    """Returns the faults of running processes, in order; damages are injected between them."""
    faults = ["disk full"] * disk_full + [KILLS[i % len(KILLS)] for i in range(kills)]
    faults += [CHANGED, EIO, EMFILE, READER] * others
    faults += ["SIGTERM"] * 2  # at least one start for each damage, which detects it
    rng.shuffle(faults)
    return faults


def arrays(workdir: Path) -> dict[str, np.ndarray]:
    """Returns all arrays of the newest checkpoint."""
    import jax
    import orbax.checkpoint as ocp

    manager = ocp.CheckpointManager(workdir / "checkpoints")
    items = {name: ocp.args.StandardRestore() for name in ("params", "ema", "train")}
    restored = manager.restore(manager.latest_step(), args=ocp.args.Composite(**items))
    leaves = jax.tree_util.tree_leaves_with_path(dict(restored.items()))
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


def records(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records without the header and without values that depend on the clock."""
    lines = (workdir / "metrics.jsonl").read_text().splitlines()[1:]
    return [
        {k: v for k, v in json.loads(line).items() if k not in ("seconds", "tokens_per_second", "mfu")}
        for line in lines
    ]


def disturb(run: Run, faults: list[str], corruptions: int, rng: random.Random) -> dict[str, Outcome]:
    """Trains the run to its end under all faults; returns the outcomes by kind."""
    outcomes = {kind: Outcome() for kind in (*faults, DAMAGED, "SIGTERM")}
    undecided: list[str] = []  # faults whose outcome is known at the next successful start
    waiting, left, reached, kind = list(faults), corruptions, 0, ""
    while kind != "end":
        kind = waiting.pop(0) if waiting else "SIGTERM" if left else "end"
        if left and DAMAGED not in undecided and len(run.checkpoints()) >= 2 and rng.random() < 0.7:
            print(f"  damage: {damage(run, rng)}", flush=True)
            outcomes[DAMAGED].injected += 1
            undecided.append(DAMAGED)
            left -= 1
        reached, logged = max(reached, run.step()), run.log.stat().st_size if run.log.exists() else 0
        ended_well = run.start().wait(10 * PATIENCE) == 0 if kind == "end" else inject(kind, run, rng)
        restored = run.restored(logged)
        print(f"  {kind}: resumed from step {restored}, of {reached}", flush=True)
        if not ended_well:
            raise SystemExit(f"{kind}: the run did not end as it should\n{run.log.read_text()[-3000:]}")
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


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    rng, begin = random.Random(values.seed), time.monotonic()
    faults = plan(values.kills, values.disk_full, values.others, rng)
    steps = STEPS * (len(faults) + values.corruptions)
    directory = Path(values.directory or tempfile.mkdtemp(prefix="fault_drill_"))
    print(f"{steps} steps, a checkpoint every {INTERVAL}; faults: {dict(Counter(faults))}; in {directory}", flush=True)
    lines = (json.dumps({"text": f"{i} squared is {i * i}. " * 20}) for i in range(20_000))
    (directory / "text.jsonl").write_text("\n".join(lines) + "\n")
    undisturbed, disturbed = (Run(directory / name, steps) for name in ("without_faults", "with_faults"))
    if undisturbed.start().wait(10 * PATIENCE) != 0:
        raise SystemExit(undisturbed.log.read_text()[-3000:])
    outcomes = disturb(disturbed, faults, values.corruptions, rng)
    print(f"\n{'fault':<24} {'injected':>8} {'survived':>8} {'steps redone':>12} {'at most':>8}")
    for kind, outcome in sorted(outcomes.items()):
        name = f"SIGKILL while {kind}" if kind in KILLS else kind
        counts = f"{outcome.injected:>8} {outcome.survived:>8}"
        print(f"{name:<24} {counts} {sum(outcome.redone):>12} {max(outcome.redone, default=0):>8}")
    one, other = records(undisturbed.workdir), records(disturbed.workdir)
    same_losses = sum(a == b for a, b in zip(one, other, strict=False))
    first, second = arrays(undisturbed.workdir), arrays(disturbed.workdir)
    same_arrays = sum(name in second and np.array_equal(first[name], second[name]) for name in first)
    print(f"\ndetected damages in files that are read: {outcomes[DAMAGED].noticed} of {outcomes[DAMAGED].injected}")
    print(f"records equal: {same_losses} of {max(len(one), len(other))}")
    print(f"arrays of the last checkpoint equal, bit for bit: {same_arrays} of {len(first)}")
    print(f"took {(time.monotonic() - begin) / 60:.1f} minutes")
    if one != other or same_arrays != len(first) or first.keys() != second.keys():
        raise SystemExit("the run with faults differs from the run without")
    if values.directory is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 20, "SIGKILLs.", lower_bound=0)
    flags.DEFINE_integer("corruptions", 10, "Damaged files of checkpoints.", lower_bound=0)
    flags.DEFINE_integer("disk_full", 3, "Saves on a full disk.", lower_bound=0)
    flags.DEFINE_integer(
        "others", 2, "Number of each other fault: changed config, EIO, EMFILE, a concurrent reader.", lower_bound=0
    )
    flags.DEFINE_integer("seed", 0, "Seed of the order of faults.")
    flags.DEFINE_string("directory", None, "Empty directory for all files, which are kept; default: a temporary one.")
    app.run(main)
