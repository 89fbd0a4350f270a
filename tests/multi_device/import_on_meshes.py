"""Imports models with rotary positions on several meshes: `import_on_meshes.py OUT.json data=8 fsdp=4,data=2 ...`.

Writes {model: {"one" or mesh: {"error": largest difference of a logit from one device's, "share": of the largest
parameter that a device holds, "greedy": tokens}}}, and for one device "size", the largest logit.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np

from gptjax import config as c
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.interop.huggingface import load_pretrained
from gptjax.parallel.mesh import make_mesh
from tests.interop.rotary_models import model, tensors, write, yarn

ROWS, CONTEXT, NEW = 8, 64, 20
# Two heads of keys and values, which are fewer than tensor=4 has shards.
SIZES = {"vocab_size": 264, "max_position_embeddings": CONTEXT, "intermediate_size": 32}
MODELS = {
    "gpt_oss": model(
        *("gpt_oss", 32, 2, 4, 2, 12),
        **SIZES,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=9,
        rope_parameters=yarn(4.0, 16, rope_theta=100.0, truncate=False),
    ),
    "qwen3": model(
        *("qwen3", 32, 2, 4, 2, 12),
        **SIZES,
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=7,
        max_window_layers=1,
    ),
}


def run(source: Path, mesh: jax.sharding.Mesh) -> dict[str, Any]:
    gpt, params = load_pretrained(source, mesh=mesh)
    tokens_BT = np.random.default_rng(1).integers(0, 257, (ROWS, CONTEXT)).astype(np.int32)
    with jax.set_mesh(mesh):
        logits_BTV = np.asarray(jax.jit(lambda p, t: gpt.apply({"params": p}, t))(params, tokens_BT))
    engine = Engine(gpt, params, BytesTokenizer(), mesh)
    greedy = engine.generate(
        [row[:length] for row, length in zip(tokens_BT, (3, 30), strict=False)],
        NEW,
        Sampling(temperature=0),
        ignore_end_of_text=True,
    )
    largest = max(jax.tree.leaves(params["layers"]), key=lambda leaf: leaf.size)
    return {
        "logits": logits_BTV,
        "share": largest.addressable_shards[0].data.size / largest.size,
        "greedy": [completion.tokens.tolist() for completion in greedy],
    }


def main() -> None:
    out, *meshes = sys.argv[1:]
    results: dict[str, Any] = {}
    for name, config in MODELS.items():
        with tempfile.TemporaryDirectory() as parent:
            source = write(Path(parent) / name, config, tensors(config))
            found = {"one": run(source, make_mesh(c.MeshConfig(), jax.devices()[:1]))}
            for spec in meshes:
                axes = {"data": 1} | {axis: int(size) for axis, size in (part.split("=") for part in spec.split(","))}
                found[spec] = run(source, make_mesh(c.MeshConfig(**axes)))
        one_BTV = found["one"]["logits"]
        found["one"]["size"] = float(np.abs(one_BTV).max())
        for result in found.values():
            result["error"] = float(np.abs(result.pop("logits") - one_BTV).max())
        results[name] = found
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
