"""Stage "pretrain": next-token prediction on packed documents, GPT-1 to GPT-3."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config
from gptjax.data.pipeline import Corpus, open_corpus
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import processes
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.losses.cross_entropy import cross_entropy, logits_dtype
from gptjax.models import low_precision
from gptjax.models.attention_backends import check_backend
from gptjax.models.gpt import GPT, head_embedding, hidden_states_and_routers, init_params
from gptjax.parallel.mesh import check_fit, platform
from gptjax.stages.definition import Definition
from gptjax.stages.reading import reader
from gptjax.training.held_out import held_out_means, perplexity
from gptjax.training.intervals import in_tokens
from gptjax.training.objective import Batch, Loss, Measures, Objective
from gptjax.training.stage import Stage, describe_data


def next_token_loss(config: Config) -> Loss:
    """Cross entropy of the next token, in nats, summed over targets (Radford et al. 2018, equation 1).

    In training, the z-loss and the routers' losses are added, where their coefficients are above 0.
    """
    model, settings = GPT(config.model), config.model

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        x_BTD, routers = hidden_states_and_routers(
            model,
            params,
            batch["tokens"],
            batch.get("segments"),
            batch.get("positions"),
            deterministic=rng is None,
            rngs=None if rng is None else {"dropout": rng},
        )
        weights_BT, is_training = batch["weights"], rng is not None
        nats = cross_entropy(
            x_BTD,
            head_embedding(params),
            batch["targets"],
            weights_BT,
            None,
            settings.precision,
            logits_dtype(settings, platform()) if is_training else "float32",  # held-out losses are exact
            settings.logit_soft_cap,
            settings.z_loss if is_training else 0.0,
        )
        weight = jnp.sum(weights_BT)
        if routers is None or not is_training:
            return nats, weight, {}
        added = settings.router_balance_loss * routers.balance + settings.router_z_loss * routers.z
        measures = {
            "cross_entropy": nats,
            "router_balance": weight * routers.balance,
            "router_z": weight * routers.z,
            "busiest_expert": weight * jnp.max(routers.load_E) * settings.num_experts,
        }
        return nats + weight * added, weight, measures

    return loss


DEFINITION = Definition(
    parameters=lambda config: ParameterSpec(config, lambda rng: init_params(GPT(config.model), rng)),
    loss=next_token_loss,
    complete=lambda config, tokenizer, workdir: config.completed(tokenizer.vocab_size),
    adds_tokens=False,
)


def build(config: Config, mesh: Mesh, tokenizer: Tokenizer | None, define: Callable[[Config], Objective]) -> Stage:
    """The stage on `mesh`; prepares the corpus when it is not in the cache.

    Args:
      tokenizer: of the run that resumes; None: the one that the config names.
      define: complete config -> parameters and loss.

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

    objective, microbatch, read = define(config), config.sequences_per_microbatch, reader(config, mesh)
    if config.batch.total_tokens is not None:
        total_tokens = config.batch.total_tokens
    else:
        assert config.batch.epochs is not None  # config.check
        total_tokens = math.ceil(config.batch.epochs * corpus.train.split.num_tokens)
    train, held_out = corpus.train.split, corpus.validation.split.num_documents
    max_tokens = config.evaluation.max_tokens
    max_batches = None if max_tokens is None else math.ceil(max_tokens / (microbatch * context))
    return Stage(
        objective=objective,
        tokenizer=corpus.tokenizer,
        total_tokens=total_tokens,
        batches=lambda start, run: read(corpus.train, start),
        evaluate=_evaluate(
            held_out_means(objective.loss, lambda: read(corpus.validation, 0), microbatch, mesh, max_batches), corpus
        ),
        sample=_sample(objective.parameters, corpus.tokenizer, mesh) if config.evaluation.sample_tokens > 0 else None,
        description=describe_data("documents", train.num_documents, held_out, train.num_tokens, total_tokens),
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


def _sample(parameters: ParameterSpec, tokenizer: Tokenizer, mesh: Mesh) -> Callable[[Any], str]:
    """The prompt and its continuation, always with the same sampling seed."""
    config, model = parameters.config, GPT(parameters.config.model)
    settings = config.evaluation

    def sample(params: Any) -> str:
        # No second copy beside the training state.
        engine = Engine(model, parameters.merge(params), tokenizer, mesh, weights="stacked")
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
