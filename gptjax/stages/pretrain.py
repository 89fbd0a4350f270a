"""Stage "pretrain": next-token prediction on packed documents, GPT-1 to GPT-3, or another value of data.objective."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config, require
from gptjax.data.mixture import Mixture, open_mixture
from gptjax.data.pipeline import ExampleSource, Microbatch
from gptjax.data.tokenizers import Tokenizer
from gptjax.distributed import processes
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.losses.cross_entropy import cross_entropy, logits_dtype
from gptjax.models import low_precision
from gptjax.models.attention_backends import check_backend
from gptjax.models.gpt import GPT, head_embedding, hidden_states_and_routers, init_params
from gptjax.parallel.mesh import check_fit, platform
from gptjax.stages import pretraining_objectives as objectives
from gptjax.stages.definition import Definition
from gptjax.stages.mixed_data import announcing_repeats, describe
from gptjax.stages.reading import reader
from gptjax.training.held_out import held_out_means, perplexity
from gptjax.training.intervals import in_tokens
from gptjax.training.objective import Batch, Loss, Measures, Objective
from gptjax.training.stage import Run, Stage


def next_token_loss(config: Config) -> Loss:
    """Cross entropy of the targets, in nats, weighted and summed (Radford et al. 2018, equation 1).

    The targets are the next tokens, or the masked ones with data.objective=masked, whose attention the model then has.
    In training, the z-loss and the routers' losses are added, where their coefficients are above 0.
    """
    model, settings = GPT(objectives.attending(config)), config.model

    def loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        weights_BT, is_training = batch["weights"], rng is not None
        x_BTD, routers = hidden_states_and_routers(
            model,
            params,
            batch["tokens"],
            batch.get("segments"),
            batch.get("positions"),
            deterministic=rng is None,
            is_token_BT=None if "segments" in batch else weights_BT > 0,  # without segments all tokens are targets
            images_BNX=batch.get("images"),
            rngs=None if rng is None else {"dropout": rng},
        )
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
        assert settings.num_experts is not None
        measures = {
            "cross_entropy": nats,
            "router_balance": weight * routers.balance,
            "router_z": weight * routers.z,
            "busiest_expert": weight * jnp.max(routers.load_E) * settings.num_experts,
        }
        return nats + weight * added, weight, measures

    return loss


def check(config: Config) -> None:
    """Raises UserError when the config has settings that pretraining does not support."""
    objectives.check(config)
    require(
        config.model.vision.encoder == "none" or config.model.vision.image_token is not None,
        f"model.vision.encoder={config.model.vision.encoder}: stage pretrain reads text alone, stage sft also images, "
        "with and without init_from: set stage=sft",
    )


DEFINITION = Definition(
    parameters=lambda config: ParameterSpec(config, lambda rng: init_params(GPT(config.model), rng)),
    loss=next_token_loss,
    complete=lambda config, tokenizer, workdir: config.completed(tokenizer.vocab_size),
    check=check,
    adds_tokens=False,
    rows_of_context=True,
)


def build(
    config: Config, mesh: Mesh, tokenizer: Tokenizer | None, make_objective: Callable[[Config], Objective]
) -> Stage:
    """The stage on `mesh`; prepares the corpus when it is not in the cache.

    Args:
      tokenizer: of the run that resumes; None: the one that the config names.
      make_objective: complete config -> parameters and loss.

    Raises:
      UserError: the corpus cannot be read or is too short, the model's vocabulary is smaller than the tokenizer's,
        sizes do not divide over the mesh, or the attention backend is not one of its devices.
    """
    check_fit(config, mesh)
    check_backend(config.model, mesh.devices.flat[0].platform, has_segments=config.data.packing == "segment")
    low_precision.check_device(config.model, mesh.devices.flat[0].platform)
    context = config.model.context_length
    mixture = processes.first_then_others(
        lambda: open_mixture(config.data, context_length=context, seed=config.seed, tokenizer=tokenizer)
    )
    tokenizer = objectives.extended(config, mixture.tokenizer, resumes=tokenizer is not None)
    prepared = {"tokenizer": tokenizer.fingerprint}
    for part, corpus in zip(mixture.parts, mixture.corpora, strict=True):
        prepared[f"data.source {part.data.source}"] = corpus.train.split.content
        prepared[f"held out of {part.data.source}"] = corpus.validation.split.content
    processes.check_same(prepared, "the names are hashes of the content; give all processes the same files")
    config = in_tokens(config.completed(tokenizer.vocab_size), mixture.num_tokens)
    check_fit(config, mesh)
    training_examples = objectives.examples(config, mixture.train, tokenizer, config.seed)

    objective, microbatch, read = make_objective(config), config.sequences_per_microbatch, reader(config, mesh)
    if config.batch.total_tokens is not None:
        total_tokens = config.batch.total_tokens
    else:
        assert config.batch.epochs is not None  # config.check
        total_tokens = math.ceil(config.batch.epochs * mixture.num_tokens)
    max_tokens = config.evaluation.max_tokens

    def batches(start: int, run: Run | None) -> Iterator[Microbatch]:
        found = read(training_examples, start)
        if run is None or not config.data.mixture:
            return found
        return announcing_repeats(found, mixture, start, microbatch, run)

    each = None if max_tokens is None else math.ceil(max_tokens / len(mixture.parts) / (microbatch * context))
    return Stage(
        objective=objective,
        tokenizer=tokenizer,
        total_tokens=total_tokens,
        batches=batches,
        evaluate=_evaluate(
            config,
            mixture,
            tokenizer,
            lambda examples: held_out_means(objective.loss, lambda: read(examples, 0), microbatch, mesh, each),
        ),
        sample=_sample(objective.parameters, tokenizer, mesh) if _has_samples(config) else None,
        description={**objectives.describe(config, tokenizer), **describe(mixture, total_tokens, context)},
        epochs=mixture.epochs if config.data.mixture else None,
    )


def _evaluate(
    config: Config,
    mixture: Mixture,
    tokenizer: Tokenizer,
    means: Callable[[ExampleSource], Callable[[Any], dict[str, float]]],
) -> Callable[[Any], dict[str, float]]:
    """The held-out loss of the objective (nats a target) and its perplexity, and what else the objective measures.

    causal: bits per byte. fill_in_the_middle: the loss and bits per byte of the text in its order, and the loss of
    middles where every document is split. Of a mixture, all are those of text with the weights of data.mixture, and the
    loss of each source is added.

    Args:
      means: examples -> all parameters -> {"loss": ...}, see `held_out_means`.
    """
    name = config.data.objective

    def measures(held_out: ExampleSource) -> dict[str, Callable[[Any], dict[str, float]]]:
        found = {"loss": means(objectives.examples(config, held_out, tokenizer, objectives.HELD_OUT_SEED))}
        if name == "fill_in_the_middle":
            found["left_to_right_loss"] = means(held_out)
            found["middle_loss"] = means(objectives.middles(config, held_out, tokenizer))
        return found

    measures_of_sources = [measures(corpus.validation) for corpus in mixture.corpora]
    # Those of the whole splits: exact if all of them is evaluated, approximate otherwise.
    splits = [corpus.validation.split for corpus in mixture.corpora]
    bytes_per_token = mixture.mean([split.text_bytes / split.num_tokens for split in splits])

    def evaluate(params: Any) -> dict[str, float]:
        of_sources = [{key: of(params)["loss"] for key, of in each.items()} for each in measures_of_sources]
        mixed = {key: mixture.mean([each[key] for each in of_sources]) for key in of_sources[0]}
        found = {"loss": mixed["loss"], "perplexity": perplexity(mixed["loss"]), **mixed}
        if name in ("causal", "fill_in_the_middle"):
            nats = mixed.get("left_to_right_loss", mixed["loss"])
            found["bits_per_byte"] = nats / math.log(2) / bytes_per_token
        if config.data.mixture:
            losses = (each["loss"] for each in of_sources)
            found |= {f"loss/{part.name}": loss for part, loss in zip(mixture.parts, losses, strict=True)}
        return found

    return evaluate


def _has_samples(config: Config) -> bool:
    return config.evaluation.sample_tokens > 0 and config.data.objective != "masked"


def _sample(parameters: ParameterSpec, tokenizer: Tokenizer, mesh: Mesh) -> Callable[[Any], str]:
    """The prompt and its continuation, always with the same sampling seed."""
    config, model = parameters.config, GPT(objectives.attending(parameters.config))
    settings = config.evaluation

    def sample(params: Any) -> str:
        # Stacked: no second copy of the weights in addition to the training state.
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
