"""Regularisers of fine-tuning: each transforms a batch, a loss or a pair of outputs, and the model has none of them.

Those of labels and of pooled texts, smoothing and mixup, are applied where `gptjax/stages/finetune/task_model.py` has them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from gptjax.checkpoint.state import Batch, Loss, Measures
from gptjax.config import NUM_SPECIAL_TOKENS, Config


def regularised(config: Config, loss: Loss) -> Loss:
    """`loss` as `config.regularisation` has it while training; without a key, as in evaluation, it is as it was."""
    settings = config.regularisation
    if settings.adversarial_epsilon is not None:
        loss = adversarial(loss, settings.adversarial_epsilon)
    if max(settings.word_dropout, settings.token_replacement) == 0:
        return loss

    def corrupting(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        if rng is None:
            return loss(params, batch, None)
        rng, drop_rng, replace_rng = jax.random.split(rng, 3)
        read = word_dropout(drop_rng, batch["tokens"], settings.word_dropout)
        read = token_replacement(replace_rng, read, settings.token_replacement)
        return loss(params, batch | {"tokens": read, "written_tokens": batch["tokens"]}, rng)

    return corrupting


# A sequence begins with the special token `start`, the first behind the vocabulary: smaller numbers are text, or
# padding, which nothing reads.


def word_dropout(rng: jax.Array, tokens: jax.Array, rate: float) -> jax.Array:
    """int32 (..., T) sequences with a share of the text blanked (Iyyer et al. 2015, section 3.1)."""
    starts = tokens[..., :1]
    drawn = jax.random.bernoulli(rng, rate, tokens.shape) & (tokens < starts)
    return jnp.where(drawn, starts + NUM_SPECIAL_TOKENS - 1, tokens)


def token_replacement(rng: jax.Array, tokens: jax.Array, rate: float) -> jax.Array:
    """int32 (..., T) sequences in which a share of the text becomes any token (Wang et al. 2018, section 3)."""
    starts = tokens[..., :1]
    which_rng, what_rng = jax.random.split(rng)
    drawn = jax.random.bernoulli(which_rng, rate, tokens.shape) & (tokens < starts)
    others = jnp.floor(jax.random.uniform(what_rng, tokens.shape) * starts).astype(tokens.dtype)
    return jnp.where(drawn, others, tokens)


def adversarial(loss: Loss, epsilon: float) -> Loss:
    """The mean of the loss, and of that after a step of length epsilon against it (Miyato et al. 2017, equation 3).

    The step is made by the table of token embeddings, in the direction of the gradient.
    """

    def of_both(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        if rng is None:
            return loss(params, batch, None)

        def total_of(table: Any) -> jax.Array:
            return loss(params | {"token_embedding": table}, batch, rng)[0]

        total, weight, measures = loss(params, batch, rng)
        gradient = jax.lax.stop_gradient(jax.grad(total_of)(params["token_embedding"]))
        step = epsilon / jnp.maximum(optax.tree.norm(gradient), 1e-12)
        moved = jax.tree.map(lambda p, g: p + (step * g).astype(p.dtype), params["token_embedding"], gradient)
        return (total + total_of(moved)) / 2, weight, measures

    return of_both


def smoothed(nats: jax.Array, picked: jax.Array, smoothing: float) -> jax.Array:
    """Cross entropy with labels of which all labels have a share (Szegedy et al. 2016, section 7).

    Args:
      nats: (..., labels), -log of the probabilities.
      picked: (...), those of the right labels.
    """
    return (1 - smoothing) * picked + smoothing * jnp.mean(nats, axis=-1)


def draw_mixup(rng: jax.Array, alpha: float, weights_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How much of each text stays, float32 (B,), and with which text the rest is mixed, int32 (B,).

    Guo et al. 2019, equation 4, of Beta(alpha, alpha); a text stays whole if its partner only fills up the batch.
    """
    share_rng, order_rng = jax.random.split(rng)
    partner_B = jax.random.permutation(order_rng, weights_B.size)
    share_B = jax.random.beta(share_rng, alpha, alpha, weights_B.shape)
    return jnp.where(weights_B[partner_B] > 0, share_B, 1.0), partner_B


def mixed(own_B: jax.Array, other_B: jax.Array, share_B: jax.Array) -> jax.Array:
    """share x own + (1 - share) x other, for arrays (B, ...)."""
    share = share_B.reshape(-1, *[1] * (own_B.ndim - 1)).astype(own_B.dtype)
    return share * own_B + (1 - share) * other_B
