"""Attention on a mesh of 4 simulated devices by the splash kernels, interpreted: `attend_on_meshes.py OUT.json`.

Writes {case: {"error": largest difference to one device's definition, gradients included, "kernels": whether kernels
computed it, "gathers": whether any device was sent others' rows or heads}}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig, MeshConfig
from gptjax.models import attention_backends
from gptjax.models.attention_backends import attention
from gptjax.models.dot_product import attention_mask, dot_product_attention
from gptjax.parallel.mesh import constrain, make_mesh

LENGTH, HEADS, HEAD_DIM, BAND = 128, 2, 16, 40
CONFIG = GPTConfig(num_heads=HEADS, embed_dim=HEADS * HEAD_DIM, band_width=BAND, dtype="float32")


def compare(mesh: MeshConfig, rows: int) -> dict[str, Any]:
    qkv = [jax.random.normal(jax.random.key(i), (rows, LENGTH, HEADS, HEAD_DIM)) for i in range(3)]
    segments_BT = jnp.arange(LENGTH)[None] // (20 + jnp.arange(rows)[:, None])
    weights_BTHK = jax.random.normal(jax.random.key(3), qkv[0].shape)

    def definition(*qkv: jax.Array) -> jax.Array:
        mask_BHTS = attention_mask("banded", BAND, LENGTH, segments_BT)
        return dot_product_attention(*qkv, mask_BHTS, precision="highest", scale=HEAD_DIM**-0.5)

    def on_mesh(*qkv: jax.Array) -> jax.Array:
        return attention(CONFIG, "banded", *qkv, segments_BT, None)

    def both(function: Any, place: Any) -> Any:
        def value_and_gradients(*qkv: jax.Array) -> Any:
            out_BTHK, pull_back = jax.vjp(function, *(place(x_BTHK) for x_BTHK in qkv))
            return jax.tree.map(place, (out_BTHK, *pull_back(place(weights_BTHK))))

        return jax.jit(value_and_gradients)

    expected = both(definition, lambda x_BTHK: x_BTHK)(*qkv)
    even = rows % (mesh.data * mesh.fsdp) == 0
    with jax.set_mesh(make_mesh(mesh)):
        place = (lambda x_BTHK: constrain(x_BTHK, "batch", "length", "heads", None)) if even else lambda x_BTHK: x_BTHK
        program = both(on_mesh, place)
        kernels = "pallas_call" in str(jax.make_jaxpr(program)(*qkv))
        compiled = program.lower(*qkv).compile()
        actual = compiled(*qkv)
    errors = [float(jnp.max(jnp.abs(a - b))) for a, b in zip(jax.device_get(actual), expected, strict=True)]
    return {"error": max(errors), "kernels": kernels, "gathers": "all-gather(" in compiled.as_text()}


def main() -> None:
    # Splash where a TPU would take it: a CPU never does.
    attention_backends.choose_backend = lambda *args: "splash"
    results = {
        "rows and heads": compare(MeshConfig(data=2, tensor=2), rows=4),
        "rows that do not divide": compare(MeshConfig(data=2, fsdp=2), rows=3),
        "positions": compare(MeshConfig(data=2, context=2), rows=4),
    }
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
