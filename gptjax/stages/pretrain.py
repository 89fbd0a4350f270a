"""Stage "pretrain": next-token prediction on packed documents, GPT-1 to GPT-3."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gptjax.checkpoint.state import Program
from gptjax.config import Config
from gptjax.data.pipeline import Corpus, open_corpus
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import processes
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.models import low_precision
from gptjax.models.attention_backends import check_backend
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import check_fit
from gptjax.stages.reading import reader
from gptjax.stages.registry import make_program, plain
from gptjax.training.held_out import held_out_means, perplexity
from gptjax.training.intervals import in_tokens
from gptjax.training.stage import Stage


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
    low_precision.check_device(config.model, mesh.devices.flat[0].platform)
    context = config.model.context_length
    corpus = processes.first_then_others(
        lambda: open_corpus(config.data, context_length=context, seed=config.seed, tokenizer=tokenizer)
    )
    prepared = {
        "tokenizer": corpus.tokenizer.fingerprint,
        "data.source": corpus.train.split.content,
        "data.validation_source": corpus.validation.split.content,
    }
    processes.check_same(prepared, "the names are hashes of the content; give all processes the same files")
    config = in_tokens(config.completed(corpus.tokenizer.vocab_size), corpus.train.split.num_tokens)
    check_fit(config, mesh)

    program, microbatch, read = make_program(config), config.sequences_per_microbatch, reader(config, mesh)
    if config.batch.total_tokens is not None:
        total_tokens = config.batch.total_tokens
    else:
        assert config.batch.epochs is not None  # config.check
        total_tokens = math.ceil(config.batch.epochs * corpus.train.split.num_tokens)
    max_tokens = config.evaluation.max_tokens
    max_batches = None if max_tokens is None else math.ceil(max_tokens / (microbatch * context))
    return Stage(
        program=program,
        tokenizer=corpus.tokenizer,
        total_tokens=total_tokens,
        batches=lambda start: read(corpus.train, start),
        evaluate=_evaluate(
            held_out_means(program.loss, lambda: read(corpus.validation, 0), microbatch, mesh, max_batches), corpus
        ),
        sample=_sample(program, corpus.tokenizer, mesh) if config.evaluation.sample_tokens > 0 else None,
    )


def _evaluate(measure: Callable[[Any], dict[str, float]], corpus: Corpus) -> Callable[[Any], dict[str, float]]:
    """Held-out loss (nats a token), perplexity and bits per byte."""
    split = corpus.validation.split

    def evaluate(params: Any) -> dict[str, float]:
        nats = measure(params)["loss"]
        return {
            "loss": nats,
            "perplexity": perplexity(nats),
            # Of the whole split's tokens and bytes: exact when all of it is evaluated, close when a part is.
            "bits_per_byte": nats / math.log(2) * split.num_tokens / split.text_bytes,
        }

    return evaluate


def _sample(program: Program, tokenizer: Tokenizer, mesh: Mesh) -> Callable[[Any], str]:
    """The prompt and its continuation, the same draws every time."""
    config, model = program.config, GPT(program.config.model)
    settings = config.evaluation

    def sample(params: Any) -> str:
        # No second copy beside the training state.
        engine = Engine(model, plain(config, params), tokenizer, mesh, weights="stacked")
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
