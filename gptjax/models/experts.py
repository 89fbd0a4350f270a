"""Mixture of experts: each token is computed by the few feed-forward layers that a router chooses for it.

The router's logits are a linear function of the hidden state. The `experts_per_token` largest choose the experts, and
the output is the sum of their outputs, weighted by the softmax of the chosen logits (Shazeer et al. 2017, section 2;
gpt-oss) or by normalised sigmoids (DeepSeek-V3, section 2.1.2). No token is dropped, unless `expert_capacity` limits
the tokens of an expert.

Shapes: E experts, U experts of a token.
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.models.expert_dispatch import Dense, Layout, Routes, apply_experts, within_capacity
from gptjax.models.feed_forward import activate
from gptjax.parallel.mesh import constrain, partitioned, scattered

ROUTER = "router"  # Flax collection of what routers measure: one entry for each layer


class RouterMeasures(NamedTuple):
    """Measures of a router over the tokens of a batch, without padding; float32.

    Attributes:
      balance: load-balance loss, num_experts * sum_e f_e p_e, with f_e the share of the assignments that expert e has,
        and p_e its mean probability (Fedus et al. 2021, equations 4 to 6). 1 when balanced.
      z: mean of log(sum_e exp(logit_e))^2 (Zoph et al. 2022, equation 5).
      load_E: share of the assignments of each expert.
    """

    balance: jax.Array
    z: jax.Array
    load_E: jax.Array


class MixtureOfExperts(nn.Module):
    """A router and its experts in place of a feed-forward layer; (B, T, D) to (B, T, D)."""

    config: GPTConfig
    out_init: nn.initializers.Initializer
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array, is_token_BT: jax.Array | None = None) -> jax.Array:
        """Applies the layer; `is_token_BT`, bool, is False at padding, and None without padding."""
        config = self.config
        assert config.num_experts is not None
        logits_BTE = nn.Dense(
            config.num_experts,
            use_bias=config.router_bias,
            dtype="float32",  # near-ties must not be decided by rounding
            param_dtype=config.param_dtype,
            precision="highest",
            kernel_init=partitioned(nn.initializers.normal(config.kernel_init_std), "embed", "router", inputs=1),
            bias_init=partitioned(nn.initializers.zeros, "router"),
            name="router",
        )(x_BTD)
        logits_BTE = constrain(logits_BTE, "batch", "length", None)
        bias_E = None
        if config.balance_bias:
            init = partitioned(nn.initializers.zeros, "balance")
            bias_E = nn.unbox(self.param("balance_bias", init, (config.num_experts,), "float32"))
        routes = choose(config, logits_BTE, bias_E)
        measures = measure(logits_BTE, routes.experts_BTU, is_token_BT)
        self.sow(ROUTER, "measures", measures, reduce_fn=lambda _, new: new)
        if bias_E is not None and not self.deterministic:
            routes = routes._replace(weights_BTU=with_load_gradient(routes.weights_BTU, bias_E, measures.load_E))
        experts = Experts(config, self.out_init, name="experts")
        return scattered(experts(x_BTD, routes, is_token_BT))


def choose(config: GPTConfig, logits_BTE: jax.Array, bias_E: jax.Array | None) -> Routes:
    """The experts of each token and their weights.

    Args:
      bias_E: added to the scores that choose, not to the weights.
    """
    scores_BTE = nn.sigmoid(logits_BTE) if config.router_weights == "sigmoid" else logits_BTE
    selection_BTE = scores_BTE if bias_E is None else scores_BTE + jax.lax.stop_gradient(bias_E)[None, None]
    _, experts_BTU = jax.lax.top_k(jax.lax.stop_gradient(selection_BTE), config.experts_per_token)
    chosen_BTU = jnp.take_along_axis(scores_BTE, experts_BTU, axis=-1)
    if config.router_weights == "sigmoid":
        return Routes(experts_BTU, chosen_BTU / jnp.sum(chosen_BTU, axis=-1, keepdims=True))
    return Routes(experts_BTU, nn.softmax(chosen_BTU, axis=-1))


def measure(logits_BTE: jax.Array, experts_BTU: jax.Array, is_token_BT: jax.Array | None = None) -> RouterMeasures:
    """Computes the balance loss, the z-loss and the load of a router's choice; differentiable in the logits.

    Args:
      is_token_BT: bool, False at padding. None: there is no padding.
    """
    num_experts = logits_BTE.shape[-1]
    is_token_BT = jnp.ones(logits_BTE.shape[:2], bool) if is_token_BT is None else is_token_BT
    share_BT1 = (is_token_BT / jnp.maximum(jnp.sum(is_token_BT), 1))[..., None]  # of a token in the means
    load_BTE = jnp.mean(jax.nn.one_hot(experts_BTU, num_experts, dtype=jnp.float32), axis=2)
    load_E, mean_E = (jnp.sum(share_BT1 * x, axis=(0, 1)) for x in (load_BTE, nn.softmax(logits_BTE, axis=-1)))
    z = jnp.sum(share_BT1 * jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)))
    return RouterMeasures(num_experts * jnp.sum(load_E * mean_E), z, load_E)


@jax.custom_vjp
def with_load_gradient(x: jax.Array, bias_E: jax.Array, load_E: jax.Array) -> jax.Array:
    """`x`, with each expert's excess over the mean load as the gradient of `bias_E`, whatever the loss.

    The optimizer lowers the bias of experts with too many tokens by the sign of it (Wang et al. 2024, algorithm 1).
    """
    return x


def _load_backward(load_E: jax.Array, dx: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    return dx, load_E - jnp.mean(load_E), jnp.zeros_like(load_E)


with_load_gradient.defvjp(lambda x, bias_E, load_E: (x, load_E), _load_backward)


class Experts(nn.Module):
    """Feed-forward layers with stacked kernels, each applied to the tokens that are routed to it; (B, T, D)."""

    config: GPTConfig
    out_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x_BTD: jax.Array, routes: Routes, is_token_BT: jax.Array | None = None) -> jax.Array:
        config = self.config
        width, ffw = config.embed_dim, config.feed_forward_dim
        init = nn.initializers.normal(config.kernel_init_std)
        layers = {"up": ExpertDense(config, (width, ffw), ("embed", "ffw"), init, name="up")()}
        if config.gated:
            layers["gate"] = ExpertDense(config, (width, ffw), ("embed", "ffw"), init, name="gate")()
        layers["down"] = ExpertDense(config, (ffw, width), ("ffw", "embed"), self.out_init, name="down")()

        def feed_forward(layout: Layout, x: jax.Array, layers: dict[str, Dense]) -> jax.Array:
            up = layout.product(x, layers["up"])
            gate = layout.product(x, layers["gate"]) if config.gated else None
            return layout.product(activate(config, up, gate), layers["down"])

        return apply_experts(config, feed_forward, x_BTD, within_capacity(config, routes, is_token_BT), layers)


class ExpertDense(nn.Module):
    """The kernels (E, inputs, outputs) and biases (E, outputs) of one linear layer of every expert."""

    config: GPTConfig
    shape: tuple[int, int]  # inputs, outputs
    axes: tuple[str, str]
    initializer: nn.initializers.Initializer

    @nn.compact
    def __call__(self) -> Dense:
        config = self.config
        assert config.num_experts is not None
        init = partitioned(self.initializer, "experts", *self.axes, inputs=1)
        kernel = nn.unbox(self.param("kernel", init, (config.num_experts, *self.shape), config.param_dtype))
        if not config.ffw_bias:
            return Dense(kernel.astype(config.dtype), None)
        init = partitioned(nn.initializers.zeros, "experts", "ffw" if self.axes[1] == "ffw" else "norm")
        bias = nn.unbox(self.param("bias", init, (config.num_experts, self.shape[1]), config.param_dtype))
        return Dense(kernel.astype(config.dtype), bias.astype(config.dtype))
