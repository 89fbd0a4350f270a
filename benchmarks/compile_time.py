"""How long the training step takes to compile, against depth: `python -m benchmarks.compile_time`.

Scanned layers should cost the same whatever their number; unrolled ones are shown beside them. Rounds alternate between
the programs, and no compilation cache is used. The model is narrow, which changes what a step costs, not the program.
"""

import statistics
import time
from typing import Literal

import jax
import numpy as np
from absl import app, flags

from gptjax import config as c
from gptjax.parallel.mesh import make_mesh
from gptjax.training.programs import make_program
from gptjax.training.state import create_state, make_train_step, state_shardings

LayerLoop = Literal["scan", "unroll"]
DEPTHS = (12, 24, 48)


def compile_seconds(num_layers: int, layer_loop: LayerLoop) -> float:
    """Seconds to lower and compile the real training step of a model of so many layers."""
    model = c.GPTConfig(
        vocab_size=512, context_length=64, num_layers=num_layers, num_heads=4, embed_dim=64, layer_loop=layer_loop
    )
    config = c.Config(model=model, batch=c.BatchConfig(total_tokens=1, tokens_per_batch=4 * 64))
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    tokens_BT = np.zeros((4, 64), np.int32)
    program = make_program(config)
    state = jax.eval_shape(lambda: create_state(program, mesh))
    step = make_train_step(program, state_shardings(program, mesh))
    batch = {"tokens": tokens_BT[None], "targets": tokens_BT[None], "weights": np.ones((1, 4, 64), np.float32)}
    with jax.set_mesh(mesh):
        start = time.perf_counter()
        step.lower(state, batch, np.int32(1), {"lr": np.float32(1e-3)}).compile()
        return time.perf_counter() - start


def main(argv: list[str]) -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    programs: list[tuple[LayerLoop, int]] = [*(("scan", depth) for depth in DEPTHS), ("unroll", DEPTHS[0])]
    seconds: dict[tuple[LayerLoop, int], list[float]] = {program: [] for program in programs}
    for _round in range(flags.FLAGS.rounds):
        for layer_loop, depth in programs:
            seconds[layer_loop, depth].append(compile_seconds(depth, layer_loop))
    base = seconds["scan", DEPTHS[0]]
    print(f"{jax.device_count()} x {jax.devices()[0].device_kind}, jax {jax.__version__}")
    print(f"{'layers':<12} {'median s':>9} {'min':>6} {'max':>6}   median ratio to {DEPTHS[0]} scanned, by round")
    for (layer_loop, depth), times in seconds.items():
        ratio = statistics.median(t / b for t, b in zip(times, base, strict=True))
        row = f"{statistics.median(times):>9.2f} {min(times):>6.2f} {max(times):>6.2f}   {ratio:.2f}"
        print(f"{depth:>3} {layer_loop:<8} {row}")


if __name__ == "__main__":
    flags.DEFINE_integer("rounds", 3, "Compilations of each program.", lower_bound=1)
    app.run(main)
