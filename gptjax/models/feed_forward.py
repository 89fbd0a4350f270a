"""Position-wise feed-forward layers, and adapters after them."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.models.attention import product_settings
from gptjax.models.elementwise import ACTIVATIONS, activation
from gptjax.parallel.mesh import constrain, partitioned, scattered
from gptjax.parallel.platforms import platform_defaults


def activate(config: GPTConfig, up: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The input of a feed-forward layer's second product: activation(up), or activation(gate) * up with limits."""
    if gate is None:
        return activation(config)(up)
    if config.gate_limit is not None:
        gate, up = jnp.minimum(gate, config.gate_limit), jnp.clip(up, -config.gate_limit, config.gate_limit)
    return activation(config)(gate) * (up + config.up_offset if config.up_offset else up)


class MLP(nn.Module):
    """Position-wise feed-forward layer, gated or not; (B, T, D) to (B, T, D)."""

    config: GPTConfig
    out_init: nn.initializers.Initializer
    deterministic: bool = True

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        config = self.config

        def dense(
            width: int, init: nn.initializers.Initializer, axes: tuple[str, str], bias: str, name: str
        ) -> nn.Dense:
            return nn.Dense(
                width,
                use_bias=config.ffw_bias,
                kernel_init=partitioned(init, *axes, inputs=1),
                bias_init=partitioned(nn.initializers.zeros, bias),
                name=name,
                **product_settings(config, self.deterministic),
            )

        init = nn.initializers.normal(config.kernel_init_std)
        up = dense(config.feed_forward_dim, init, ("embed", "ffw"), "ffw", "up")
        down = dense(config.embed_dim, self.out_init, ("ffw", "embed"), "norm", "down")
        gate = dense(config.feed_forward_dim, init, ("embed", "ffw"), "ffw", "gate") if config.gated else None
        up_BTF, gate_BTF = up(x_BTD), None if gate is None else gate(x_BTD)

        def activated(down: nn.Dense, up_BTF: jax.Array, gate_BTF: jax.Array | None) -> jax.Array:
            return down(constrain(activate(config, up_BTF, gate_BTF), "batch", "length", "ffw"))

        if platform_defaults().recompute_activations:
            activated = nn.remat(activated, prevent_cse=False)
        return scattered(activated(down, up_BTF, gate_BTF))


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
