"""Scores some requests with one tiny model on several meshes: `score_on_meshes.py OUT.json data=8 fsdp=4,data=2 ...`.

Writes {"one" or mesh: {"logprobs": [...], "greedy": [...], "fingerprint": of the weights, "rows": of a batch}}.
"""

import json
import sys
from pathlib import Path

import jax
import numpy as np

from gptjax import config as c
from gptjax.evaluation.scoring import Scorer, ScoringRequest
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import make_mesh

MODEL = c.GPTConfig(
    vocab_size=264, context_length=32, num_layers=2, num_heads=4, embed_dim=32, kernel_init_std=0.3, dtype="float32"
)


def score(mesh: jax.sharding.Mesh) -> dict:
    model = GPT(MODEL)
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: jax.device_put(rng.normal(0, 0.3, leaf.shape).astype(np.float32), leaf.sharding),
        abstract_params(model, mesh),
    )
    lengths = [5, 12, 33, 40, 20, 33, 9, 30, 2, 17, 31]
    requests = [ScoringRequest(rng.integers(0, 264, n).astype(np.int32), min(1 + n // 2, 32, n - 1)) for n in lengths]
    scorer = Scorer(model, params, mesh, batch_size=2)
    scores = scorer.scores(requests)
    return {
        "logprobs": [score.logprob for score in scores],
        "greedy": [score.is_greedy for score in scores],
        "fingerprint": scorer.fingerprint(),
        "rows": scorer.plan(requests)[0].rows,
    }


def main() -> None:
    out, *meshes = sys.argv[1:]
    results = {"one": score(make_mesh(c.MeshConfig(), jax.devices()[:1]))}
    for name in meshes:
        axes = {"data": 1} | {axis: int(size) for axis, size in (part.split("=") for part in name.split(","))}
        results[name] = score(make_mesh(c.MeshConfig(**axes)))
    Path(out).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
