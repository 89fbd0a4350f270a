"""Causal self-attention: dense, or banded as in the sparse layers of GPT-3 (Brown et al. 2020, section 2.1).

Keys and values may have fewer heads than queries (grouped queries, Ainslie et al. 2023): consecutive query heads share
a key-value head. In arrays of keys and values, H counts their heads; Q counts the query heads that share one.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from gptjax.config import GPTConfig
from gptjax.config.model import GATE_CHANNELS
from gptjax.models import low_precision
from gptjax.models.attention_backends import attention, score_scale
from gptjax.models.dot_product import softmax
from gptjax.models.elementwise import Norm, Vector
from gptjax.models.layer_inputs import LayerInputs
from gptjax.models.paged_attention import PagedKeyValues, paged_attention
from gptjax.models.positions import rotate
from gptjax.parallel.mesh import constrain, partitioned, platform, scattered

MAX_GATE = 3.0  # of value embeddings
# Flax collection and name of the queries as they are multiplied by keys; recorded only where the collection is mutable
QUERIES = ("intermediates", "queries")


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


LayerCache = KeyValues | PagedKeyValues


def slot_positions(last_B: jax.Array, slots: int) -> jax.Array:
    """The position in each slot of a ring buffer when `last_B` is the newest; int (B, S), negative: none yet."""
    return last_B[:, None] - (last_B[:, None] - jnp.arange(slots)[None]) % slots


def cached_attention(
    q_B1HK: jax.Array,
    cache: KeyValues,
    positions_B: jax.Array,
    precision: str | None,
    scale: float,
    sinks_H: jax.Array | None,
) -> jax.Array:
    """Attention of one query a row over a cache that already holds its own position; (B, 1, H, K).

    A ring buffer holds only positions that the query may see, so banded layers need the same mask as dense ones.
    """
    seen_BS = slot_positions(positions_B, cache.slots) >= 0
    rows, _, heads, width = q_B1HK.shape
    q_BHQK = q_B1HK.reshape(rows, cache.keys_BHSK.shape[1], -1, width)
    scores_BHQS = scale * jnp.einsum(
        "BHQK,BHSK->BHQS", q_BHQK, cache.keys_BHSK, precision=precision, preferred_element_type=jnp.float32
    )
    scores_BHQS = jnp.where(seen_BS[:, None, None], scores_BHQS, jnp.finfo(jnp.float32).min)
    sinks = None if sinks_H is None else sinks_H.reshape(scores_BHQS.shape[1:3])[None]
    probs_BHQS = softmax(scores_BHQS, sinks).astype(q_B1HK.dtype)
    out_BHQK = jnp.einsum("BHQS,BHSK->BHQK", probs_BHQS, cache.values_BHSK, precision=precision)
    return out_BHQK.reshape(rows, 1, heads, width)


def product_settings(config: GPTConfig, deterministic: bool = True) -> dict[str, Any]:
    """The keyword arguments that all dense layers share; `matmul_dtype` applies in training only."""
    settings: dict[str, Any] = {"dtype": config.dtype, "param_dtype": config.param_dtype, "precision": config.precision}
    if config.matmul_dtype != "model" and not deterministic:
        low_precision.check_device(config, platform())
        settings["dot_general"] = low_precision.DOT_GENERAL[config.matmul_dtype]
    return settings


def project_qkv(config: GPTConfig, x_BTD: jax.Array, deterministic: bool) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Queries, keys and values, (B, T, H, K) each, by layers of the module that calls.

    One product, "qkv", computes all three; with grouped queries there are two, "q" and "kv". The heads have an axis of
    their own, so that tensor parallelism shards the heads.
    """

    def project(parts: tuple[int, ...], heads: int, axis: str, name: str) -> jax.Array:
        part_axes = ("qkv",) * len(parts)
        layer = nn.DenseGeneral(
            (*parts, heads, config.head_dim),
            use_bias=config.qkv_bias,
            kernel_init=partitioned(
                nn.initializers.normal(config.kernel_init_std), "embed", *part_axes, axis, "head_dim", inputs=1
            ),
            bias_init=partitioned(nn.initializers.zeros, *part_axes, axis, "head_dim"),
            name=name,
            **product_settings(config, deterministic),
        )
        return constrain(layer(x_BTD), "batch", "length", *(None for _ in parts), axis, None)

    if config.kv_heads == config.num_heads:
        qkv_BT3HK = project((3,), config.num_heads, "heads", "qkv")
        q_BTHK, k_BTHK, v_BTHK = (qkv_BT3HK[:, :, i] for i in range(3))
        return q_BTHK, k_BTHK, v_BTHK
    kv_BT2HK = project((2,), config.kv_heads, "kv_heads", "kv")
    return project((), config.num_heads, "heads", "q"), kv_BT2HK[:, :, 0], kv_BT2HK[:, :, 1]


