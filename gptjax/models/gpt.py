"""The GPT of every generation: a decoder-only transformer whose differences are fields of `GPTConfig`.

Radford et al. 2018 (post-LN), Radford et al. 2019, section 2.3 (pre-LN, scaled residual initialisation) and
Brown et al. 2020, section 2.1 (alternating dense and locally banded attention).
"""

import functools
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from gptjax.config import GPTConfig
from gptjax.models.attention import KeyValues, SelfAttention, product_settings
from gptjax.models.attention_backends import is_cudnn_forward
from gptjax.models.axis_roles import ParameterAxes, tree_axes
from gptjax.models.elementwise import ACTIVATIONS, LayerNorm
from gptjax.parallel.mesh import (
    abstract_arrays,
    axis_size,
    constrain,
    fitting_spec,
    gathered,
    partitioned,
    scattered,
    shardings,
)
from gptjax.parallel.platforms import platform_defaults
from gptjax.parallel.ring import balance, balanced_positions, restore

# Rematerialisation policies (what the forward pass saves for the backward pass) by GPTConfig.remat; None: nothing is
# saved. The names are attached by `checkpoint_name` where the arrays are computed.
_policies = jax.checkpoint_policies
_ATTENTION = _policies.save_from_both_policies(_policies.save_only_these_names("attention"), is_cudnn_forward)
REMAT_POLICIES = {
    "cheap": _policies.save_from_both_policies(_policies.dots_with_no_batch_dims_saveable, _ATTENTION),
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "attention": _ATTENTION,
    "full": None,
    "offload": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=["block_input"],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


def is_unrolled(config: GPTConfig, deterministic: bool) -> bool:
    """Whether the layers are unrolled in the program being traced, rather than scanned over."""
    if config.layer_loop == "auto":
        return not deterministic and config.num_layers <= platform_defaults().max_unrolled_layers
    return config.layer_loop == "unroll"


class MLP(nn.Module):
    """Position-wise feed-forward layer; (B, T, D) to (B, T, D)."""

    config: GPTConfig
    out_init: nn.initializers.Initializer
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        h_BTF = nn.Dense(
            config.feed_forward_dim,
            kernel_init=partitioned(nn.initializers.normal(config.kernel_init_std), "embed", "ffw", inputs=1),
            bias_init=partitioned(nn.initializers.zeros, "ffw"),
            name="up",
            **product_settings(config, self.deterministic),
        )(x_BTD)
        down = nn.Dense(
            config.embed_dim,
            kernel_init=partitioned(self.out_init, "ffw", "embed", inputs=1),
            bias_init=partitioned(nn.initializers.zeros, "norm"),
            name="down",
            **product_settings(config, self.deterministic),
        )

        def activated(down: nn.Dense, h_BTF: jax.Array) -> jax.Array:
            return down(constrain(ACTIVATIONS[config.activation](h_BTF), "batch", "length", "ffw"))

        if platform_defaults().recompute_activations:
            activated = nn.remat(activated, prevent_cse=False)
        return scattered(activated(down, h_BTF))


class Adapter(nn.Module):
    """Bottleneck adapter with a residual connection, near the identity at first (Houlsby et al. 2019, section 2.1).

    (B, T, D) to (B, T, D).
    """

    config: GPTConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config
        assert config.adapter_dim is not None
        init = nn.initializers.truncated_normal(1e-2)
        h_BTA = nn.Dense(
            config.adapter_dim,
            kernel_init=partitioned(init, "embed", "adapter", inputs=1),
            bias_init=partitioned(nn.initializers.zeros, "adapter"),
            name="down",
            **product_settings(config),
        )(x_BTD)
        out_BTD = nn.Dense(
            config.embed_dim,
            kernel_init=partitioned(init, "adapter", "embed", inputs=1),
            bias_init=partitioned(nn.initializers.zeros, "norm"),
            name="up",
            **product_settings(config),
        )(ACTIVATIONS[config.activation](h_BTA))
        return x_BTD + out_BTD


class Block(nn.Module):
    """One transformer layer; (B, T, D) to (B, T, D)."""

    config: GPTConfig
    attention: str  # "dense" or "banded"
    ring: bool = False  # positions are in the load-balanced order of `gptjax.parallel.ring`

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        segments_BT: jax.Array | None,
        deterministic: bool,
        cache: KeyValues | None = None,
        positions_B: jax.Array | None = None,
    ) -> tuple[jax.Array, KeyValues]:
        """Arguments and second result are those of `SelfAttention`."""
        config = self.config
        out_std = config.kernel_init_std
        if config.scale_residual_init:
            out_std /= math.sqrt(2 * config.num_layers)
        out_init = nn.initializers.normal(out_std)
        attention = SelfAttention(config, self.attention, out_init, self.ring, name="attention")
        mlp = MLP(config, out_init, deterministic, name="mlp")
        attention_norm, mlp_norm = LayerNorm(config, name="attention_norm"), LayerNorm(config, name="mlp_norm")
        dropout = nn.Dropout(config.residual_dropout, deterministic=deterministic)

        def adapted(h_BTD: jax.Array, name: str) -> jax.Array:
            return h_BTD if config.adapter_dim is None else Adapter(config, name=name)(h_BTD)

        x_BTD = checkpoint_name(x_BTD, "block_input")
        pre = config.norm_position == "pre"
        h_BTD, key_values = attention(
            gathered(attention_norm(x_BTD) if pre else x_BTD), segments_BT, deterministic, cache, positions_B
        )
        h_BTD = adapted(dropout(h_BTD), "attention_adapter")
        x_BTD = x_BTD + h_BTD if pre else attention_norm(x_BTD + h_BTD)
        h_BTD = adapted(dropout(mlp(gathered(mlp_norm(x_BTD) if pre else x_BTD))), "mlp_adapter")
        x_BTD = x_BTD + h_BTD if pre else mlp_norm(x_BTD + h_BTD)
        return x_BTD, key_values


