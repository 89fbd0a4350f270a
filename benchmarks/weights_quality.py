"""Measures the loss with weights of lower precision: `python -m benchmarks.weights_quality --workdir=runs/demo`.

Scores the held-out text of the workdir's corpus with the code that generation uses, for each weight format.
"""

import itertools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from gptjax import cli
from gptjax.config import UserError
from gptjax.data.mixture import open_mixture
from gptjax.data.pipeline import batches
from gptjax.inference.weights import prepare
from gptjax.models.decoding import forward, logits
from gptjax.models.gpt import GPT
from gptjax.stages.trained_model import load_model

FORMS: tuple[Any, ...] = ("as_given", "bfloat16", "int8")
BATCH_SIZE = 8


def score(model: GPT, params: Any, batch: dict[str, np.ndarray]) -> tuple[jax.Array, jax.Array]:
    """Returns the nats of each target and the most probable token, (B, T) each."""
    x_BTD, _ = forward(model, params, jnp.asarray(batch["tokens"]))
    logits_BTV = logits(model, params, x_BTD)
    target_BT1 = jnp.asarray(batch["targets"])[..., None]
    nats_BT = jax.nn.logsumexp(logits_BTV, axis=-1) - jnp.take_along_axis(logits_BTV, target_BT1, axis=-1)[..., 0]
    return nats_BT * jnp.asarray(batch["weights"]), jnp.argmax(logits_BTV, axis=-1)


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("needs --workdir=DIR, such as --workdir=runs/demo")
    trained = load_model(Path(WORKDIR.value))
    config, context = trained.config, trained.model.config.context_length
    mixture = open_mixture(config.data, context_length=context, seed=config.seed, tokenizer=trained.tokenizer)
    splits = [batches(corpus.validation, start=0, batch_size=BATCH_SIZE, prefetch=2) for corpus in mixture.corpora]
    each = -(-BATCHES.value // len(splits))
    held_out = [batch.arrays for read in splits for batch in itertools.islice(read, each)]
    targets = sum(float(batch["weights"].sum()) for batch in held_out)
    print(f"{targets:,.0f} held-out tokens\n{'weights':10} {'bytes':>12} {'nats/token':>11} {'same top token':>15}")
    top_BT: list[np.ndarray] = []
    for form in FORMS:
        model, params = prepare(trained.model, trained.params, form)
        step = jax.jit(lambda params, batch, model=model: score(model, params, batch))
        scores = [jax.device_get(step(params, batch)) for batch in held_out]
        nats = sum(float(nats_BT.sum(dtype=np.float64)) for nats_BT, _ in scores) / targets
        top_BT = top_BT or [top for _, top in scores]
        same = np.mean([np.mean(top == first) for (_, top), first in zip(scores, top_BT, strict=True)])
        size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        print(f"{form:10} {size:12,} {nats:11.4f} {same:15.4f}")


if __name__ == "__main__":
    WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a run.")
    BATCHES = flags.DEFINE_integer("batches", 64, f"Batches of {BATCH_SIZE} sequences, at most.", lower_bound=1)
    cli.run(main)
