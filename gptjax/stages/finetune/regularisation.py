"""Regularisation of fine-tuning against overfitting on small data; nothing here is active in evaluation.

`regularised` wraps a loss to corrupt the input tokens. Label smoothing, mixup and adversarial perturbations act inside
`TaskModel.loss` in `gptjax/stages/finetune/task_model.py`.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import Config
from gptjax.data.task_inputs import NUM_SPECIAL_TOKENS
from gptjax.training.objective import Batch, Loss, Measures


def regularised(config: Config, loss: Loss) -> Loss:
    """Wraps `loss` to corrupt the input tokens during training; evaluation (no key) is unchanged."""
    settings = config.regularisation
    if max(settings.word_dropout, settings.token_replacement) == 0:
        return loss

    def corrupted_loss(params: Any, batch: Batch, rng: jax.Array | None) -> tuple[jax.Array, jax.Array, Measures]:
        if rng is None:
            return loss(params, batch, None)
        rng, dropout_rng, replacement_rng = jax.random.split(rng, 3)
        inputs = word_dropout(dropout_rng, batch["tokens"], settings.word_dropout)
        inputs = token_replacement(replacement_rng, inputs, settings.token_replacement)
        return loss(params, batch | {"tokens": inputs, "written_tokens": batch["tokens"]}, rng)

    return corrupted_loss


# A sequence begins with the special token `start`, the first id after the vocabulary: smaller ids are text or padding,
# and padding is masked.


def word_dropout(rng: jax.Array, tokens: jax.Array, rate: float) -> jax.Array:
    """Replaces each text token by the blank token with probability `rate` (Iyyer et al. 2015, section 3.1).

    Args:
      tokens: int32 (..., T).
    """
    starts = tokens[..., :1]
    drop = jax.random.bernoulli(rng, rate, tokens.shape) & (tokens < starts)
    return jnp.where(drop, starts + NUM_SPECIAL_TOKENS - 1, tokens)


def token_replacement(rng: jax.Array, tokens: jax.Array, rate: float) -> jax.Array:
    """Replaces each text token by a uniform sample of the vocabulary with probability `rate` (Wang et al. 2018, 3).

    Args:
      tokens: int32 (..., T).
    """
    starts = tokens[..., :1]
    mask_rng, sample_rng = jax.random.split(rng)
    replace = jax.random.bernoulli(mask_rng, rate, tokens.shape) & (tokens < starts)
    samples = jnp.floor(jax.random.uniform(sample_rng, tokens.shape) * starts).astype(tokens.dtype)
    return jnp.where(replace, samples, tokens)


def adversarial_perturbation(
    loss: Callable[[jax.Array], jax.Array],
    shape: tuple[int, ...],
    num_examples: int,
    table_VD: jax.Array,
    epsilon: float,
) -> jax.Array:
    """Computes the adversarial perturbation of each example's token embeddings (Miyato et al. 2017, equation 5).

    r = epsilon * g / ||g||_2, where g is the gradient of the example's loss with respect to the concatenation of its
    normalised embeddings, (v - mean) / std over the vocabulary (section 3, equation 1). Normalising keeps the model
    from escaping the perturbation by larger embeddings. The pretrained network keeps its own embeddings: the
    perturbation is scaled back to them by std, which is the same function. Each token of the vocabulary counts equally
    in the mean and std, where the paper weights it by its frequency.

    Args:
      loss: perturbation, float32 of `shape` -> the loss, a sum over examples, each of which depends on its own
        embeddings only.
      shape: (N, T, D), where N is a multiple of num_examples: consecutive sequences belong to one example.
      table_VD: the token embeddings.
      epsilon: the L2 norm of each example's perturbation of its normalised embeddings.

    Returns:
      float32 of `shape`, a constant for differentiation; zero for an example whose gradient is zero.
    """
    std_11D = jnp.std(table_VD.astype(jnp.float32), axis=0)[None, None]
    gradient_BX = (jax.grad(loss)(jnp.zeros(shape, jnp.float32)) * std_11D).reshape(num_examples, -1)
    # Scaled by the largest entry first, as the squares of a confident example's gradient underflow.
    largest_B1 = jnp.max(jnp.abs(gradient_BX), axis=1, keepdims=True)
    gradient_BX = gradient_BX / jnp.where(largest_B1 > 0, largest_B1, 1)
    norm_B1 = jnp.linalg.norm(gradient_BX, axis=1, keepdims=True)
    direction_BX = gradient_BX / jnp.where(norm_B1 > 0, norm_B1, 1)
    return jax.lax.stop_gradient(epsilon * direction_BX.reshape(shape) * std_11D)


def smoothed(nats: jax.Array, label_nats: jax.Array, smoothing: float) -> jax.Array:
    """Computes the cross entropy with smoothed labels (Szegedy et al. 2016, section 7).

    Args:
      nats: (..., labels), negative log-probabilities.
      label_nats: (...), those of the gold labels.
    """
    return (1 - smoothing) * label_nats + smoothing * jnp.mean(nats, axis=-1)


def sample_mixup(rng: jax.Array, alpha: float, weights_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Samples the mixing coefficients, float32 (B,), and the partners, int32 (B,), of mixup.

    Coefficients are Beta(alpha, alpha) (Guo et al. 2019, equation 4), and 1 where the partner is batch padding.
    """
    share_rng, partner_rng = jax.random.split(rng)
    partner_B = jax.random.permutation(partner_rng, weights_B.size)
    share_B = jax.random.beta(share_rng, alpha, alpha, weights_B.shape)
    return jnp.where(weights_B[partner_B] > 0, share_B, 1.0), partner_B


def mixed(own_B: jax.Array, other_B: jax.Array, share_B: jax.Array) -> jax.Array:
    """Computes share * own + (1 - share) * other of arrays (B, ...)."""
    share = share_B.reshape(-1, *[1] * (own_B.ndim - 1)).astype(own_B.dtype)
    return share * own_B + (1 - share) * other_B
