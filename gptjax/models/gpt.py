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
from gptjax.models.attention import LayerCache, SelfAttention
from gptjax.models.attention_backends import is_cudnn_forward
from gptjax.models.axis_roles import ParameterAxes, tree_axes
from gptjax.models.elementwise import Norm, Vector
from gptjax.models.embedding import embed, image_slots, stacked_values, value_embeddings
from gptjax.models.experts import ROUTER, MixtureOfExperts, RouterMeasures
from gptjax.models.feed_forward import MLP, Adapter
from gptjax.models.layer_inputs import LayerInputs
from gptjax.models.parametrization import scaled_initialisation
from gptjax.models.positions import rotation
from gptjax.parallel.balanced_order import balanced_positions, from_balanced_order, to_balanced_order
from gptjax.parallel.mesh import (
    abstract_arrays,
    axis_size,
    fitting_spec,
    gathered,
    partitioned,
    shardings,
)
from gptjax.parallel.platforms import platform_defaults

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


class Block(nn.Module):
    """One transformer layer; (B, T, D) to (B, T, D)."""

    config: GPTConfig
    attention: str  # "dense" or "banded"
    ring: bool = False  # positions are in the load-balanced order of `gptjax.parallel.balanced_order`

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, inputs: LayerInputs, deterministic: bool, cache: LayerCache | None = None
    ) -> tuple[jax.Array, LayerCache]:
        """Arguments and second result are those of `SelfAttention`."""
        config = self.config
        out_std = config.kernel_init_std
        if config.scale_residual_init:
            out_std /= math.sqrt(2 * (config.base_depth or config.num_layers))
        out_init = nn.initializers.zeros if config.zero_residual_init else nn.initializers.normal(out_std)
        attention = SelfAttention(config, self.attention, out_init, self.ring, name="attention")
        attention_norm, mlp_norm = (Norm(config, config.norm_gain, name=f"{n}_norm") for n in ("attention", "mlp"))
        dropout = nn.Dropout(config.residual_dropout, deterministic=deterministic)

        def feed_forward(h_BTD: jax.Array) -> jax.Array:
            if config.num_experts is None:
                return MLP(config, out_init, deterministic, name="mlp")(h_BTD)
            return MixtureOfExperts(config, out_init, deterministic, name="mlp")(h_BTD, inputs.is_token_BT)

        def adapted(h_BTD: jax.Array, name: str) -> jax.Array:
            return h_BTD if config.adapter_dim is None else Adapter(config, name=name)(h_BTD)

        def branch(h_BTD: jax.Array) -> jax.Array:
            return h_BTD if config.depth_factor == 1 else h_BTD * (1 / config.depth_factor)

        x_BTD = checkpoint_name(x_BTD, "block_input")
        if config.residual_scalars:
            x_BTD = self._scaled(x_BTD, inputs)
        pre = config.norm_position == "pre"
        h_BTD, key_values = attention(gathered(attention_norm(x_BTD) if pre else x_BTD), inputs, deterministic, cache)
        h_BTD = adapted(dropout(h_BTD), "attention_adapter")
        x_BTD = x_BTD + branch(h_BTD) if pre else attention_norm(x_BTD + h_BTD)
        h_BTD = adapted(dropout(feed_forward(gathered(mlp_norm(x_BTD) if pre else x_BTD))), "mlp_adapter")
        x_BTD = x_BTD + branch(h_BTD) if pre else mlp_norm(x_BTD + h_BTD)
        return x_BTD, key_values

    def _scaled(self, x_BTD: jax.Array, inputs: LayerInputs) -> jax.Array:
        """a x + b x0 with learned scalars, at first a = 1 and b = 0."""
        a = Vector(self.config, "scale", (), (), nn.initializers.ones, name="residual")()
        b = Vector(self.config, "scale", (), (), nn.initializers.zeros, name="input")()
        assert inputs.first_BTD is not None, "layer_inputs sets it"
        return a.astype(x_BTD.dtype) * x_BTD + b.astype(x_BTD.dtype) * inputs.first_BTD


class Period(nn.Module):
    """One repetition of the attention pattern: the body of the scan over layers."""

    config: GPTConfig
    deterministic: bool
    ring: bool

    @nn.compact
    def __call__(self, x_BTD: jax.Array, inputs: LayerInputs, values: dict[str, jax.Array]) -> tuple[jax.Array, None]:
        """Applies the layers; `values` are the value embeddings by the names of the layers that have them."""
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
        for i, kind in enumerate(config.attention_pattern):
            name = f"block_{i}"
            layer = block(config, kind, self.ring, name=name)
            x_BTD, _ = layer(x_BTD, inputs.replace(value_BTHK=values.get(name)), self.deterministic)
        return x_BTD, None


