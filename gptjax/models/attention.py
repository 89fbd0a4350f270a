"""Causal self-attention: dense, or banded as in the sparse layers of GPT-3 (Brown et al. 2020, section 2.1)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.parallel.mesh import constrain, partitioned


def attention_mask(kind: str, band_width: int, length: int, segments_BT: jax.Array | None) -> jax.Array:
    """What each position may see: True where position t may look at position s.

    Args:
      kind: "dense" (s <= t) or "banded" (t - band_width < s <= t).
      band_width: positions a banded layer sees, its own included.
      length: T.
      segments_BT: int, documents packed into a row; attention stays within one. None: the row is one document.

    Returns:
      bool (1, 1, T, T), or (B, 1, T, T) with segments.
    """
    t_T1, s_1T = jnp.arange(length)[:, None], jnp.arange(length)[None, :]
    mask_TS = s_1T <= t_T1
    if kind == "banded":
        mask_TS &= s_1T > t_T1 - band_width
    if segments_BT is None:
        return mask_TS[None, None]
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return (mask_TS[None] & same_BTS)[:, None]


def dot_product_attention(
    q_BTHK: jax.Array,
    k_BSHK: jax.Array,
    v_BSHK: jax.Array,
    mask_BHTS: jax.Array,
    dropout_rate: float = 0.0,
    dropout_rng: jax.Array | None = None,
    precision: str | None = None,
) -> jax.Array:
    """softmax(q k / sqrt(K)) v with scores and softmax in float32 (Vaswani et al. 2017, equation 1).

    Args:
      q_BTHK, k_BSHK, v_BSHK: of one dtype.
      mask_BHTS: bool, broadcastable; False hides position s from position t.
      dropout_rate: of the attention probabilities, when there is a dropout_rng.
      precision: of the matrix products.

    Returns:
      (B, T, H, K), of q's dtype.
    """
    scores_BHTS = jnp.einsum(
        "BTHK,BSHK->BHTS", q_BTHK, k_BSHK, precision=precision, preferred_element_type=jnp.float32
    ) / jnp.sqrt(jnp.float32(q_BTHK.shape[-1]))
    scores_BHTS = jnp.where(mask_BHTS, scores_BHTS, jnp.finfo(jnp.float32).min)
    probs_BHTS = jax.nn.softmax(scores_BHTS, axis=-1).astype(v_BSHK.dtype)
    if dropout_rng is not None and dropout_rate > 0:
        keep_BHTS = jax.random.bernoulli(dropout_rng, 1 - dropout_rate, probs_BHTS.shape)
        probs_BHTS = jnp.where(keep_BHTS, probs_BHTS / (1 - dropout_rate), 0)
    return jnp.einsum("BHTS,BSHK->BTHK", probs_BHTS, v_BSHK, precision=precision)


def product_settings(config: GPTConfig) -> dict[str, Any]:
    """The arguments that all dense layers share."""
    return {"dtype": config.dtype, "param_dtype": config.param_dtype, "precision": config.precision}


class SelfAttention(nn.Module):
    """Multi-head causal self-attention; (B, T, D) to (B, T, D)."""

    config: GPTConfig
    kind: str  # "dense" or "banded"
    out_init: nn.initializers.Initializer  # of the projection back into the residual stream

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array | None, deterministic: bool) -> jax.Array:
        config = self.config
        heads = (config.num_heads, config.head_dim)
        # One product for queries, keys and values; the heads are an axis of their own so that tensor parallelism
        # splits them and not the three roles.
        qkv_BT3HK = nn.DenseGeneral(
            (3, *heads),
            kernel_init=partitioned(
                nn.initializers.normal(config.kernel_init_std), "embed", "qkv", "heads", "head_dim"
            ),
            bias_init=partitioned(nn.initializers.zeros, "qkv", "heads", "head_dim"),
            name="qkv",
            **product_settings(config),
        )(x_BTD)
        qkv_BT3HK = constrain(qkv_BT3HK, "batch", "length", None, "heads", None)
        q_BTHK, k_BTHK, v_BTHK = (qkv_BT3HK[:, :, i] for i in range(3))
        out_BTHK = dot_product_attention(
            q_BTHK,
            k_BTHK,
            v_BTHK,
            attention_mask(self.kind, config.band_width, x_BTD.shape[1], segments_BT),
            config.attention_dropout,
            self.make_rng("dropout") if config.attention_dropout > 0 and not deterministic else None,
            config.precision,
        )
        out_BTHK = constrain(out_BTHK, "batch", "length", "heads", None)
        return nn.DenseGeneral(
            config.embed_dim,
            axis=(-2, -1),
            kernel_init=partitioned(self.out_init, "heads", "head_dim", "embed"),
            bias_init=partitioned(nn.initializers.zeros, "norm"),
            name="out",
            **product_settings(config),
        )(out_BTHK)
