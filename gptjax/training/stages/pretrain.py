"""Stage "pretrain": next-token prediction on packed documents, GPT-1 to GPT-3."""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data.pipeline import PackedExamples, batches, open_corpus
from gptjax.data.tokenizers import Tokenizer
from gptjax.inference.sampling import generate
from gptjax.models.gpt import GPT, head_embedding, hidden_states
from gptjax.parallel.mesh import batch_sharding, batch_shards, check_fit
from gptjax.training.loop import Stage
from gptjax.training.losses import cross_entropy, positions_per_chunk
from gptjax.training.state import Batch


def build(config: Config, mesh: Mesh, tokenizer: Tokenizer | None) -> Stage:
    """The stage on `mesh`; prepares the corpus when it is not in the cache.

    Args:
      tokenizer: of the run that goes on; None: the one that the config names.

    Raises:
      UserError: the corpus cannot be read or is too short, the model's vocabulary is smaller than the tokenizer's, or
        sizes do not divide over the mesh.
    """
    check_fit(config, mesh)
    corpus = open_corpus(config.data, context_length=config.model.context_length, seed=config.seed, tokenizer=tokenizer)
    config = dataclasses.replace(config, model=config.model.with_vocabulary(corpus.tokenizer.vocab_size))
    check_fit(config, mesh)
    model = GPT(config.model)
    context = config.model.context_length
    microbatch = config.batch.microbatch_size or config.batch.tokens_per_batch // context
    chunk = positions_per_chunk(microbatch // batch_shards(mesh))

    def init_params(rng: jax.Array) -> Any:
        return model.init(rng, jnp.zeros((microbatch, context), jnp.int32))["params"]

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
        total = cross_entropy(x_BTD, head_VD, batch["targets"], weights_BT, chunk, config.model.precision)
        return total, jnp.sum(weights_BT)

    def training_batches(start: int) -> Iterator[dict[str, np.ndarray]]:
        return _process_batches(corpus.train, start, microbatch, config.data.prefetch_batches)

    evaluation_loss = jax.jit(lambda params, batch: loss(params, batch, None))
    sharding = batch_sharding(mesh)

    def evaluate(params: Any) -> dict[str, float]:
        limit, held_out = config.evaluation.max_tokens, corpus.validation.split
        limit = None if limit is None else math.ceil(limit / (microbatch * context))
        sums = []
        for i, rows in enumerate(_process_batches(corpus.validation, 0, microbatch, config.data.prefetch_batches)):
            if i == limit:
                break
            sums.append(evaluation_loss(params, _to_global(rows, sharding)))
        total_nats, targets = np.asarray(jax.device_get(sums), np.float64).sum(axis=0)
        nats = float(total_nats / targets)
        return {
            "loss": nats,
            "perplexity": math.exp(nats) if nats < 700 else math.inf,
            # Of the whole split's tokens and bytes: exact when all of it is evaluated, close when a part is.
            "bits_per_byte": nats / math.log(2) * held_out.num_tokens / held_out.text_bytes,
        }

    def sample(params: Any) -> str:
        settings, tokenizer = config.evaluation, corpus.tokenizer
        prompt = np.concatenate([[tokenizer.end_of_text], tokenizer.encode(settings.sample_prompt)])
        tokens = generate(
            model,
            params,
            prompt,
            settings.sample_tokens,
            seed=config.seed,
            temperature=settings.sample_temperature,
            top_k=settings.sample_top_k,
            batch_size=batch_shards(mesh),  # every shard of the mesh needs a row; the first is shown
        )[0]
        return settings.sample_prompt + tokenizer.decode(tokens)

    if config.batch.total_tokens is not None:
        total_tokens = config.batch.total_tokens
    else:
        assert config.batch.epochs is not None  # config.check
        total_tokens = math.ceil(config.batch.epochs * corpus.train.split.num_tokens)
    return Stage(
        config=config,
        tokenizer=corpus.tokenizer,
        total_tokens=total_tokens,
        init_params=init_params,
        loss=loss,
        batches=training_batches,
        evaluate=evaluate,
        sample=sample if config.evaluation.sample_tokens > 0 else None,
    )


def _process_batches(
    examples: PackedExamples, start: int, batch_size: int, prefetch: int
) -> Iterator[dict[str, np.ndarray]]:
    """This process's rows of the batches from example `start` on."""
    return batches(
        examples,
        start=start,
        batch_size=batch_size,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        prefetch=prefetch,
    )


def _to_global(rows: dict[str, np.ndarray], sharding: jax.sharding.NamedSharding) -> Batch:
    return {name: jax.make_array_from_process_local_data(sharding, array) for name, array in rows.items()}
