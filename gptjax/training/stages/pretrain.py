"""Stage "pretrain": next-token prediction on packed documents, GPT-1 to GPT-3."""

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data.pipeline import Corpus, PackedExamples, batches, open_corpus
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.models.gpt import GPT, head_embedding, hidden_states
from gptjax.parallel.mesh import batch_sharding, batch_shards, check_fit
from gptjax.training.loop import Stage
from gptjax.training.losses import cross_entropy, positions_per_chunk
from gptjax.training.state import Batch, Loss


def build(config: Config, mesh: Mesh, tokenizer: Tokenizer | None) -> Stage:
    """The stage on `mesh`; prepares the corpus when it is not in the cache.

    Args:
      tokenizer: of the run that goes on; None: the one that the config names.

    Raises:
      UserError: the corpus cannot be read or is too short, the model's vocabulary is smaller than the tokenizer's, or
        sizes do not divide over the mesh.
    """
    check_fit(config, mesh)
    context = config.model.context_length
    corpus = open_corpus(config.data, context_length=context, seed=config.seed, tokenizer=tokenizer)
    config = dataclasses.replace(config, model=config.model.with_vocabulary(corpus.tokenizer.vocab_size))
    check_fit(config, mesh)

    model, microbatch = GPT(config.model), config.sequences_per_microbatch
    loss, init_params = make_program(config, mesh)

    def read(examples: PackedExamples, start: int) -> Iterator[dict[str, np.ndarray]]:
        return batches(
            examples,
            start=start,
            batch_size=microbatch,
            process_index=jax.process_index(),
            process_count=jax.process_count(),
            prefetch=config.data.prefetch_batches,
        )

    if config.batch.total_tokens is not None:
        total_tokens = config.batch.total_tokens
    else:
        assert config.batch.epochs is not None  # config.check
        total_tokens = math.ceil(config.batch.epochs * corpus.train.split.num_tokens)
    max_tokens = config.evaluation.max_tokens
    max_batches = None if max_tokens is None else math.ceil(max_tokens / (microbatch * context))
    return Stage(
        config=config,
        tokenizer=corpus.tokenizer,
        total_tokens=total_tokens,
        init_params=init_params,
        loss=loss,
        batches=lambda start: read(corpus.train, start),
        evaluate=_evaluate(loss, lambda: read(corpus.validation, 0), max_batches, corpus, mesh),
        sample=_sample(config, model, corpus.tokenizer, mesh) if config.evaluation.sample_tokens > 0 else None,
    )


def make_program(config: Config, mesh: Mesh) -> tuple[Loss, Callable[[jax.Array], Any]]:
    """What is learned, but for data: the loss, and the initial parameters (boxed) of a key.

    Args:
      config: with the vocabulary filled in.
    """
    model = GPT(config.model)
    loss = make_loss(model, positions_per_chunk(config.sequences_per_microbatch // batch_shards(mesh)))

    def init_params(rng: jax.Array) -> Any:
        return model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"]  # the same for tokens of any shape

    return loss, init_params


def make_loss(model: GPT, chunk: int) -> Loss:
    """Cross entropy of the next token, `chunk` positions at a time."""

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array]:
        x_BTD = hidden_states(
            model,
            params,
            batch["tokens"],
            batch.get("segments"),
            batch.get("positions"),
            deterministic=rng is None,
            rngs=None if rng is None else {"dropout": rng},
        )
        head_VD, weights_BT = head_embedding(params), batch["weights"]
        nats = cross_entropy(x_BTD, head_VD, batch["targets"], weights_BT, chunk, model.config.precision)
        return nats, jnp.sum(weights_BT)

    return loss


def _evaluate(
    loss: Loss,
    read: Callable[[], Iterator[dict[str, np.ndarray]]],
    max_batches: int | None,
    corpus: Corpus,
    mesh: Mesh,
) -> Callable[[Any], dict[str, float]]:
    """Held-out loss (nats a token), perplexity and bits per byte of the first `max_batches`."""
    sharding, split = batch_sharding(mesh), corpus.validation.split
    sums_of = jax.jit(lambda params, batch: loss(params, batch, None))

    def evaluate(params: Any) -> dict[str, float]:
        sums = []
        for i, rows in enumerate(read()):
            if i == max_batches:
                break
            batch = {name: jax.make_array_from_process_local_data(sharding, array) for name, array in rows.items()}
            sums.append(sums_of(params, batch))
        total_nats, targets = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        nats = float(total_nats / targets)
        return {
            "loss": nats,
            "perplexity": math.exp(nats) if nats < 700 else math.inf,
            # Of the whole split's tokens and bytes: exact when all of it is evaluated, close when a part is.
            "bits_per_byte": nats / math.log(2) * split.num_tokens / split.text_bytes,
        }

    return evaluate


def _sample(config: Config, model: GPT, tokenizer: Tokenizer, mesh: Mesh) -> Callable[[Any], str]:
    """The prompt and its continuation, the same draws every time."""
    settings = config.evaluation

    def sample(params: Any) -> str:
        engine = Engine(model, params, tokenizer, mesh, weights="stacked")  # no second copy beside the training state
        prompt = np.concatenate([[tokenizer.end_of_text], tokenizer.encode(settings.sample_prompt)])
        completion = engine.generate(
            [prompt],
            settings.sample_tokens,
            Sampling(settings.sample_temperature, settings.sample_top_k),
            seeds=config.seed,
            ignore_end_of_text=True,
            overflow="slide",
        )
        return settings.sample_prompt + completion[0].text

    return sample
