"""Loss and gradient of logits by one GPU kernel (Pallas, Triton), in the place where the logits lie.

Array code reads the logits three times: for the largest and the sum, for the gradient, and to write it. A block of
threads that goes through a row twice finds it in the cache the second time (as Hsu et al. 2024, Liger Kernel, do).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton

# Logits that a block of threads reads at a time, and its warps. Two such blocks share a processor, and the rows in
# flight, 100 kB each, fit an H100's cache of 50 MB.
BLOCK, WARPS = 8192, 32
MASKED = -1e30


def nats_and_gradient(
    logits_NV: jax.Array, targets_N: jax.Array, weights_N: jax.Array, rows: int, dtype: Any, interpret: bool = False
) -> tuple[jax.Array, jax.Array]:
    """-log softmax(logits)[target], float32 (N,), and the gradient of its weighted sum, (N, V) of `dtype`.

    Args:
      rows: of V, those that count; the others' gradient is 0.
      interpret: on a CPU, step by step.
    """
    count, width = logits_NV.shape
    row, number = pl.BlockSpec((None, width), lambda i: (i, 0)), pl.BlockSpec((None,), lambda i: (i,))
    return pl.pallas_call(
        partial(_kernel, rows=rows, block=min(BLOCK, pl.next_power_of_2(width))),
        grid=(count,),
        in_specs=[row, number, number],
        out_specs=[number, row],
        out_shape=[jax.ShapeDtypeStruct((count,), jnp.float32), jax.ShapeDtypeStruct((count, width), dtype)],
        input_output_aliases={0: 1} if logits_NV.dtype == dtype else {},
        compiler_params=triton.CompilerParams(num_warps=WARPS),
        interpret=interpret,
        name="loss_and_gradient",
    )(logits_NV, targets_N, weights_N)


def _kernel(
    logits_V: Any, target: Any, weight: Any, nats: Any, dlogits_V: Any, *, rows: int, block: int
) -> None:  # one row; the arguments are where it lies
    width, target, weight = logits_V.shape[0], target[...], weight[...]

    def read(i: Any) -> tuple[jax.Array, jax.Array]:
        column_C = i * block + jnp.arange(block)
        logits_C = triton.load(logits_V.at[column_C], mask=column_C < width, other=0.0).astype(jnp.float32)
        return column_C, jnp.where(column_C < rows, logits_C, MASKED)

    def add(i: Any, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        largest, total, picked = sums
        column_C, logits_C = read(i)
        new = jnp.maximum(largest, jnp.max(logits_C))
        total = total * jnp.exp(largest - new) + jnp.sum(jnp.exp(logits_C - new))
        return new, total, picked + jnp.sum(jnp.where(column_C == target, logits_C, 0.0))

    blocks, zero = pl.cdiv(width, block), jnp.float32(0)
    largest, total, picked = jax.lax.fori_loop(0, blocks, add, (jnp.float32(MASKED), zero, zero))
    log_z = largest + jnp.log(total)
    nats[...] = log_z - picked

    @pl.loop(0, blocks)
    def write(i: Any) -> None:
        column_C, logits_C = read(i)
        gradient_C = (jnp.exp(logits_C - log_z) - jnp.where(column_C == target, 1.0, 0.0)) * weight
        triton.store(dlogits_V.at[column_C], gradient_C.astype(dlogits_V.dtype), mask=column_C < width)