class SelfAttention(nn.Module):
    """Multi-head causal self-attention; (B, T, D) to (B, T, D)."""

    config: GPTConfig
    kind: str  # "dense" or "banded"
    out_init: nn.initializers.Initializer  # for the kernel of the output projection
    ring: bool = False  # positions are in the load-balanced order of gptjax/parallel/balanced_order.py

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: LayerInputs, deterministic: bool, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache]:
        """Attends among the T positions; with a `cache`, from the T new positions of each row to the cached ones.

        T is 1 for a cache of slots, and any number for one of pages.

        Returns:
          The output, and the keys and values of the T positions; or the cache with the new positions written.
        """
        config = self.config
        q_BTHK, k_BTHK, v_BTHK = project_qkv(config, x_BTD, deterministic)
        if inputs.value_BTHK is not None:
            v_BTHK = v_BTHK + self._gated(inputs.value_BTHK, x_BTD)
        if config.qk_norm:
            q_BTHK = self._normalise(q_BTHK, "q_norm")
            k_BTHK = self._normalise(k_BTHK, "k_norm")
        if inputs.rotation is not None:
            q_BTHK, k_BTHK = rotate(q_BTHK, inputs.rotation), rotate(k_BTHK, inputs.rotation)
        self.sow(QUERIES[0], QUERIES[1], q_BTHK)
        sinks_H = None
        if config.attention_sinks:
            sinks = Vector(config, "bias", (config.num_heads,), ("heads",), nn.initializers.zeros, name="sinks")
            sinks_H = sinks().astype(jnp.float32)
        new = KeyValues(k_BTHK.swapaxes(1, 2), v_BTHK.swapaxes(1, 2))
        key_values: LayerCache = new
        if isinstance(cache, PagedKeyValues):
            assert inputs.pages is not None, "a cache of pages needs the places of the tokens"
            key_values = cache.write(k_BTHK, v_BTHK, inputs.pages)
            out_BTHK = paged_attention(
                q_BTHK,
                key_values,
                inputs.pages,
                self.kind,
                config.band_width,
                config.precision,
                score_scale(config),
                sinks_H,
            )
        elif cache is not None:
            assert inputs.positions_B is not None, "decoding needs the position of each row's token"
            positions_B = inputs.positions_B
            key_values = cache.write(new, positions_B)
            out_BTHK = cached_attention(q_BTHK, key_values, positions_B, config.precision, score_scale(config), sinks_H)
        else:
            dropout_rng = self.make_rng("dropout") if config.attention_dropout > 0 and not deterministic else None
            out_BTHK = attention(
                config, self.kind, q_BTHK, k_BTHK, v_BTHK, inputs.segments_BT, dropout_rng, self.ring, sinks_H
            )
        out_BTHK = constrain(out_BTHK, "batch", "length", "heads", None)
        out_BTD = nn.DenseGeneral(
            config.embed_dim,
            axis=(-2, -1),
            use_bias=config.attention_out_bias,
            kernel_init=partitioned(self.out_init, "heads", "head_dim", "embed", inputs=2),
            bias_init=partitioned(nn.initializers.zeros, "norm"),
            name="out",
            **product_settings(config, deterministic),
        )(out_BTHK)
        return scattered(out_BTD), key_values

    def _normalise(self, x_BTHK: jax.Array, name: str) -> jax.Array:
        """RMS norm over the width of a head, times `qk_norm_scale`."""
        config = dataclasses.replace(self.config, norm="rms")
        normed_BTHK = Norm(config, has_gain=config.qk_norm_gain, name=name)(x_BTHK)
        return normed_BTHK if config.qk_norm_scale == 1 else normed_BTHK * config.qk_norm_scale

    def _gated(self, value_BTHK: jax.Array, x_BTD: jax.Array) -> jax.Array:
        """The value embedding of each token times a gate for each key-value head."""
        gate = nn.Dense(
            self.config.kv_heads,
            use_bias=False,
            kernel_init=partitioned(nn.initializers.zeros, "gate_inputs", "kv_heads", inputs=1),
            name="value_gate",
            **product_settings(self.config),
        )
        return MAX_GATE * nn.sigmoid(gate(x_BTD[..., :GATE_CHANNELS]))[..., None] * value_BTHK
