"""Prepares a corpus with planted copies and overlaps, killed in each step: `python -m benchmarks.prepare_drill`.

The corpus (`benchmarks/planted_corpus.py`) is prepared by `gptjax.prepare`, which is killed (SIGKILL) in each of its
steps and started again. Reported are the seconds, the peak of the resident memory of all its processes together, how
many planted copies and overlaps were found, and how many other documents were dropped or cut. With --compare, the
corpus is also prepared undisturbed, and the files must be equal. It needs Linux, whose /proc has the memory.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from absl import app, flags

from benchmarks import planted_corpus
from gptjax.files import read_json

# Steps by their directories in OUTPUT/work.
STEPS = ("read", "grams", "measure", "exact", "near", "select", "tokenizer", "tokenise")
WRITING = "writing shards"
KILLED = -signal.SIGKILL
SAMPLES = 10  # of the memory in a second
MAX_DELAY = 2.0  # seconds between the beginning of a step and its kill


class Preparation:
    """Attempts of one preparation.

    Attributes:
      output: directory of the corpus.
      seconds: of all attempts.
      peak: bytes, the most that all processes of an attempt held together; shared pages are counted in each.
    """

    def __init__(self, source: Path, output: Path, arguments: Sequence[str]):
        self.output, self.seconds, self.peak = output, 0.0, 0
        self._command = [sys.executable, "-m", "gptjax.prepare", f"--source=jsonl:{source}/[0-9]*.jsonl"]
        self._command += [f"--output={output}", f"--tasks={source}/task.jsonl", *arguments]

    def attempt(self, step: str | None, delay: float) -> int:
        """Runs the command, which is killed `delay` seconds after `step` began, None: never; returns its exit code."""
        begin = time.monotonic()
        log = self.output.with_suffix(".log")
        with log.open("a") as file:
            # A process group of its own, to kill and to measure all of its processes.
            process = subprocess.Popen(self._command, stdout=file, stderr=file, start_new_session=True)
        sampler = threading.Thread(target=self._sample, args=(process,))
        sampler.start()
        while step is not None and process.poll() is None:
            if self.has_begun(step):
                time.sleep(delay)
                os.killpg(process.pid, signal.SIGKILL)
                break
            time.sleep(0.01)
        code = process.wait()
        sampler.join()
        self.seconds += time.monotonic() - begin
        if code not in (0, KILLED):
            raise SystemExit(f"{' '.join(self._command)} failed:\n{log.read_text()[-2000:]}")
        return code

    def has_begun(self, step: str) -> bool:
        if step == WRITING:
            return any(self.output.glob("*.array_record")) or any(self.output.glob(".*.array_record-*"))
        return (self.output / "work" / step).is_dir()

    def _sample(self, process: subprocess.Popen[bytes]) -> None:
        while process.poll() is None:
            self.peak = max(self.peak, resident_bytes(process.pid))
            time.sleep(1 / SAMPLES)


def resident_bytes(group: int) -> int:
    """Returns the resident memory of all processes of a process group together, in bytes."""
    pages = 0
    for path in Path("/proc").glob("[0-9]*"):
        try:
            if os.getpgid(int(path.name)) == group:
                pages += int((path / "statm").read_text().split()[1])
        except (OSError, IndexError):  # it has ended
            continue
    return pages * os.sysconf("SC_PAGE_SIZE")


def compare(one: Path, other: Path) -> list[str]:
    """Returns the names of files that differ between two directories."""
    names = {str(path.relative_to(root)) for root in (one, other) for path in root.rglob("*") if path.is_file()}
    return sorted(
        name
        for name in names
        if not ((one / name).is_file() and (other / name).is_file())
        or (one / name).read_bytes() != (other / name).read_bytes()
    )


def report(planted: planted_corpus.Planted, output: Path, cache_dir: Path) -> bool:
    """Prints what was found of each kind; returns whether that is enough."""
    left = planted_corpus.left(planted, output, cache_dir)
    exact, near, overlaps = sum(planted.exact.values()), len(planted.near), len(planted.overlaps)
    others = len(planted.lengths)
    lowest, middle = (np.quantile(planted.similarities, share) for share in (0, 0.5))
    print(f"exact copies:      {exact - left.exact:,} of {exact:,} found")
    print(
        f"near copies:       {near - left.near:,} of {near:,} found ({100 * (near - left.near) / near:.2f} %), of "
        f"similarities from {lowest:.3f}, median {middle:.3f}"
    )
    print(f"13-gram overlaps:  {overlaps - left.overlaps:,} of {overlaps:,} removed")
    print(f"other documents:   {left.missing:,} of {others:,} dropped, {left.cut:,} cut")
    return (
        not left.exact and left.near <= 0.05 * near and not left.overlaps and left.missing + left.cut <= 0.01 * others
    )


def main(argv: list[str]) -> None:
    values = flags.FLAGS
    directory = Path(values.directory or tempfile.mkdtemp(prefix="prepare_drill_"))
    source, cache_dir = directory / "source", directory / "cache"
    source.mkdir(parents=True)
    begin = time.monotonic()
    planted = planted_corpus.write(source, int(values.megabytes * 1e6), values.seed)
    documents = len(planted.lengths) + sum(planted.exact.values()) + len(planted.near) + len(planted.overlaps)
    print(f"{planted.num_bytes / 1e6:,.1f} MB, {documents:,} documents, written in {time.monotonic() - begin:.0f} s")
    arguments = [f"--tokenizer={values.tokenizer}", f"--processes={values.processes}", f"--cache_dir={cache_dir}"]
    if values.part_bytes is not None:
        arguments.append(f"--part_bytes={values.part_bytes}")
    rng = random.Random(values.seed)
    disturbed = Preparation(source, directory / "corpus", arguments)
    kills = 0
    for step in (*STEPS, WRITING):
        for _ in range(values.kills):
            delay = rng.uniform(0, values.max_delay)
            killed = disturbed.attempt(step, delay) == KILLED
            kills += killed
            print(f"  {step}: {'killed' if killed else 'not killed'}, {delay:.2f} s after it began", flush=True)
    disturbed.attempt(None, 0)
    print(f"prepared after {kills} kills in {disturbed.seconds:.0f} s; peak memory {disturbed.peak / 1e6:,.0f} MB")
    passed = report(planted, disturbed.output, cache_dir)
    if values.compare:
        undisturbed = Preparation(source, directory / "undisturbed", arguments)
        undisturbed.attempt(None, 0)
        differing = compare(disturbed.output, undisturbed.output)
        print(
            f"undisturbed: {undisturbed.seconds:.0f} s, {planted.num_bytes / 1e6 / undisturbed.seconds:.1f} MB/s; peak "
            f"memory {undisturbed.peak / 1e6:,.0f} MB; files that differ: {', '.join(differing) or 'none'}"
        )
        passed &= not differing
    counts = read_json(disturbed.output / "report.json")["steps"]
    print(f"its report: {counts['exact_copies']['dropped_documents']:,} exact copies, ", end="")
    print(f"{counts['near_copies']['dropped_documents']:,} near copies")
    if not passed:
        raise SystemExit("too little was found, too much was dropped, or files differ")
    if values.directory is None:
        shutil.rmtree(directory)


if __name__ == "__main__":
    flags.DEFINE_float("megabytes", 100, "Size of the text.", lower_bound=0)
    flags.DEFINE_integer("processes", 2, "As of gptjax.prepare.", lower_bound=1)
    flags.DEFINE_string("tokenizer", "gpt2", "As of gptjax.prepare.")
    flags.DEFINE_integer("part_bytes", None, "As of gptjax.prepare; default: its default.", lower_bound=1)
    flags.DEFINE_integer("kills", 1, "SIGKILLs in each step.", lower_bound=0)
    flags.DEFINE_float("max_delay", MAX_DELAY, "Most seconds from the beginning of a step to its kill.", lower_bound=0)
    flags.DEFINE_bool("compare", True, "Also prepare the corpus undisturbed, and compare the files.")
    flags.DEFINE_integer("seed", 0, "Seed of the corpus and of the kills.")
    flags.DEFINE_string("directory", None, "Empty directory of the corpora, which is kept; default: a temporary one.")
    app.run(main)
