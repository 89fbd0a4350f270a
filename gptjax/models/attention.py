"""Causal self-attention: dense, or banded as in the sparse layers of GPT-3 (Brown et al. 2020, section 2.1)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from gptjax.config import GPTConfig
from gptjax.models import low_precision
from gptjax.models.attention_backends import attention, score_scale
from gptjax.parallel.mesh import constrain, partitioned, platform, scattered


@struct.dataclass
class KeyValues:
    """Keys and values of a layer, both (B, H, S, K).

    A cache is a ring buffer: slot s holds the newest position p so far with p % S == s. A dense layer's S is at least
    the length of the text, so nothing is overwritten; a banded layer needs no more slots than the width of its band.
    """

    keys_BHSK: jax.Array
    values_BHSK: jax.Array

    @property
    def slots(self) -> int:
        return self.keys_BHSK.shape[2]

    def as_cache(self, lengths_B: jax.Array, slots: int) -> "KeyValues":
        """The cache of `slots` slots after a prompt: the keys and values of each row's last positions.

        Args:
          lengths_B: int, each row's length without the padding at its end.
        """
        index_B1S1 = jnp.maximum(slot_positions(lengths_B - 1, slots), 0)[:, None, :, None]
        return jax.tree.map(lambda x_BHTK: jnp.take_along_axis(x_BHTK, index_B1S1, axis=2), self)

    def write(self, new: "KeyValues", positions_B: jax.Array) -> "KeyValues":
        """Writes `new` (B, H, 1, K), the keys and values of position `positions_B` of each row, into its slot."""

        def write_row(old_HSK: jax.Array, new_H1K: jax.Array, slot: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice(old_HSK, new_H1K, (0, slot, 0))

        slot_B = positions_B % self.slots
        return jax.tree.map(lambda old_BHSK, new_BH1K: jax.vmap(write_row)(old_BHSK, new_BH1K, slot_B), self, new)


def slot_positions(last_B: jax.Array, slots: int) -> jax.Array:
    """The position in each slot of a ring buffer when `last_B` is the newest; int (B, S), negative: none yet."""
    return last_B[:, None] - (last_B[:, None] - jnp.arange(slots)[None]) % slots


def cached_attention(
    q_B1HK: jax.Array, cache: KeyValues, positions_B: jax.Array, precision: str | None, scale: float
) -> jax.Array:
    """Attention of one query a row over a cache that already holds its own position; (B, 1, H, K).

    A ring buffer holds only positions that the query may see, so banded layers need the same mask as dense ones.
    """
    seen_BS = slot_positions(positions_B, cache.slots) >= 0
    scores_BHS = scale * jnp.einsum(
        "BHK,BHSK->BHS", q_B1HK[:, 0], cache.keys_BHSK, precision=precision, preferred_element_type=jnp.float32
    )
    probs_BHS = jax.nn.softmax(jnp.where(seen_BS[:, None], scores_BHS, jnp.finfo(jnp.float32).min), axis=-1)
    return jnp.einsum("BHS,BHSK->BHK", probs_BHS.astype(q_B1HK.dtype), cache.values_BHSK, precision=precision)[:, None]


def product_settings(config: GPTConfig, deterministic: bool = True) -> dict[str, Any]:
    """The keyword arguments that all dense layers share; `matmul_dtype` applies in training only."""
    settings: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype, "precision": config.precision}
    if config.matmul_dtype != "model" and not deterministic:
        low_precision.check_device(config, platform())
        settings["dot_general"] = low_precision.DOT_GENERAL[config.matmul_dtype]
    return settings


def project_qkv(config: GPTConfig, x_BTD: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, (B, T, H, K) each, by a layer "qkv" of the module that calls.

    One product computes all three. The heads have an axis of their own, so that tensor parallelism shards the heads.
    """
    qkv = nn.DenseGeneral(
        (3, config.num_heads, config.head_dim),
        use_bias=config.qkv_bias,
        kernel_init=partitioned(
            nn.initializers.normal(config.kernel_init_std), "embed", "qkv", "heads", "head_dim", inputs=1
        ),
        bias_init=partitioned(nn.initializers.zeros, "qkv", "heads", "head_dim"),
        name="qkv",
        **product_settings(config, deterministic),
    )
    qkv_BT3HK = constrain(qkv(x_BTD), "batch", "length", None, "heads", None)
    q_BTHK, k_BTHK, v_BTHK = (qkv_BT3HK[:, :, i] for i in range(3))
    return q_BTHK, k_BTHK, v_BTHK


class SelfAttention(nn.Module):
    """Multi-head causal self-attention; (B, T, D) to (B, T, D)."""

    config: GPTConfig
    kind: str  # "dense" or "banded"
    out_init: nn.initializers.Initializer  # for the kernel of the output projection
    ring: bool = False  # positions are in the load-balanced order of gptjax/parallel/ring.py

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None,
        deterministic: bool,
        cache: KeyValues | None = None,
        positions_B: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Attends among the T positions; with a `cache`, from one new position of each row (T = 1) to the cached ones.

        Returns:
          The output, and the keys and values of the T positions; or the cache with the new position, `positions_B`,
          written.
        """
        config = self.config
        q_BTHK, k_BTHK, v_BTHK = project_qkv(config, x_BTD, deterministic)
        key_values = KeyValues(k_BTHK.swapaxes(1, 2), v_BTHK.swapaxes(1, 2))
        if cache is not None and positions_B is not None:
            key_values = cache.write(key_values, positions_B)
            out_BTHK = cached_attention(q_BTHK, key_values, positions_B, config.precision, score_scale(config))
        else:
            dropout_rng = self.make_rng("dropout") if config.attention_dropout > 0 and not deterministic else None
            out_BTHK = attention(config, self.kind, q_BTHK, k_BTHK, v_BTHK, segments_BT, dropout_rng, self.ring)
        out_BTHK = constrain(out_BTHK, "batch", "length", "heads", None)
        out_BTD = nn.DenseGeneral(
            config.embed_dim,
            axis=(-2, -1),
            kernel_init=partitioned(self.out_init, "heads", "head_dim", "embed", inputs=2),
            bias_init=partitioned(nn.initializers.zeros, "norm"),
            name="out",
            **product_settings(config, deterministic),
        )(out_BTHK)
        return scattered(out_BTD), key_values
