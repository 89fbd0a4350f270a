"""The policy of the chat stages, its frozen reference, and log-probabilities of tokens.

A batch has the arrays of `gptjax/data/chat_batches.py`: B elements of R rows of T positions, and where the model reads
images, those of each row. How prompts and completions are laid out in the rows makes no difference here.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from gptjax.checkpoint.state import ParameterSpec
from gptjax.config import Config, require
from gptjax.data.templates import chat_format
from gptjax.data.tokenizers import Tokenizer
from gptjax.losses.cross_entropy import target_logprobs
from gptjax.models.gpt import GPT, head_embedding, hidden_states, init_params
from gptjax.training.objective import Batch

REFERENCE = "reference"  # top-level key of the frozen parameters of the model that a policy starts from
DROPOUTS = ("embedding_dropout", "attention_dropout", "residual_dropout")  # fields of `model`


def complete(config: Config, tokenizer: Tokenizer, workdir: Path) -> Config:
    """The complete config of a stage that reads conversations: the chat template may add tokens to the vocabulary."""
    form = chat_format(config.chat, tokenizer, config.model.vision)
    return config.completed(form.vocab_size, extends_vocabulary=True, image_token=form.image_token)


def policy_parameters(config: Config) -> ParameterSpec:
    """The policy's GPT alone."""
    return ParameterSpec(config, _initialiser(config))


def policy_and_reference(config: Config, reference_passes: float = 1.0) -> ParameterSpec:
    """The policy's GPT, and a frozen copy of the weights that it starts from.

    Args:
      reference_passes: forward passes through the reference for every token that is trained on.
    """
    init = _initialiser(config)
    return ParameterSpec(
        config, lambda rng: init(rng) | {REFERENCE: init(rng)}, frozen=(REFERENCE,), frozen_passes=reference_passes
    )


def _initialiser(config: Config) -> Callable[[jax.Array], Any]:
    return lambda rng: init_params(GPT(config.model), rng)


def check_needs_init_from(config: Config) -> None:
    """Raises UserError unless the config names the weights that serve as the reference, whole."""
    require(
        config.init_from is not None,
        f"stage {config.stage} needs a trained model as its reference: set init_from to its workdir",
    )
    require(
        config.init_layers is None,
        f"init_layers={config.init_layers} is no trained model for the reference of stage {config.stage}: unset it",
    )


def check_no_pretraining_text(config: Config) -> None:
    """Raises UserError when the config names pretraining text, which this stage does not train on."""
    require(
        config.chat.pretraining_source is None and config.chat.pretraining_share == 0,
        f"chat.pretraining_source and chat.pretraining_share are for sft and ppo, not {config.stage}: unset them",
    )


def check_computed_as_reference(config: Config) -> None:
    """Raises UserError when the policy would be computed in another way than the reference it is compared with.

    A log-ratio of two models is meaningful only where both are computed alike: without dropout, in one precision.
    """
    model = config.model
    settings = {f"model.{name}": getattr(model, name) for name in DROPOUTS} | {"peft.dropout": config.peft.dropout}
    for name, value in settings.items():
        require(
            value == 0,
            f"{name}={value}: stage {config.stage} compares log-probabilities of the policy with those of a model that "
            "is computed without dropout: set it to 0",
        )
    require(
        model.matmul_dtype == "model",
        f"model.matmul_dtype={model.matmul_dtype} is not supported by stage {config.stage}, which compares "
        "log-probabilities of the policy with those of a model that is not quantised: set it to model",
    )


def element_hidden_states(gpt: GPT, params: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """Final hidden states of all positions, (B, R, T, D).

    Args:
      rng: dropout key; None: no dropout.
    """
    tokens_BRT = batch["tokens"]
    rows = (batch[name].reshape(-1, tokens_BRT.shape[-1]) for name in ("tokens", "segments", "positions"))
    images_BRNX = batch.get("images")
    images = None if images_BRNX is None else images_BRNX.reshape(-1, *images_BRNX.shape[2:])
    rngs = None if rng is None else {"dropout": rng}
    x_NTD = hidden_states(gpt, params, *rows, images_BNX=images, deterministic=rng is None, rngs=rngs)
    return x_NTD.reshape(*tokens_BRT.shape, -1)


def token_logprobs(gpt: GPT, params: Any, batch: Batch, rng: jax.Array | None) -> jax.Array:
    """Log-probability of the target at each position, float32 (B, R, T)."""
    return logprobs_of_states(gpt, params, batch, element_hidden_states(gpt, params, batch, rng))


def logprobs_of_states(gpt: GPT, params: Any, batch: Batch, x_BRTD: jax.Array) -> jax.Array:
    """`token_logprobs` from the final hidden states."""
    rows_NTD, targets_NT = x_BRTD.reshape(-1, *x_BRTD.shape[2:]), batch["targets"].reshape(-1, x_BRTD.shape[2])
    logprobs_NT = target_logprobs(
        rows_NTD, head_embedding(params), targets_NT, gpt.config.precision, gpt.config.logit_soft_cap
    )
    return logprobs_NT.reshape(x_BRTD.shape[:3])
