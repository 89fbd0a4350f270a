"""Compiles attention and its gradients for four TPU v5e that need not be there: `compile_for_tpu.py OUT.json`.

Writes {name: {"kernels": Pallas kernels, "temp_bytes": of a device's memory, "collectives": their names}}.
"""

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import NamedSharding

from gptjax.config import GPTConfig, MeshConfig
from gptjax.models.attention_backends import attention
from gptjax.parallel.mesh import make_mesh, partition_spec

ROWS, LENGTH, HEADS = 8, 2048, 8
COLLECTIVES = "all-gather|all-reduce|all-to-all|reduce-scatter|collective-permute"


def compiled(mesh: jax.sharding.Mesh, config: GPTConfig, kind: str, packed: bool, kept: str | None) -> dict[str, Any]:
    """Compiles a layer and its gradients; `kept`: the name that rematerialisation keeps, None: it keeps everything."""

    def layer(q_BTHK: jax.Array, k_BTHK: jax.Array, v_BTHK: jax.Array, segments_BT: jax.Array | None) -> jax.Array:
        # What comes before and after needs recomputation too, as a layer's products do.
        return jnp.square(attention(config, kind, jnp.square(q_BTHK), k_BTHK, v_BTHK, segments_BT, None))

    if kept is not None:
        layer = jax.checkpoint(layer, policy=jax.checkpoint_policies.save_only_these_names(kept))

    def forward_and_backward(segments_BT: jax.Array | None, *qkv: jax.Array) -> Any:
        out_BTHK, pull_back = jax.vjp(lambda *qkv: layer(*qkv, segments_BT), *qkv)
        return out_BTHK, pull_back(out_BTHK)

    def array(shape: tuple[int, ...], dtype: Any, *logical: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, partition_spec(logical)))

    x_BTHK = array((ROWS, LENGTH, HEADS, config.head_dim), jnp.bfloat16, "batch", None, "heads", None)
    segments_BT = array((ROWS, LENGTH), jnp.int32, "batch", None) if packed else None
    with jax.set_mesh(mesh):
        program = jax.jit(forward_and_backward).lower(segments_BT, x_BTHK, x_BTHK, x_BTHK).compile()
    text = program.as_text()
    return {
        "kernels": text.count('custom_call_target="tpu_custom_call"'),
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "collectives": sorted(set(re.findall(rf"\b({COLLECTIVES})(?:-start)?\(", text))),
    }


def main() -> None:
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = make_mesh(MeshConfig(data=2, tensor=2), devices)
    config = GPTConfig(num_heads=HEADS, embed_dim=HEADS * 64, context_length=LENGTH, band_width=256)
    results = {
        "xla": compiled(mesh, dataclasses.replace(config, attention_backend="xla"), "dense", False, None),
        "not kept": compiled(mesh, config, "dense", False, "another"),
        "dense 64": compiled(mesh, config, "dense", False, "attention"),
    }
    for head_dim, kind, packed in ((80, "banded", False), (96, "dense", True), (128, "banded", True)):
        wide = dataclasses.replace(config, embed_dim=HEADS * head_dim)
        results[f"{kind} {head_dim}"] = compiled(mesh, wide, kind, packed, None)
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
