"""What a fine-tuned model says of a text, besides its next token (Radford et al. 2018, section 3.2)."""

import flax.linen as nn
import jax

from gptjax.config import GPTConfig
from gptjax.parallel.mesh import partitioned


class Head(nn.Module):
    """A linear layer over hidden states; (..., D) to float32 (..., outputs)."""

    config: GPTConfig
    outputs: int
    dropout: float

    @nn.compact
    def __call__(self, x_D: jax.Array, deterministic: bool) -> jax.Array:
        config = self.config
        return nn.Dense(
            self.outputs,
            dtype="float32",
            param_dtype=config.param_dtype,
            precision=config.precision,
            kernel_init=partitioned(nn.initializers.normal(config.kernel_init_std), "embed", "outputs"),
            bias_init=partitioned(nn.initializers.zeros, "outputs"),
            name="linear",
        )(nn.Dropout(self.dropout, deterministic=deterministic)(x_D))
