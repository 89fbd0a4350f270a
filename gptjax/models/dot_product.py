"""The definition of attention in plain array code: masks, softmax with sinks, shared heads of keys and values."""

import math

import jax
import jax.numpy as jnp

from gptjax.parallel.mesh import axis_size, constrain


def attention_mask(kind: str, band_width: int, length: int, segments_BT: jax.Array | None) -> jax.Array:
    """The attention mask: True where position t attends to position s.

    Args:
      kind: "dense" (s <= t), "banded" (t - band_width < s <= t), "full" (every s) or "prefix" (s <= t, and every s of
        the prefix of the segment).
      band_width: positions to which a position of a banded layer attends, including itself.
      length: T.
      segments_BT: int, documents packed into a row; attention stays within one. None: the row is one document. With
        "prefix", the positions of a document's prefix have its negated number; None: there is no prefix.

    Returns:
      bool (1, 1, T, T), or (B, 1, T, T) with segments.
    """
    t_T1, s_1T = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask_TS = jnp.ones((length, length), bool) if kind == "full" else s_1T <= t_T1
    if kind == "banded":
        mask_TS &= s_1T > t_T1 - band_width
    if segments_BT is None:
        return mask_TS[None, None]
    seen_BTS = mask_TS[None]
    if kind == "prefix":
        seen_BTS, segments_BT = seen_BTS | (segments_BT < 0)[:, None, :], jnp.abs(segments_BT)
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (seen_BTS & same_BTS)[:, None]


def dot_product_attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask_BHTS: jax.Array,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    precision: str | None = None,
    scale: float = 1.0,
    sinks_H: jax.Array | None = None,
) -> jax.Array:
    """softmax(scale * q k) v with scores and softmax in float32 (Vaswani et al. 2017, equation 1).

    Args:
      q_BTHK, k_BSHK, v_BSHK: of one dtype; keys and values may have fewer heads.
      mask_BHTS: bool, broadcastable; False hides position s from position t.
      dropout_rate: of the attention probabilities, when there is a dropout_rng.
      precision: of the matrix products.
      scale: factor of the scores; 1 / sqrt(K) in all GPTs except GPT-Neo.
      sinks_H: float32, logits of attention sinks; None: no sinks.

    Returns:
      (B, T, H, K), of q's dtype.
    """
    if q_BTHK.shape[2] != k_BSHK.shape[2]:
        return _grouped_attention(
            q_BTHK, k_BSHK, v_BSHK, mask_BHTS, dropout_rate, dropout_rng, precision, scale, sinks_H
        )
    scores_BHTS = scale * jnp.einsum(
        "BTHK,BSHK->BHTS", q_BTHK, k_BSHK, precision=precision, preferred_element_type=jnp.float32
    )
    scores_BHTS = jnp.where(mask_BHTS, scores_BHTS, jnp.finfo(jnp.float32).min)
    probs_BHTS = softmax(scores_BHTS, None if sinks_H is None else sinks_H[None, :, None]).astype(v_BSHK.dtype)
    if dropout_rng is not None and dropout_rate > 0:
        keep_BHTS = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, probs_BHTS.shape)
        probs_BHTS = jnp.where(keep_BHTS, probs_BHTS / (1 - dropout_rate), 0)
    return jnp.einsum("BHTS,BSHK->BTHK", probs_BHTS, v_BSHK, precision=precision)


def _grouped_attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask_BHTS: jax.Array,
    dropout_rate: float,
    dropout_rng: jax.Array | None,
    precision: str | None,
    scale: float,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """`dot_product_attention` where Q query heads share a head of keys and values, which are not copied."""
    rows, length, heads, width = q_BTHK.shape
    kv_heads = k_BSHK.shape[2]
    q_BTHQK = q_BTHK.reshape(rows, length, kv_heads, -1, width)
    sinks_HQ = None if sinks_H is None else sinks_H.reshape(kv_heads, -1)
    rng_Q = None if dropout_rng is None else jax.random.split(dropout_rng, heads // kv_heads)

    def attend(q_BTHK: jax.Array, sinks_H: jax.Array | None, rng: jax.Array | None) -> jax.Array:
        return dot_product_attention(q_BTHK, k_BSHK, v_BSHK, mask_BHTS, dropout_rate, rng, precision, scale, sinks_H)

    out_BTHQK = jax.vmap(attend, in_axes=(3, 1, 0), out_axes=3)(q_BTHQK, sinks_HQ, rng_Q)
    return out_BTHQK.reshape(q_BTHK.shape)


def softmax(scores: jax.Array, sinks: jax.Array | None) -> jax.Array:
    """Softmax over the last axis; `sinks` are further logits of the denominator, of the shape of the other axes."""
    if sinks is None:
        return jax.nn.softmax(scores, axis=-1)
    largest = jax.lax.stop_gradient(jnp.maximum(jnp.max(scores, axis=-1), sinks))[..., None]
    powers = jnp.exp(scores - largest)
    return powers / (jnp.sum(powers, axis=-1, keepdims=True) + jnp.exp(sinks[..., None] - largest))


def repeat_heads(x_BTHK: jax.Array, heads: int) -> jax.Array:
    """Repeats each head of keys or values for the query heads that share it, to `heads` in all."""
    return x_BTHK if x_BTHK.shape[2] == heads else jnp.repeat(x_BTHK, heads // x_BTHK.shape[2], axis=2)


def divisible_heads(x_BTHK: jax.Array, query_heads: int) -> jax.Array:
    """Repeats heads of keys or values as often as the mesh axis "tensor" needs, when it has more devices than heads."""
    shards, heads = axis_size("tensor"), x_BTHK.shape[2]
    if heads % shards == 0 or query_heads % shards:
        return x_BTHK
    x_BTHK = constrain(x_BTHK, "batch", "length", "kv_heads", None)
    repeated = math.lcm(heads, shards)
    repeated = repeated if query_heads % repeated == 0 else query_heads
    return constrain(repeat_heads(x_BTHK, repeated), "batch", "length", "heads", None)
