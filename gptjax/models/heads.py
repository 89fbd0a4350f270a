"""Linear heads on a GPT's hidden states: labels, spans, rewards, values (Radford et al. 2018, section 3.2)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.models.gpt import GPT, init_params
from gptjax.models.parametrization import scaled_initialisation
from gptjax.parallel.mesh import partitioned

VALUE = "value"  # top-level key of the parameters of a value function: a separate GPT with a head


class Head(nn.Module):
    """A linear layer over hidden states; (..., D) to float32 (..., outputs)."""

    config: GPTConfig
    outputs: int
    dropout: float

    @nn.compact
    def __call__(self, x_D: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        if config.width_factor != 1:  # `GPT.normalise` divided by it, for the head of the vocabulary
            x_D = x_D * config.width_factor
        return nn.Dense(
            self.outputs,
            dtype="float32",
            param_dtype=config.param_dtype,
            precision=config.precision,
            kernel_init=partitioned(nn.initializers.normal(config.kernel_init_std), "embed", "outputs", inputs=1),
            bias_init=partitioned(nn.initializers.zeros, "outputs"),
            name="linear",
        )(nn.Dropout(self.dropout, deterministic=deterministic)(x_D))


def init_with_head(gpt: GPT, head: Head, rng: jax.Array) -> Any:
    """Initialises all parameters, boxed: those of the GPT, and those of the head under "head"."""
    gpt_rng, head_rng = jax.random.split(rng)
    params = init_params(gpt, gpt_rng)
    x_BD = jnp.zeros((1, gpt.config.embed_dim))
    head_params = scaled_initialisation(gpt.config, head.init(head_rng, x_BD, True)["params"])
    return {**params, "head": head_params}
