"""Compares ring attention on 8 simulated devices with `dot_product_attention`: `ring_on_meshes.py OUT.json NAME...`.

A name is "order", "poison" or a case. A case is MESH:BAND:SEGMENTS:DTYPE, such as context=8:5:segments:float32; a BAND
of 0 is dense. Writes {"cases": {case: {"differences": the largest of out, dq, dk, dv, "sent":
collectives of the program}}, "order": ..., "poison": ...}.
"""

import functools
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import MeshConfig
from gptjax.models.dot_product import attention_mask, dot_product_attention
from gptjax.parallel import balanced_order, ring
from gptjax.parallel.mesh import axis_size, batch_sharding, make_mesh

LENGTH = 96  # in chunks of 24, 16, 12 or 6
SCALE = 0.3
COLLECTIVES = r"\b(all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)(?:-start)?\("


def mesh_of(text: str) -> jax.sharding.Mesh:
    axes = {axis: int(size) for axis, size in (part.split("=") for part in text.split(","))}
    return make_mesh(MeshConfig(**{"data": 1} | axes), jax.devices()[: math.prod(axes.values())])


def arrays(dtype: str) -> tuple[jax.Array, ...]:
    """Queries, keys, values and the gradient of the output; segments."""
    rng = np.random.default_rng(0)
    normal = [jnp.asarray(rng.normal(size=(2, LENGTH, 4, 8)), dtype) for _ in range(4)]
    return *normal, jnp.asarray(np.sort(rng.integers(0, 5, (2, LENGTH)), axis=1))


def on_the_ring(band_width: int | None) -> Callable[..., jax.Array]:
    return functools.partial(ring.ring_attention, band_width=band_width, scale=SCALE, precision=None)


def on_one_device(band_width: int | None) -> Callable[..., jax.Array]:
    def attend(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        kind = "dense" if band_width is None else "banded"
        mask_BHTS = attention_mask(kind, band_width or 0, LENGTH, segments_BT)
        return dot_product_attention(q_BTHK, k_BTHK, v_BTHK, mask_BHTS, scale=SCALE)

    return attend


def with_gradients(attend: Callable[..., jax.Array]) -> Callable[..., tuple[jax.Array, ...]]:
    """(q, k, v, d_out, segments) -> (out, dq, dk, dv)."""

    def both(
        q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, d_out_BTHK: jax.Array, segments_BT: jax.Array | None
    ) -> tuple[jax.Array, ...]:
        out_BTHK, backward = jax.vjp(lambda *qkv: attend(*qkv, segments_BT), q_BTHK, k_BTHK, v_BTHK)
        return out_BTHK, *backward(d_out_BTHK)

    return both


def run(function: Callable[..., Any], *given: Any) -> tuple[Any, dict[str, int]]:
    """Returns the results, and the number of collectives of each kind in the compiled program."""
    compiled = jax.jit(function).lower(*given).compile()
    return compiled(*given), Counter(re.findall(COLLECTIVES, compiled.as_text()))


def compare(case: str) -> dict[str, Any]:
    mesh, band, packing, dtype = case.split(":")
    band_width = int(band) if int(band) > 0 else None
    *given, segments_BT = arrays(dtype)
    given.append(segments_BT if packing == "segments" else None)
    expected, _ = run(with_gradients(on_one_device(band_width)), *given)
    with jax.set_mesh(mesh_of(mesh)):
        positions_T = balanced_order.balanced_positions(LENGTH, axis_size("context"))
        balanced = jax.tree.map(lambda x_BT: x_BT[:, positions_T], given)
        results, sent = run(with_gradients(on_the_ring(band_width)), *balanced)
    pairs = zip(results, (x_BT[:, positions_T] for x_BT in expected), strict=True)
    largest = [float(np.abs(np.asarray(x, np.float32) - np.asarray(y, np.float32)).max()) for x, y in pairs]
    return {"differences": largest, "sent": sent}


def order(mesh: str) -> dict[str, Any]:
    """Whether both permutations and the gradient of the first are correct, and their collectives."""
    mesh_in_use = mesh_of(mesh)
    positions_T = balanced_order.balanced_positions(LENGTH, mesh_in_use.shape["context"])
    with jax.set_mesh(mesh_in_use):

        def place(x: np.ndarray) -> jax.Array:
            return jax.device_put(x, batch_sharding(mesh_in_use))

        tokens_BT = np.arange(2 * LENGTH, dtype=np.int32).reshape(2, LENGTH)
        x_BTD = np.random.default_rng(0).normal(size=(2, LENGTH, 3)).astype(np.float32)
        tried = {
            "balance": (tokens_BT[:, positions_T], run(balanced_order.to_balanced_order, place(tokens_BT))),
            "restore": (x_BTD, run(balanced_order.from_balanced_order, place(x_BTD[:, positions_T]))),
            "gradient": (
                x_BTD,
                run(
                    lambda x, g: jax.vjp(balanced_order.to_balanced_order, x)[1](g)[0],
                    place(x_BTD),
                    place(x_BTD[:, positions_T]),
                ),
            ),
        }
        return {
            name: {"right": np.array_equal(result, expected), "sent": sent}
            for name, (expected, (result, sent)) in tried.items()
        }


def poison(band_width: int | None, bad: slice) -> dict[str, list[int]]:
    """Returns the positions whose outputs and query gradients are finite when keys and values `bad` are NaN.

    A tile that is computed and then masked shows up, since 0 * NaN is NaN.
    """
    positions_T = balanced_order.balanced_positions(LENGTH, 4)
    bad_T = np.isin(positions_T, np.arange(LENGTH)[bad])
    q_BTHK, k_BTHK, v_BTHK, d_out_BTHK, segments_BT = arrays("float32")
    k_BTHK, v_BTHK = k_BTHK.at[:, bad_T].set(jnp.nan), v_BTHK.at[:, bad_T].set(jnp.nan)
    one_document = jnp.zeros_like(segments_BT) if band_width is None else None  # covers the program with segments
    with jax.set_mesh(mesh_of("context=4")):
        results, _ = run(with_gradients(on_the_ring(band_width)), q_BTHK, k_BTHK, v_BTHK, d_out_BTHK, one_document)
    finite = {name: np.isfinite(x).all(axis=(0, 2, 3)) for name, x in zip(("out", "dq"), results, strict=False)}
    return {name: sorted(positions_T[finite_T].tolist()) for name, finite_T in finite.items()}


def main() -> None:
    out, *names = sys.argv[1:]
    ring.MAX_TILE = 4
    results: dict[str, Any] = {"cases": {name: compare(name) for name in names if ":" in name}}
    if "order" in names:
        meshes = ("context=2,tensor=2,fsdp=2", "context=3,data=2", "context=8")
        results["order"] = {mesh: order(mesh) for mesh in meshes}
    if "poison" in names:
        results["poison"] = {"dense": poison(None, slice(48, None)), "banded": poison(6, slice(0, 24))}
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
