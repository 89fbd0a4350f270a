"""A model with the ingredients of gpt-oss on several meshes: `modern_on_meshes.py OUT.json MESH ...`.

Writes {mesh: {"loss": difference of the loss from that of one device, "gradient": largest difference of a gradient,
"decoded": largest difference of a logit after prefill and decoding, "expert_share": share of the experts' kernels that
a device holds, "exchanged": number of all-to-alls in the program, "sent": bytes of its largest collective permute}}.
"""

import json
import sys
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from gptjax import config as c
from gptjax.models.decoding import decode, logits, prefill, unstack
from gptjax.models.gpt import GPT, abstract_params, init_params
from gptjax.parallel.mesh import batch_sharding, make_mesh
from gptjax.planning.program_text import collectives
from gptjax.stages.pretrain import next_token_loss

MODEL = c.GPTConfig(
    vocab_size=64,
    context_length=32,
    num_layers=2,
    num_heads=8,
    num_kv_heads=2,
    head_width=4,
    embed_dim=16,
    ffw_dim=24,
    positions="rotary",
    yarn_factor=4.0,
    yarn_original_context=8,
    norm="rms",
    attention_sinks=True,
    attention_pattern=("banded", "dense"),
    band_width=9,
    value_embeddings="alternate",
    gated=True,
    activation="silu",
    gate_limit=7.0,
    up_offset=1.0,
    tied_head=False,
    num_experts=4,
    router_bias=True,
    balance_bias=True,
    router_balance_loss=0.1,
    router_z_loss=0.01,
    dtype="float32",
    expert_backend="grouped",
)
CONFIG = c.Config(model=MODEL, batch=c.BatchConfig(epochs=1.0, tokens_per_batch=8 * 32))
GPT_MODEL = GPT(MODEL)


def weights() -> Any:
    """Weights of which none is neutral, so that experts are used unequally."""
    leaves, tree = jax.tree.flatten(nn.unbox(jax.jit(lambda: init_params(GPT_MODEL, jax.random.key(0)))()))
    return jax.tree.unflatten(
        tree, [np.asarray(x + 0.2 * jax.random.normal(jax.random.key(i), x.shape)) for i, x in enumerate(leaves)]
    )


def batch() -> dict[str, np.ndarray]:
    tokens_BT = np.random.default_rng(0).integers(0, 64, (8, 32)).astype(np.int32)
    segments_BT = np.repeat(np.array([[1, 2, 0]], np.int32), [16, 11, 5], axis=1).repeat(8, axis=0)
    weights_BT = (segments_BT > 0).astype(np.float32)
    return {"tokens": tokens_BT, "targets": np.roll(tokens_BT, -1, 1), "segments": segments_BT, "weights": weights_BT}


def loss_and_gradient(params: Any, batch: Any) -> tuple[jax.Array, Any]:
    return jax.value_and_grad(lambda params: next_token_loss(CONFIG)(params, batch, jax.random.key(1))[0])(params)


def decoded(params: Any, tokens_BT: jax.Array) -> jax.Array:
    """Logits of three tokens after a prompt of five, (3, B, V)."""
    params, rows = unstack(MODEL, params), len(tokens_BT)
    x_BD, cache = prefill(GPT_MODEL, params, tokens_BT[:, :5], jnp.full(rows, 5), 8)
    found = [logits(GPT_MODEL, params, x_BD)]
    for i in (5, 6):
        x_BD, cache = decode(GPT_MODEL, params, cache, tokens_BT[:, i], jnp.full(rows, i))
        found.append(logits(GPT_MODEL, params, x_BD))
    return jnp.stack(found)


def largest(found: Any, expected: Any) -> float:
    differences = jax.tree.map(lambda a, b: float(np.max(np.abs(np.asarray(a) - np.asarray(b)))), found, expected)
    return max(jax.tree.leaves(differences))


def on_mesh(sizes: str, expected: Any) -> dict[str, Any]:
    names = dict(part.split("=") for part in sizes.split(","))
    mesh = make_mesh(c.MeshConfig(**{"data": 1} | {name: int(size) for name, size in names.items()}))
    placement = jax.tree.map(lambda leaf: leaf.sharding, abstract_params(GPT_MODEL, mesh))
    params = jax.device_put(weights(), placement)
    with jax.set_mesh(mesh):
        rows = jax.device_put(batch(), batch_sharding(mesh))
        program = jax.jit(loss_and_gradient, out_shardings=(None, placement)).lower(params, rows).compile()
        loss, gradient = program(params, rows)
        logits_NBV = jax.jit(decoded)(params, batch()["tokens"][:3])
    sent = collectives(program.as_text(), unknown_trip_count=1)
    kernel = params["layers"]["block_0"]["mlp"]["experts"]["up"]["kernel"]
    return {
        "loss": abs(float(loss) - float(expected[0])),
        "gradient": largest(gradient, expected[1]),
        "decoded": largest(logits_NBV, expected[2]),
        "expert_share": kernel.addressable_shards[0].data.size / kernel.size,
        "exchanged": program.as_text().count(" all-to-all("),
        "sent": max((found.payload for found in sent if found.kind == "collective-permute"), default=0),
    }


def main() -> None:
    expected = (*jax.jit(loss_and_gradient)(weights(), batch()), jax.jit(decoded)(weights(), batch()["tokens"][:3]))
    results = {sizes: on_mesh(sizes, expected) for sizes in sys.argv[2:]}
    Path(sys.argv[1]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