class Period(nn.Module):
    """One repetition of the attention pattern: the body of the scan over layers."""

    config: GPTConfig
    deterministic: bool
    ring: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, segments_BT: jax.Array | None) -> tuple[jax.Array, None]:
        config = self.config
        block = Block
        if config.remat != "none":
            # Inside a scan, the loop itself prevents common subexpression elimination of the recomputation.
            block = nn.remat(
                Block,
                policy=REMAT_POLICIES[config.remat],
                prevent_cse=is_unrolled(config, self.deterministic),
                static_argnums=(3,),
            )
        for i, attention in enumerate(config.attention_pattern):
            x_BTD, _ = block(config, attention, self.ring, name=f"block_{i}")(x_BTD, segments_BT, self.deterministic)
        return x_BTD, None


class GPT(nn.Module):
    """Decoder-only transformer: tokens to logits.

    The parameters of all layers are stacked on a leading axis, whether layers are scanned or unrolled:
    `layers/block_i/...` holds layers i, i + p, i + 2p, ... where p is the length of the attention pattern.
    """

    config: GPTConfig

    def setup(self) -> None:
        config = self.config
        assert config.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
        table = partial(nn.Embed, features=config.embed_dim, param_dtype=config.param_dtype)
        token_init = partitioned(nn.initializers.normal(config.token_init_std), "vocab", "embed")
        position_init = partitioned(nn.initializers.normal(config.position_init_std), "position", "embed")
        self.token_embedding = table(config.vocab_size, embedding_init=token_init)
        self.position_embedding = table(config.context_length, embedding_init=position_init)
        if config.norm_position == "pre":
            self.final_norm = LayerNorm(config)

    def normalise(self, x_BTD: jax.Array) -> jax.Array:
        """Applies the final normalisation (pre-LN models have one) to the output of the last layer."""
        return self.final_norm(x_BTD) if self.config.norm_position == "pre" else x_BTD

    @nn.compact
    def hidden(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        deterministic: bool = True,
        perturbation_BTD: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states: the input of the head.

        Args:
          tokens_BT: int, T at most `context_length`.
          segments_BT: int, documents packed into a row (attention stays within one). None: the row is one document.
          positions_BT: int. None: 0, 1, ..., T-1.
          deterministic: no dropout; otherwise a "dropout" rng is needed.
          perturbation_BTD: added to the token embeddings, for adversarial training. None: zero.

        Returns:
          (B, T, D), of the config's dtype.
        """
        config, length = self.config, tokens_BT.shape[1]
        context = axis_size("context")
        rows_divide = fitting_spec(tokens_BT.shape, "batch", None)[0] is not None
        ring = context > 1 and length % (2 * context) == 0 and rows_divide
        if ring:
            tokens_BT, segments_BT, positions_BT, perturbation_BTD = jax.tree.map(
                balance, (tokens_BT, segments_BT, positions_BT, perturbation_BTD)
            )
        if positions_BT is None:
            positions_BT = jnp.asarray(balanced_positions(length, context) if ring else np.arange(length))[None]
        tables = self.token_embedding.embedding, self.position_embedding.embedding
        x_BTD = embed(config, *tables, tokens_BT, positions_BT, perturbation_BTD)
        x_BTD = nn.Dropout(config.embedding_dropout, deterministic=deterministic)(x_BTD)

        periods = config.num_layers // len(config.attention_pattern)
        layers = nn.scan(
            Period,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            in_axes=nn.broadcast,
            length=periods,
            unroll=periods if is_unrolled(config, deterministic) else 1,
            metadata_params={nn.PARTITION_NAME: "layers"},
            # The check traces the body once more, and advances its random streams: a seed gives other values without.
            check_constancy_invariants=self.is_initializing() or not deterministic,
        )(config, deterministic, ring, name="layers")
        x_BTD, _ = layers(x_BTD, segments_BT)
        x_BTD = gathered(self.normalise(x_BTD))
        return restore(x_BTD) if ring else x_BTD

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Next-token logits, float32 (B, T, V); the arguments are those of `hidden`."""
        x_BTD = self.hidden(*args, **kwargs)  # when initialising, this creates the parameters
        return head_logits(self.config, self.variables["params"], x_BTD)


def embed(
    config: GPTConfig,
    token_VD: Any,
    position_TD: Any,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    perturbation_BTD: jax.Array | None = None,
) -> jax.Array:
    """Input of the first layer, (B, T, D) of the config's dtype: token embeddings with their positions.

    The sum has the wider of the parameters' and the activations' dtypes, as the other layers have. Rows are gathered
    before they are unboxed or cast, so that the rest of a table is never read.
    """
    token_BTD = nn.unbox(jax.tree.map(lambda leaf: take_rows(leaf, tokens_BT), token_VD))
    x_BTD = add_positions(config, token_BTD, position_TD, positions_BT)
    if perturbation_BTD is not None:  # before the cast: a coarser dtype could swallow it
        x_BTD = x_BTD + perturbation_BTD
    return constrain(x_BTD.astype(config.dtype), "batch", "sequence", None)


def add_positions(config: GPTConfig, token_BTD: jax.Array, position_TD: Any, positions_BT: jax.Array) -> jax.Array:
    """Adds learned absolute position embeddings (Radford et al. 2018, section 4.1) to token embeddings.

    The one place where positions enter the model, the causal and banded attention masks apart.
    """
    position_BTD = nn.unbox(
        jax.tree.map(lambda leaf: jnp.take(constrain(leaf, None, None), positions_BT, axis=0), position_TD)
    )
    sum_dtype = jnp.promote_types(jnp.result_type(token_BTD, position_BTD), config.dtype)
    return token_BTD.astype(sum_dtype) + position_BTD.astype(sum_dtype)


def take_rows(table_VX: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """`table_VX[ids_BT]`, (B, T, X), of a table whose rows are sharded over the mesh in use.

    Each device looks up the rows that it holds, and the results are summed over devices. The SPMD partitioner would
    all-gather the table.
    """
    table, ids = fitting_spec(table_VX.shape, "vocab", "embed"), fitting_spec(ids_BT.shape, "batch", "length")
    if axis_size("tensor") == 1 or ids[0] is None:
        return jnp.take(constrain(table_VX, None, None), ids_BT, axis=0)
    out = fitting_spec(ids_BT.shape, "batch", "sequence")
    split = out[1] is not None

    def on_device(table_VX: jax.Array, ids_BT: jax.Array) -> jax.Array:
        if table[1] is not None:
            table_VX = jax.lax.all_gather(table_VX, table[1], axis=1, tiled=True)
        row_BT = ids_BT - jax.lax.axis_index("tensor") * len(table_VX)
        here_BT = (row_BT >= 0) & (row_BT < len(table_VX))
        rows_BTX = jnp.where(here_BT[..., None], jnp.take(table_VX, row_BT, axis=0, mode="clip"), 0)
        if split:
            return jax.lax.psum_scatter(rows_BTX, "tensor", scatter_dimension=1, tiled=True)
        return jax.lax.psum(rows_BTX, "tensor")

    return jax.shard_map(on_device, in_specs=(table, ids), out_specs=out if split else ids)(table_VX, ids_BT)


def hidden_states(model: GPT, params: Any, tokens_BT: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Final hidden states, as `GPT.hidden` computes them with `params`; `rngs` takes a dropout key."""
    return cast(jax.Array, model.apply({"params": params}, tokens_BT, *args, method="hidden", **kwargs))


def init_params(model: GPT, rng: jax.Array) -> Any:
    """Initialises the parameters, boxed with their logical axes; they do not depend on the shape of the tokens."""
    return _init_params(model.config, rng)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # jitted for its cache: shapes and values are traced once
def _init_params(config: GPTConfig, rng: jax.Array) -> Any:
    return GPT(config).init(rng, jnp.zeros((1, 1), jnp.int32))["params"]


@functools.lru_cache(maxsize=32)
def model_axes(config: GPTConfig) -> Mapping[str, ParameterAxes]:
    """The roles of the axes of every parameter of a GPT, by path."""
    return tree_axes(jax.eval_shape(lambda: init_params(GPT(config), jax.random.key(0))))


def abstract_params(model: GPT, mesh: Mesh) -> Any:
    """Shapes, dtypes and shardings of the parameters on `mesh`: a tree of ShapeDtypeStructs."""
    boxed = jax.eval_shape(lambda: init_params(model, jax.random.key(0)))
    return abstract_arrays(nn.unbox(boxed), shardings(mesh, boxed))


# --- the head ---------------------------------------------------------------------------------------------------------


def head_logits(config: GPTConfig, params: Any, x_BTD: jax.Array) -> jax.Array:
    """Logits of final hidden states, float32 (..., V): the head of training without chunks, and of decoding."""
    return unembed(x_BTD, nn.unbox(head_embedding(params)), config.precision)


def head_embedding(params: Any) -> jax.Array:
    """The (V, D) weight matrix of the head: the token embedding, tied (Radford et al. 2018, section 3.1)."""
    return params["token_embedding"]["embedding"]


def unembed(
    x_BTD: jax.Array, embedding_VD: jax.Array, precision: str | None = None, dtype: str = "float32"
) -> jax.Array:
    """Logits (..., V) of hidden states: a product in their dtype, accumulated in float32 and returned in `dtype`."""
    return jnp.einsum(
        "...D,VD->...V",
        x_BTD,
        embedding_VD.astype(x_BTD.dtype),
        precision=precision,
        preferred_element_type=jnp.dtype(dtype),
    )
