"""Weights as decoding wants them: one tree a layer, and smaller numbers where asked for.

Decoding reads every weight for every token, so their bytes are what a token costs.
"""

import dataclasses
from functools import partial
from typing import Any, Literal, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import struct

from gptjax.config import GPTConfig, UserError
from gptjax.models.decoding import unstack
from gptjax.models.gpt import GPT

Weights = Literal["as_given", "bfloat16", "int8", "stacked"]


class Int8(struct.PyTreeNode, nn.meta.AxisMetadata):
    """A matrix as 8-bit integers and one scale for each output, which a layer that reads it gets back as floats.

    The layers do not know of it: Flax unboxes a parameter where it is read.
    """

    values: jax.Array  # int8
    scale: jax.Array  # float32; 1 along the axes that the product sums over

    @classmethod
    def quantize(cls, kernel: jax.Array, summed_axes: tuple[int, ...]) -> "Int8":
        """Rounds to the nearest of 255 steps between minus and plus the largest weight of each output."""
        kernel = kernel.astype(jnp.float32)  # bfloat16 quotients are too coarse: some round to 128, out of range
        scale = jnp.max(jnp.abs(kernel), axis=summed_axes, keepdims=True) / 127
        values = jnp.round(kernel / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
        return cls(values, scale)

    def unbox(self) -> jax.Array:
        return self.values.astype(self.scale.dtype) * self.scale

    def replace_boxed(self, val: Any) -> Any:
        raise NotImplementedError("a quantised matrix is read only")

    def add_axis(self, index: int, params: dict[Any, Any]) -> "Int8":
        raise NotImplementedError("a quantised matrix belongs to one layer")

    remove_axis = add_axis


# The axes that the product with a parameter sums over. All other parameters are vectors, or read a row at a time.
SUMMED_AXES: dict[str, tuple[int, ...]] = {
    "qkv": (0,),
    "out": (0, 1),
    "up": (0,),
    "down": (0,),
    "token_embedding": (1,),
}


def prepare(model: GPT, params: Any, weights: Weights) -> tuple[GPT, Any]:
    """The model and its unstacked parameters, for `gptjax.models.decoding`.

    Args:
      weights: "as_given": a copy, layer by layer, its matrices of the activations' dtype, to which every token would
        round them again; "bfloat16": activations, and so matrices, of 2 bytes; "int8": matrices of 1 byte, computed
        with in the activations' dtype; "stacked": no copy, every token cuts the layers out of their stack again, which
        takes longer. The token embedding is a matrix here.

    Raises:
      UserError: unknown `weights`.
    """
    if weights not in get_args(Weights):
        raise UserError(f"weights={weights!r} is not one of {', '.join(get_args(Weights))}")
    if weights == "stacked":
        return model, params
    config = model.config
    if weights == "bfloat16":
        config = dataclasses.replace(config, dtype="bfloat16")
    return GPT(config), _prepare(params, config=config, int8=weights == "int8")


@partial(jax.jit, static_argnames=("config", "int8"))
def _prepare(params: Any, config: GPTConfig, int8: bool) -> Any:
    def convert(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array | Int8:
        layer, name = (key.key for key in path[-2:])
        if layer not in SUMMED_AXES or name == "bias":
            return leaf
        return Int8.quantize(leaf, SUMMED_AXES[layer]) if int8 else leaf.astype(config.dtype)

    return jax.tree_util.tree_map_with_path(convert, unstack(config, params))
