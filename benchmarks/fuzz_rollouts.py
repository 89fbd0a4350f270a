"""Reads damaged files of rollouts: `python -m benchmarks.fuzz_rollouts --seconds=120`.

Each file is a valid one with bits flipped, truncated, or with parts repeated, moved or removed, or it is random bytes.
`read_arrays` must raise OSError or ValueError, or return exactly the arrays that were written.
"""

import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
from absl import app, flags

from gptjax.stages.rl.rollouts import read_arrays, write_arrays

SECONDS = flags.DEFINE_float("seconds", 120, "Time to run.")
SEED = flags.DEFINE_integer("seed", 0, "Seed of the random damage.")

SHAPE = (2, 3, 8)


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Applies one to three random damages to a file's content."""
    changed = bytearray(content)
    for _ in range(draw.randint(1, 3)):
        place, length = draw.randrange(len(changed) or 1), draw.choice([1, 4, 100, 1000])
        match draw.randrange(7):
            case 0 if changed:
                changed[place] ^= 1 << draw.randrange(8)
            case 1:
                del changed[place:]
            case 2:
                del changed[place : place + length]
            case 3:
                changed[place:place] = draw.randbytes(length)
            case 4:
                changed[place : place + length] = draw.randbytes(length)
            case 5:
                other = draw.randrange(len(changed) or 1)
                changed[place:place] = changed[other : other + length]
            case _ if draw.randrange(10) == 0:
                changed = bytearray(draw.choice([b"", b"PK", b"PK\3\4", b"\x93NUMPY\1\0"]) + draw.randbytes(length))
    return bytes(changed)


def main(_: list[str]) -> None:
    draw, until, results = random.Random(SEED.value), time.monotonic() + SECONDS.value, Counter[str]()
    arrays = {
        name: np.random.default_rng(0).integers(0, 99, SHAPE).astype(dtype)
        for name, dtype in (("tokens", "i4"), ("targets", "i4"), ("weights", "f4"), ("advantages", "f4"))
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "00000000.npz"
        write_arrays(path, arrays)
        content = path.read_bytes()
        while time.monotonic() < until:
            path.write_bytes(damaged(content, draw))
            try:
                found, _digest = read_arrays(path, SHAPE)
            except (OSError, ValueError) as error:
                results[str(error)] += 1
                continue
            assert found.keys() == arrays.keys(), found.keys()
            assert all(np.array_equal(found[name], arrays[name]) for name in arrays)
            results["read, and equal to what was written"] += 1
    print(f"{results.total():,} files")
    for result, count in results.most_common():
        print(f"{count:9,}  {result}")


if __name__ == "__main__":
    app.run(main)
