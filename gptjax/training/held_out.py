"""Evaluates a loss on held-out batches."""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax.sharding import Mesh

from gptjax.checkpoint.state import SHARED_PROGRAMS
from gptjax.data.pipeline import Microbatch
from gptjax.distributed import preemption
from gptjax.parallel.rows import global_array, process_rows
from gptjax.training.objective import Loss


def perplexity(nats: float) -> float:
    """The perplexity of a loss in nats per token: its exponential."""
    return math.exp(nats) if nats < 700 else math.inf


def held_out_means(
    loss: Loss,
    read: Callable[[], Iterator[Microbatch]],
    batch_size: int,
    mesh: Mesh,
    max_batches: int | None = None,
) -> Callable[[Any], dict[str, float]]:
    """Returns a function from all parameters to the mean loss and the loss's other measures on held-out targets.

    Args:
      read: returns the batches, of `batch_size` rows over all processes, from the first one.
      max_batches: evaluate only so many; None: all.
    """
    rows = process_rows(mesh, batch_size)
    sums_of = _sums(loss)

    def evaluate(params: Any) -> dict[str, float]:
        sums = []
        for i, local in enumerate(read()):
            if i == max_batches:
                break
            preemption.check()
            batch = {name: global_array(mesh, rows, array, batch_size) for name, array in local.arrays.items()}
            sums.append(sums_of(params, batch))
        total, weight, measures = jax.tree.map(lambda *of: math.fsum(map(float, of)), *jax.device_get(sums))
        return {"loss": total / weight, **{name: value / weight for name, value in measures.items()}}

    return evaluate


@functools.lru_cache(maxsize=SHARED_PROGRAMS)
def _sums(loss: Loss) -> jax.stages.Wrapped:
    """Returns the jitted loss without dropout: one program for all data, and all runs, that it is evaluated in."""
    return jax.jit(lambda params, batch: loss(params, batch, None))
