"""Language-model loss that never holds float32 logits of a whole batch."""

from functools import partial

import jax
import jax.numpy as jnp

from gptjax.models.gpt import unembed
from gptjax.parallel.mesh import constrain

# Tokens that a device turns into logits at a time: enough to keep its products efficient. A CPU wants the logits of a
# chunk in its cache.
CHUNK_TOKENS, CPU_CHUNK_TOKENS = 2048, 256


def positions_per_chunk(sequences_per_device: int) -> int:
    """How many positions of every sequence make a chunk on the present devices."""
    tokens = CPU_CHUNK_TOKENS if jax.default_backend() == "cpu" else CHUNK_TOKENS
    return max(1, tokens // sequences_per_device)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    precision: str | None = None,
) -> jax.Array:
    """Weighted sum of -log softmax(x embedding^T)[target] in nats, float32.

    The logits exist for `chunk` positions of each sequence at a time. Where a gradient is asked for, each chunk's
    gradient is computed beside its loss, while its logits are at hand: the loss is a scalar at the end of the
    computation, so its cotangent only scales them, and nothing is recomputed.

    Args:
      x_BTD: final hidden states.
      embedding_VD: head matrix.
      targets_BT: int, token ids.
      weights_BT: float32; 0 leaves a target out. Not differentiated.
      chunk: positions a chunk; the last one may be short.
      precision: of the matrix products.
    """
    loss, _ = _scan_chunks(x_BTD, embedding_VD, targets_BT, weights_BT, chunk, precision, with_gradients=False)
    return loss


def _forward(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    precision: str | None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return _scan_chunks(x_BTD, embedding_VD, targets_BT, weights_BT, chunk, precision, with_gradients=True)


def _backward(
    chunk: int, precision: str | None, gradients: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    dx_BTD, dembedding_VD = gradients
    return (
        (dx_BTD * cotangent).astype(dx_BTD.dtype),
        (dembedding_VD * cotangent).astype(dembedding_VD.dtype),
        None,
        None,
    )


cross_entropy.defvjp(_forward, _backward)


def _scan_chunks(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    chunk: int,
    precision: str | None,
    *,
    with_gradients: bool,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The loss, and its gradients with respect to x and the embedding (empty unless asked for)."""
    batch, length, width = x_BTD.shape
    chunk = min(chunk, length)
    pad = -length % chunk
    head_VD = embedding_VD.astype(x_BTD.dtype)

    def chunks(a_BT: jax.Array) -> jax.Array:  # (B, T, ...) to (N, B, C, ...), padded with zeros: weight 0
        a_BT = jnp.pad(a_BT, [(0, 0), (0, pad)] + [(0, 0)] * (a_BT.ndim - 2))
        return jnp.moveaxis(a_BT.reshape(batch, -1, chunk, *a_BT.shape[2:]), 1, 0)

    def step(
        carry: tuple[jax.Array, jax.Array], inputs: tuple[jax.Array, jax.Array, jax.Array]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        loss, dhead_VD = carry
        x_BCD, targets_BC, weights_BC = inputs
        logits_BCV = constrain(unembed(x_BCD, head_VD, precision), "batch", None, "vocab")
        log_z_BC = jax.nn.logsumexp(logits_BCV, axis=-1)
        hit_BCV = jnp.arange(logits_BCV.shape[-1])[None, None] == targets_BC[..., None]
        picked_BC = jnp.sum(jnp.where(hit_BCV, logits_BCV, 0), axis=-1)
        loss += jnp.sum(weights_BC * (log_z_BC - picked_BC))
        if not with_gradients:
            return (loss, dhead_VD), jnp.zeros((), x_BCD.dtype)
        dlogits_BCV = (jnp.exp(logits_BCV - log_z_BC[..., None]) - hit_BCV) * weights_BC[..., None]
        dlogits_BCV = dlogits_BCV.astype(x_BCD.dtype)
        dx_BCD = jnp.einsum("BCV,VD->BCD", dlogits_BCV, head_VD, precision=precision)
        dhead_VD += jnp.einsum(
            "BCV,BCD->VD", dlogits_BCV, x_BCD, precision=precision, preferred_element_type=jnp.float32
        )
        return (loss, dhead_VD), dx_BCD

    dhead_shape = embedding_VD.shape if with_gradients else ()
    start = (jnp.zeros((), jnp.float32), jnp.zeros(dhead_shape, jnp.float32))
    (loss, dhead_VD), dx_NBCD = jax.lax.scan(step, start, (chunks(x_BTD), chunks(targets_BT), chunks(weights_BT)))
    if not with_gradients:
        return loss, (dx_NBCD, dhead_VD)
    dx_BTD = jnp.moveaxis(dx_NBCD, 0, 1).reshape(batch, -1, width)[:, :length]
    return loss, (dx_BTD, dhead_VD.astype(embedding_VD.dtype))