def scanned_layers(
    config: GPTConfig, periods: int, deterministic: bool, is_initializing: bool, ring: bool, name: str
) -> Period:
    """The scan over so many repetitions of the attention pattern, to be called like `Period`.

    Its values, the last argument, are stacked like the parameters.
    """
    scan: type[Period] = nn.scan(
        Period,
        variable_axes={"params": 0, ROUTER: 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(nn.broadcast, 0),
        length=periods,
        unroll=periods if is_unrolled(config, deterministic) else 1,
        metadata_params={nn.PARTITION_NAME: "layers"},
        # The check traces the body once more, and advances its random streams: a seed gives other values without.
        check_constancy_invariants=is_initializing or not deterministic,
    )
    return scan(config, deterministic, ring, name=name)


class GPT(nn.Module):
    """Decoder-only transformer: tokens to logits.

    The parameters of all layers are stacked on a leading axis, whether layers are scanned or unrolled:
    `layers/block_i/...` holds layers i, i + p, i + 2p, ... where p is the length of the attention pattern.
    """

    config: GPTConfig

    def setup(self) -> None:
        config = self.config
        assert config.vocab_size is not None, "resolve model.vocab_size from the tokenizer first"
        table = partial(nn.Embed, param_dtype=config.param_dtype)
        token_init = partitioned(nn.initializers.normal(config.token_init_std), "vocab", "embed")
        self.token_embedding = table(config.vocab_size, config.embed_dim, embedding_init=token_init)
        if config.positions == "learned":
            position_init = partitioned(nn.initializers.normal(config.position_init_std), "position", "embed")
            self.position_embedding = table(config.context_length, config.embed_dim, embedding_init=position_init)
        if config.value_embeddings != "none":
            width = len(config.value_embedding_layers) * config.kv_heads * config.head_dim
            self.value_embedding = table(config.vocab_size, width, embedding_init=token_init)
        if not config.tied_head:
            head_init = partitioned(nn.initializers.normal(config.head_init_std), "vocab", "embed")
            self.head_embedding = table(config.vocab_size, config.embed_dim, embedding_init=head_init)
        if config.norm_position == "pre":
            self.final_norm = Norm(config, config.norm_gain)
        if config.reads_images:
            from gptjax.models.vision import ImageEncoder  # imports this module

            self.vision = ImageEncoder(config)

    def image_tokens(self, images_BNX: jax.Array, deterministic: bool = True) -> jax.Array:
        """The tokens of images, (B, N * tokens_per_image, D); see `gptjax.models.vision.ImageEncoder`."""
        return self.vision(images_BNX, deterministic)

    def normalise(self, x_BTD: jax.Array) -> jax.Array:
        """Applies the final normalisation (pre-LN models have one) to the output of the last layer.

        The result is divided by the width factor, so that the head's logits are (`models/parametrization.py`).
        """
        x_BTD = self.final_norm(x_BTD) if self.config.norm_position == "pre" else x_BTD
        return x_BTD if self.config.width_factor == 1 else x_BTD * (1 / self.config.width_factor)

    @nn.compact
    def hidden(
        self,
        tokens_BT: jax.Array,
        segments_BT: jax.Array | None = None,
        positions_BT: jax.Array | None = None,
        deterministic: bool = True,
        perturbation_BTD: jax.Array | None = None,
        is_token_BT: jax.Array | None = None,
        images_BNX: jax.Array | None = None,
    ) -> jax.Array:
        """Final hidden states: the input of the head.

        Args:
          tokens_BT: int, T at most `context_length`.
          segments_BT: int, documents packed into a row (attention stays within one). None: the row is one document.
          positions_BT: int. None: 0, 1, ..., T-1.
          deterministic: no dropout; otherwise a "dropout" rng is needed.
          perturbation_BTD: added to the token embeddings, for adversarial training. None: zero.
          is_token_BT: bool, False at padding, which experts do not count. None: padding is where segments_BT is 0.
          images_BNX: uint8, the images of each row in the order of its image tokens, N of them or fewer, then padding.
            None: image tokens, if any, have embeddings as all others.

        Returns:
          (B, T, D), of the config's dtype.
        """
        config, length = self.config, tokens_BT.shape[1]
        context = axis_size("context")
        rows_divide = fitting_spec(tokens_BT.shape, "batch", None)[0] is not None
        ring = context > 1 and length % (2 * context) == 0 and rows_divide
        if config.num_experts is None:
            is_token_BT = None
        elif is_token_BT is None and segments_BT is not None:
            is_token_BT = segments_BT != 0
        images = None
        if config.reads_images and self.is_initializing():
            images_BNX = jnp.zeros((len(tokens_BT), 1, config.vision.values_per_image), jnp.uint8)
        if images_BNX is not None:
            images = self.image_tokens(images_BNX, deterministic), image_slots(config, tokens_BT)
        if ring:
            tokens_BT, segments_BT, positions_BT, perturbation_BTD, is_token_BT = jax.tree.map(
                to_balanced_order, (tokens_BT, segments_BT, positions_BT, perturbation_BTD, is_token_BT)
            )
            images = None if images is None else (images[0], to_balanced_order(images[1]))
        if positions_BT is None:
            positions_BT = jnp.asarray(balanced_positions(length, context) if ring else np.arange(length))[None]
        position_TD = self.position_embedding.embedding if config.positions == "learned" else None
        token_VD = self.token_embedding.embedding
        x_BTD = embed(config, token_VD, position_TD, tokens_BT, positions_BT, perturbation_BTD, images)
        x_BTD = nn.Dropout(config.embedding_dropout, deterministic=deterministic)(x_BTD)

        if self.is_initializing() and not config.tied_head:
            _ = self.head_embedding.embedding  # created where it is first read
        periods = config.num_layers // len(config.attention_pattern)
        layers = scanned_layers(config, periods, deterministic, self.is_initializing(), ring, name="layers")
        value_table_VX = self.value_embedding.embedding if config.value_embeddings != "none" else None
        values = stacked_values(config, value_embeddings(config, value_table_VX, tokens_BT))
        x_BTD, _ = layers(x_BTD, layer_inputs(config, x_BTD, positions_BT, segments_BT, is_token_BT), values)
        x_BTD = gathered(self.normalise(x_BTD))
        return from_balanced_order(x_BTD) if ring else x_BTD

    def __call__(self, *args: Any, **kwargs: Any) -> jax.Array:
        """Next-token logits, float32 (B, T, V); the arguments are those of `hidden`."""
        x_BTD = self.hidden(*args, **kwargs)  # when initialising, this creates the parameters
        return head_logits(self.config, self.variables["params"], x_BTD)


def layer_inputs(
    config: GPTConfig,
    first_BTD: jax.Array,
    positions_BT: jax.Array,
    segments_BT: jax.Array | None = None,
    is_token_BT: jax.Array | None = None,
) -> LayerInputs:
    """The arrays that the layers of this config read; `first_BTD` is the input of the first one."""
    return LayerInputs(
        segments_BT,
        is_token_BT,
        rotation(config, positions_BT),
        first_BTD=first_BTD if config.residual_scalars else None,
    )


def hidden_states(model: GPT, params: Any, tokens_BT: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
    """Final hidden states, as `GPT.hidden` computes them with `params`; `rngs` takes a dropout key."""
    return cast(jax.Array, model.apply({"params": params}, tokens_BT, *args, method="hidden", **kwargs))


def hidden_states_and_routers(
    model: GPT, params: Any, *args: Any, **kwargs: Any
) -> tuple[jax.Array, RouterMeasures | None]:
    """`hidden_states`, and the means of the routers' measures over the layers; None without experts."""
    if model.config.num_experts is None:
        return hidden_states(model, params, *args, **kwargs), None
    x_BTD, collections = model.apply({"params": params}, *args, method="hidden", mutable=[ROUTER], **kwargs)
    layers = jax.tree.leaves(collections[ROUTER], is_leaf=lambda node: isinstance(node, RouterMeasures))
    stacked = jax.tree.map(lambda *parts: jnp.concatenate(parts), *layers)
    return x_BTD, jax.tree.map(lambda measure: jnp.mean(measure, axis=0), stacked)


def init_params(model: GPT, rng: jax.Array) -> Any:
    """Initialises the parameters, boxed with their logical axes; they do not depend on the shape of the tokens."""
    return _init_params(model.config, rng)


@functools.partial(jax.jit, static_argnums=0, inline=True)  # jitted for its cache: shapes and values are traced once
def _init_params(config: GPTConfig, rng: jax.Array) -> Any:
    return scaled_initialisation(config, GPT(config).init(rng, jnp.zeros((1, 1), jnp.int32))["params"])


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
    head_VD = nn.unbox(head_embedding(params))
    return unembed(x_BTD, head_VD, config.precision, soft_cap=config.logit_soft_cap)


def head_embedding(params: Any) -> jax.Array:
    """The (V, D) weight matrix of the head: its own, or the token embedding (Radford et al. 2018, section 3.1)."""
    return params.get("head_embedding", params["token_embedding"])["embedding"]


def unembed(
    x_BTD: jax.Array,
    embedding_VD: jax.Array,
    precision: str | None = None,
    dtype: str = "float32",
    soft_cap: float | None = None,
) -> jax.Array:
    """Logits (..., V) of hidden states: a product in their dtype, accumulated in float32 and returned in `dtype`.

    Args:
      soft_cap: largest absolute value of a logit, approached as cap * tanh(logit / cap); None: no limit.
    """
    logits_BTV = jnp.einsum(
        "...D,VD->...V",
        x_BTD,
        embedding_VD.astype(x_BTD.dtype),
        precision=precision,
        preferred_element_type=jnp.dtype(dtype),
    )
    return soft_capped(logits_BTV, soft_cap)


def soft_capped(logits_BTV: jax.Array, soft_cap: float | None) -> jax.Array:
    """Limits logits smoothly to absolute values below `soft_cap`; None: no limit."""
    return logits_BTV if soft_cap is None else soft_cap * jnp.tanh(logits_BTV / soft_cap)
