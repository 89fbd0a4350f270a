"""Trains a small model in an emulated bucket under faults, as `fault_drill` does: `python -m benchmarks.bucket_drill`.

The bucket is an emulator of Google Cloud Storage on loopback (`tests/gcs_emulator.py`). A run is killed (SIGKILL) while
it starts, trains and saves, is stopped (SIGTERM), finds objects of its newest checkpoint damaged, meets bursts of
quota errors (429) and unavailability (503), is refused all writes (403), and is started while another run holds the
lock. It is started again each time. At the end its records, and every array of its last checkpoint, must equal those of
an undisturbed run on a local disk, bit for bit.
"""

import random
import shutil
import signal
import tempfile
import time
from collections import Counter
from pathlib import Path

from absl import app, flags, logging

from benchmarks import drill_texts, fault_drill
from benchmarks.fault_drill import DAMAGES, INTERVAL, KILLED, PATIENCE, STEPS, STOPPED, compare, wait_until
from gptjax.files import expand
from tests.gcs_emulator import Emulator, emulated

BUCKET = "drill-bucket"
REFUSED = 2  # the exit code of a run that the bucket or a lock refuses
BURST, FORBIDDEN, LOCKED = "429 and 503 bursts", "403 on writes", "lock of another run"
SHARE = 0.05  # of the requests that fail in a burst


class Run(fault_drill.Run):
    """A run whose workdir is in the bucket."""

    def __init__(self, directory: Path, steps: int, emulator: Emulator):
        super().__init__(directory, steps)
        self.workdir, self.emulator = expand(f"gs://{BUCKET}/runs/drill"), emulator
        self._flags = [flag for flag in self._flags if not flag.startswith("--workdir=")]
        self._flags += [f"--workdir={self.workdir}", f"--config.data.cache_dir=gs://{BUCKET}/cache"]

    def names(self) -> list[str]:
        return self.emulator.names(f"{BUCKET}/runs/drill/")

    def checkpoints(self) -> list[int]:
        found = [name.split("/") for name in self.names() if name.startswith("checkpoints/")]
        return sorted(int(parts[1]) for parts in found if parts[2:] == ["commit_success.txt"])

    def step(self) -> int:
        """The step of its newest checkpoint: records reach the bucket later."""
        return max(self.checkpoints(), default=0)

    def saving(self) -> bool:
        """Whether a checkpoint is being written."""
        steps = {int(name.split("/")[1]) for name in self.names() if name.startswith("checkpoints/")}
        return bool(steps - set(self.checkpoints()))


def inject(kind: str, run: Run, rng: random.Random) -> bool:
    """Starts the run and injects a fault; returns whether the run ended as expected."""
    if kind == LOCKED:
        process = run.start()
        wait_until(lambda: "run.lock" in run.names(), process)
        refused = run.start().wait(PATIENCE) == REFUSED
        process.send_signal(signal.SIGTERM)
        return refused and process.wait(PATIENCE) == STOPPED
    if kind == FORBIDDEN:
        run.emulator.fault = lambda method, name: 403 if method in ("POST", "PUT", "DELETE") else None
        ended = run.start().wait(PATIENCE) == REFUSED
        run.emulator.fault = lambda method, name: None
        return ended
    if kind == BURST:
        run.emulator.fault = lambda method, name: rng.choice((429, 503)) if rng.random() < SHARE else None
    target = run.step() + INTERVAL * rng.randint(1, 2)
    process = run.start()
    if kind == "starting":
        moment = time.monotonic() + rng.uniform(0, 8)
        wait_until(lambda: time.monotonic() > moment, process)
    elif kind == "saving":
        wait_until(lambda: run.step() >= target and run.saving(), process)
        time.sleep(rng.uniform(0, 0.3))
    else:
        wait_until(lambda: run.step() >= target, process)
        time.sleep(rng.uniform(0, 2))
    process.send_signal(signal.SIGTERM if kind in ("SIGTERM", BURST) else signal.SIGKILL)
    code = process.wait(PATIENCE)
    run.emulator.fault = lambda method, name: None
    return code == (STOPPED if kind in ("SIGTERM", BURST) else KILLED)


def damage(run: Run, rng: random.Random) -> str:
    """Damages an object of the newest checkpoint; returns its name and the damage."""
    newest = f"{BUCKET}/runs/drill/checkpoints/{run.checkpoints()[-1]}/"
    sizes = {name: len(run.emulator.read(newest + name)) for name in run.emulator.names(newest)}
    (name,) = rng.choices(list(sizes), list(sizes.values()))
    content, kind = bytearray(run.emulator.read(newest + name)), rng.choice(DAMAGES)
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif kind == "truncate":
        content = content[: rng.randrange(len(content))]
    elif kind == "zeros":
        content = bytearray(len(content))
    if kind == "remove":
        run.emulator.remove(newest + name)
    else:
        run.emulator.write(newest + name, bytes(content))
    return f"{kind} {name}"


def main(argv: list[str]) -> None:
    logging.set_verbosity(logging.WARNING)
    values = flags.FLAGS
    rng, begin = random.Random(values.seed), time.monotonic()
    kinds = ("training", "saving", "training", "saving", "starting")
    faults = [kinds[i % len(kinds)] for i in range(values.kills)] + [BURST, FORBIDDEN, LOCKED] * values.others
    faults += ["SIGTERM"] * values.corruptions  # each finds one damage
    rng.shuffle(faults)
    steps = STEPS * (len(faults) + 2)
    directory = Path(values.directory or tempfile.mkdtemp(prefix="bucket_drill_"))
    print(f"{steps} steps, a checkpoint every {INTERVAL}; faults: {dict(Counter(faults))}; in {directory}", flush=True)
    drill_texts.write_text(directory)
    undisturbed = fault_drill.Run(directory / "undisturbed", steps)
    if undisturbed.start().wait(10 * PATIENCE) != 0:
        raise SystemExit(undisturbed.log.read_text()[-3000:])
    with emulated(BUCKET) as emulator:
        run = Run(directory / "disturbed", steps, emulator)
        damaged = noticed = 0
        for kind in (*faults, "end"):
            logged = run.log.stat().st_size if run.log.exists() else 0
            text = ""
            if kind == "SIGTERM" and len(run.checkpoints()) >= 2 and damaged < values.corruptions:
                damaged, text = damaged + 1, f", after {damage(run, rng)}"
            ended_well = run.start().wait(10 * PATIENCE) == 0 if kind == "end" else inject(kind, run, rng)
            noticed += b"is damaged (" in run.log.read_bytes()[logged:]
            print(f"  {kind}{text}: resumed from step {run.restored(logged)}", flush=True)
            if not ended_well:
                raise SystemExit(f"{kind}: the run did not end as expected\n{run.log.read_text()[-3000:]}")
        print(f"\ndamages: {damaged}, of which noticed, as the damaged object is read: {noticed}")
        equal = compare(undisturbed.workdir, run.workdir)
    print(f"took {(time.monotonic() - begin) / 60:.1f} minutes; {len(emulator.requests):,} requests")
    if not equal:
        raise SystemExit("the disturbed run differs from the undisturbed one")
    if values.directory is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    flags.DEFINE_integer("kills", 5, "SIGKILLs.", lower_bound=0)
    flags.DEFINE_integer("corruptions", 3, "Damaged objects of checkpoints.", lower_bound=0)
    flags.DEFINE_integer("others", 1, "Faults of each other kind.", lower_bound=0)
    flags.DEFINE_integer("seed", 0, "Seed of the faults.")
    flags.DEFINE_string("directory", None, "Empty directory of the runs, which is kept; default: a temporary one.")
    app.run(main)
