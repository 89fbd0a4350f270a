"""Compares the attention kernels of a GPU or TPU with plain array code: values, gradients and speed.

    python -m benchmarks.attention [--backend=cudnn] [--length=1024] [--rows=16] [--shapes=5] [--output=...]

Random bfloat16 queries, keys and values go through the backend and through "xla"; both are compared with "xla" of the
same numbers in float32. The distances are ||x - y|| / ||y||, of the output and of the gradients of a random projection.
Exit code 1: the distance of the backend exceeds 1.5 times that of plain array code in bfloat16. On a CPU, --backend=xla
compares the reference with itself.
"""

import dataclasses
import statistics
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.measuring import alternate, measured_on, seconds, write_json
from gptjax import cli
from gptjax.config import GPTConfig
from gptjax.models.attention_backends import attention

SHAPES = ((12, 64, "dense"), (25, 64, "dense"), (12, 64, "banded"), (16, 96, "dense"), (8, 128, "dense"))
MARGIN = 1.5


def distances(actual: Any, expected: Any) -> list[float]:
    def distance(x: jax.Array, y: jax.Array) -> float:
        x64, y64 = np.asarray(x, np.float64), np.asarray(y, np.float64)
        return float(np.linalg.norm(x64 - y64) / np.linalg.norm(y64))

    return [distance(x, y) for x, y in zip(actual, expected, strict=True)]


def compare(heads: int, width: int, kind: str, seed: int) -> dict[str, Any]:
    """Distances from float32 of the backend and of plain array code, and milliseconds forward and backward."""
    shape = (ROWS.value, LENGTH.value, heads, width)
    q, k, v, projection = jax.random.normal(jax.random.key(seed), (4, *shape)).astype(jnp.bfloat16)
    config = GPTConfig(vocab_size=1, embed_dim=heads * width, num_heads=heads, context_length=LENGTH.value)

    def run(backend: Any, dtype: Any) -> Any:
        chosen = dataclasses.replace(config, attention_backend=backend, dtype=dtype)

        def forward(q: jax.Array, k: jax.Array, v: jax.Array) -> Any:
            out = attention(chosen, kind, q, k, v, None, None)
            return jnp.sum(out.astype(jnp.float32) * projection), out

        inputs = [x.astype(dtype) for x in (q, k, v)]
        step = jax.jit(jax.value_and_grad(forward, argnums=(0, 1, 2), has_aux=True))

        def call() -> Any:
            (_, out), gradients = jax.block_until_ready(step(*inputs))
            return out, *gradients

        return call

    exact = run("xla", "float32")()
    calls = {"backend": run(BACKEND.value, "bfloat16"), "xla": run("xla", "bfloat16")}
    found: dict[str, Any] = {"heads": heads, "width": width, "kind": kind}
    found |= {name: distances(call(), exact) for name, call in calls.items()}
    sides = {name: lambda call=call: seconds(lambda: [call() for _ in range(5)]) / 5 for name, call in calls.items()}
    times = alternate(sides, 3)
    found["milliseconds"] = {name: 1e3 * statistics.median(values) for name, values in times.items()}
    found["agrees"] = all(a <= MARGIN * b for a, b in zip(found["backend"], found["xla"], strict=True))
    return found


def main() -> None:
    result: dict[str, Any] = {**measured_on(), "backend": BACKEND.value, "rows": []}
    print(
        f"{BACKEND.value}: {ROWS.value} x {LENGTH.value} on {result['device']}; distances from float32 of o, dq, dk, dv"
    )
    for seed, shape in enumerate(SHAPES[: NUM_SHAPES.value]):
        row = compare(*shape, seed=seed)
        result["rows"].append(row)
        write_json(OUTPUT.value, result)
        ours, plain = (" ".join(f"{value:.1e}" for value in row[name]) for name in ("backend", "xla"))
        ms = row["milliseconds"]
        print(f"{shape}: {ours}; xla {plain}; {ms['backend']:.2f} ms, xla {ms['xla']:.2f} ms", flush=True)
    if not all(row["agrees"] for row in result["rows"]):
        print("the backend is further from float32 than plain array code", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    BACKEND = flags.DEFINE_enum("backend", "cudnn", ["cudnn", "splash", "xla"], "What is compared.")
    LENGTH = flags.DEFINE_integer("length", 1024, "Positions, a multiple of 128.")
    ROWS = flags.DEFINE_integer("rows", 16, "Sequences.")
    NUM_SHAPES = flags.DEFINE_integer(
        "shapes", len(SHAPES), "Number of combinations of heads and masks.", lower_bound=1
    )
    OUTPUT = flags.DEFINE_string("output", None, "Write the measurements to this JSON file.")
    cli.run(main)
