"""Conversion of weights for decoding: one tree a layer, in lower precision if requested.

Decoding reads every weight for every token, so the size of the weights determines the time of a token.
"""

import dataclasses
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.config import GPTConfig, UserError
from gptjax.models import peft
from gptjax.models.axis_roles import ParameterAxes
from gptjax.models.decoding import unstack
from gptjax.models.few_rows import OutputMajor, StoredKernel, is_output_major
from gptjax.models.gpt import GPT, model_axes

WeightFormat = Literal["as_given", "bfloat16", "int8", "stacked"]


class Int8(struct.PyTreeNode, StoredKernel):
    """A matrix of 8-bit integers with a scale for each output, dequantised where a layer reads it."""

    kind: ClassVar[str] = "a quantised matrix"
    values: jax.Array  # int8
    scale: jax.Array  # float32; 1 along the axes that the product sums over

    @classmethod
    def quantize(cls, kernel: jax.Array, summed_axes: tuple[int, ...]) -> "Int8":
        """Quantises symmetrically: each output has 255 levels between minus and plus its largest absolute weight."""
        kernel = kernel.astype(jnp.float32)  # bfloat16 quotients are too coarse: some round to 128, out of range
        scale = jnp.max(jnp.abs(kernel), axis=summed_axes, keepdims=True) / 127
        values = jnp.round(kernel / jnp.where(scale == 0, 1, scale)).astype(jnp.int8)
        return cls(values, scale)

    def unbox(self) -> jax.Array:
        return self.values.astype(self.scale.dtype) * self.scale


def summed_axes(axes: ParameterAxes) -> tuple[int, ...]:
    """The axes that a product with a parameter sums over; empty: it is a vector, or a table read a row at a time.

    A token embedding is a matrix because the tied head multiplies by it.
    """
    if axes.is_kernel:
        return axes.having("input")
    return axes.having("output") if "vocabulary" in axes.roles else ()


def prepare(model: GPT, params: Any, weights: WeightFormat) -> tuple[GPT, Any]:
    """Converts a model and its parameters for `gptjax.models.decoding`.

    Args:
      weights: "as_given": an unstacked copy, with matrices cast once to the activations' dtype, and stored in the
        layout that the platform multiplies few rows by the fastest; "bfloat16": the same with activations and matrices
        in bfloat16; "int8": matrices quantised to 8 bits, with products in the activations' dtype; "stacked": no copy,
        which is slower, as every token slices the layers out of the stack. The token embedding is one of the matrices.

    Raises:
      UserError: unknown `weights`.
    """
    if weights not in get_args(WeightFormat):
        raise UserError(f"weights={weights!r} is not one of {', '.join(get_args(WeightFormat))}")
    if weights == "stacked":
        return model, params
    config = model.config
    if weights == "bfloat16":
        config = dataclasses.replace(config, dtype="bfloat16")
    return GPT(config), _prepare(params, config=config, int8=weights == "int8", output_major=is_output_major())


@partial(jax.jit, static_argnames=("config", "int8", "output_major"))
def _prepare(params: Any, config: GPTConfig, int8: bool, output_major: bool) -> Any:
    axes = model_axes(config)

    def convert(path: str, layer_axes: int, leaf: jax.Array) -> jax.Array | Int8 | OutputMajor:
        summed = tuple(axis - layer_axes for axis in summed_axes(axes[path])) if path in axes else ()
        if not summed or path.startswith("vision/"):  # read once for an image, not for every token
            return leaf
        if int8:
            return Int8.quantize(leaf, summed)
        leaf = leaf.astype(config.dtype)
        is_dense = axes[path].is_kernel and "expert" not in axes[path].roles
        return OutputMajor.of(leaf, len(summed)) if output_major and is_dense else leaf

    def convert_tree(path: str, layer_axes: int, tree: Any) -> Any:
        leaves = {name: convert(path + name, layer_axes, leaf) for name, leaf in peft.flatten(tree).items()}
        return peft.unflatten(leaves)

    unstacked = unstack(config, params)
    period = len(config.attention_pattern)
    layers = [
        convert_tree(f"layers/block_{number % period}/", 1, layer) for number, layer in enumerate(unstacked["layers"])
    ]
    rest = {name: part for name, part in unstacked.items() if name != "layers"}
    return {**convert_tree("", 0, rest), "layers": layers}
