"""Generates with one tiny model on several meshes: `decode_on_meshes.py OUT.json data=8 fsdp=4,data=2 ...`.

Writes {"one" or mesh: {"error": largest difference of a logit between decoding and the whole forward pass,
"tokens": greedy, "logprobs": of them, "beams": tokens of each, "scores": of the beams, "sampled": tokens,
"batched": tokens, greedy, by continuous batching, "pages_share": of the first layer's pages that a device holds,
"programs": decoding programs that it compiled, "share": of the first layer's cache that a device holds}}.
"""

import json
import sys
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import config as c
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference import batch_programs
from gptjax.inference.batching import BatchedEngine
from gptjax.inference.beam import beam_search
from gptjax.inference.continuous import complete_prompts
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.models.decoding import decode, logits, prefill, unstack
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import batch_shards, make_mesh

MODEL = GPT(
    c.GPTConfig(
        vocab_size=264,
        context_length=32,
        num_layers=2,
        num_heads=4,
        embed_dim=16,
        attention_pattern=("dense", "banded"),
        band_width=5,
        dtype="float32",
    )
)
NEW = 12


def params_on(mesh: jax.sharding.Mesh) -> Any:
    """The same large random weights on any mesh: what is likeliest differs from position to position."""
    rng = np.random.default_rng(0)

    def draw(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
        table, name = path[0].key, path[-1].key
        std = {"kernel": 0.5, "embedding": 1.0 if table == "position_embedding" else 0.3, "scale": 0.1, "bias": 0.1}[
            name
        ]
        return jax.device_put(rng.normal(name == "scale", std, leaf.shape).astype(np.float32), leaf.sharding)

    return jax.tree_util.tree_map_with_path(draw, abstract_params(MODEL, mesh))


def decoding_error(params: Any, rows: int) -> tuple[float, float]:
    """The error of decoding at all positions after prompts of several lengths, and the cache's share of a device."""
    rng = np.random.default_rng(1)
    context = MODEL.config.context_length
    tokens_BT = rng.integers(0, 257, (rows, context)).astype(np.int32)
    whole_BTV = np.asarray(jax.jit(lambda tokens: MODEL.apply({"params": params}, tokens))(tokens_BT))
    layers = unstack(MODEL.config, params)
    read = jax.jit(partial(prefill, MODEL, slots=context))
    step, head = jax.jit(partial(decode, MODEL)), jax.jit(partial(logits, MODEL))
    rows_B, lengths_B = np.arange(rows), rng.integers(1, 16, rows).astype(np.int32)
    x_BD, cache = read(layers, tokens_BT[:, :16], lengths_B)
    keys = cache[0].keys_BHSK
    error = 0.0
    for position_B in (lengths_B + np.int32(i) for i in range(context)):
        error = max(error, float(np.abs(head(layers, x_BD) - whole_BTV[rows_B, position_B - 1]).max()))
        if position_B.max() == context:
            break
        x_BD, cache = step(layers, cache, tokens_BT[rows_B, position_B], position_B)
    return error, keys.addressable_shards[0].data.size / keys.size


def run(mesh: jax.sharding.Mesh) -> dict[str, Any]:
    params = params_on(mesh)
    with jax.set_mesh(mesh):
        error, share = decoding_error(params, max(4, batch_shards(mesh)))
    engine = Engine(MODEL, params, BytesTokenizer(), mesh)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(0, 257, length) for length in (1, 17, 4)]  # as many as divide over no mesh
    greedy = engine.generate(prompts, NEW, Sampling(temperature=0))
    sampled = engine.generate(prompts, NEW, Sampling(temperature=0.7, top_p=0.9), seeds=5)
    beams = [beam for found in beam_search(engine, prompts, NEW, num_beams=3, num_return=2) for beam in found]
    batched = BatchedEngine(MODEL, params, BytesTokenizer(), mesh, rows=4, chunk=8, deterministic=True)
    programs = batch_programs.decode_rows._cache_size()
    completions = list(complete_prompts(batched, prompts, NEW, Sampling(temperature=0)))
    keys = batched._state.cache[0].keys_NHCK
    return {
        "batched": [completion.tokens.tolist() for completion in completions],
        "pages_share": keys.addressable_shards[0].data.size / keys.size,
        "programs": batch_programs.decode_rows._cache_size() - programs,
        "error": error,
        "share": share,
        "tokens": [completion.tokens.tolist() for completion in greedy],
        "logprobs": [completion.logprobs.tolist() for completion in greedy],
        "sampled": [completion.tokens.tolist() for completion in sampled],
        "beams": [beam.completion.tokens.tolist() for beam in beams],
        "scores": [beam.score for beam in beams],
    }


def main() -> None:
    out, *meshes = sys.argv[1:]
    results = {"one": run(make_mesh(c.MeshConfig(), jax.devices()[:1]))}
    for name in meshes:
        axes = {"data": 1} | {axis: int(size) for axis, size in (part.split("=") for part in name.split(","))}
        results[name] = run(make_mesh(c.MeshConfig(**axes)))
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
