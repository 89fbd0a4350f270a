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
from gptjax.models.attention_backends import check_backend
from gptjax.models.gpt import GPT, head_embedding, hidden_states
from gptjax.parallel import distributed, preemption
from gptjax.parallel.mesh import batch_sharding, check_fit
from gptjax.parallel.rows import global_array, process_rows
from gptjax.training.loop import Stage
from gptjax.training.losses import cross_entropy
from gptjax.training.state import Batch, Loss


def build(config: Config, mesh: Mesh, tokenizer: Tokenizer | None) -> Stage:
    """The stage on `mesh`; prepares the corpus when it is not in the cache.

    Args:
      tokenizer: of the run that goes on; None: the one that the config names.

    Raises:
      UserError: the corpus cannot be read or is too short, the model's vocabulary is smaller than the tokenizer's,
        sizes do not divide over the mesh, or the attention backend is not one of its devices.
    """
    check_fit(config, mesh)
    check_backend(config.model, mesh.devices.flat[0].platform, has_segments=config.data.packing == "segment")
    context = config.model.context_length
    corpus = distributed.first_then_others(
        lambda: open_corpus(config.data, context_length=context, seed=config.seed, tokenizer=tokenizer)
    )
    prepared = {
        "tokenizer": corpus.tokenizer.fingerprint,
        "data.source": corpus.train.split.content,
        "data.validation_source": corpus.validation.split.content,
    }
    distributed.check_same(prepared, "the names are hashes of the content; give all processes the same files")
    config = dataclasses.replace(config, model=config.model.with_vocabulary(corpus.tokenizer.vocab_size))
    check_fit(config, mesh)

    model, microbatch = GPT(config.model), config.sequences_per_microbatch
    loss, init_params = make_program(config)

    def read(examples: PackedExamples, start: int) -> Iterator[dict[str, np.ndarray]]:
        return batches(
            examples,
            start=start,
            batch_size=microbatch,
            rows=process_rows(batch_sharding(mesh), microbatch),
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
        evaluate=_evaluate(loss, lambda: read(corpus.validation, 0), microbatch, max_batches, corpus, mesh),
        sample=_sample(config, model, corpus.tokenizer, mesh) if config.evaluation.sample_tokens > 0 else None,
    )


def make_program(config: Config) -> tuple[Loss, Callable[[jax.Array], Any]]:
    """What is learned, but for data: the loss, and the initial parameters (boxed) of a key.

    Args:
      config: with the vocabulary filled in.
    """
    model = GPT(config.model)

    def init_params(rng: jax.Array) -> Any:
        return model.init(rng, jnp.zeros((1, 1), jnp.int32))["params"]  # the same for tokens of any shape

    return make_loss(model), init_params


def make_loss(model: GPT) -> Loss:
    """Cross entropy of the next token."""

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
        nats = cross_entropy(x_BTD, head_VD, batch["targets"], weights_BT, None, model.config.precision)
        return nats, jnp.sum(weights_BT)

    return loss


def _evaluate(
    loss: Loss,
    read: Callable[[], Iterator[dict[str, np.ndarray]]],
    batch_size: int,
    max_batches: int | None,
    corpus: Corpus,
    mesh: Mesh,
) -> Callable[[Any], dict[str, float]]:
    """Held-out loss (nats a token), perplexity and bits per byte of the first `max_batches`."""
    sharding, split = batch_sharding(mesh), corpus.validation.split
    rows = process_rows(sharding, batch_size)
    sums_of = jax.jit(lambda params, batch: loss(params, batch, None))

    def evaluate(params: Any) -> dict[str, float]:
        sums = []
        for i, local in enumerate(read()):
            if i == max_batches:
                break
            preemption.check()
            batch = {name: global_array(sharding, rows, array, batch_size) for name, array in local.items()}
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
