"""Sizes of a layer's weights and activations on one device, by formula; memory and traffic are multiples of them."""

import math
from collections.abc import Mapping

import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.scaling.parameters import expert_parameter_count, parameter_count


def gathered_parameters(model: GPTConfig, mesh: Mapping[str, int]) -> float:
    """Parameters on a device when they are gathered over fsdp: sharded over tensor, and experts over expert."""
    experts = expert_parameter_count(model)
    return (parameter_count(model) - experts + experts / mesh["expert"]) / mesh["tensor"]


def expert_rows(model: GPTConfig, mesh: Mapping[str, int], tokens: float) -> float:
    """Rows of a device's arrays of assignments of tokens to experts; 0 without experts.

    With mesh axis expert, it is the size of the buffers of the all-to-all, which hold the worst case: that all tokens
    of a device choose experts of the same device (`models.expert_dispatch`).

    Args:
      tokens: of a device.
    """
    if model.num_experts is None:
        return 0.0
    shards = mesh["expert"]
    return tokens * shards * min(model.experts_per_token, model.num_experts // shards)


def layer_bytes(model: GPTConfig, mesh: Mapping[str, int], tokens: float) -> float:
    """Bytes of all activations of a layer that its backward pass reads (Korthikanti et al. 2022, section 4.1).

    Per token, in numbers: input, queries, keys, values and output of attention; two normalised inputs; dropout masks of
    a byte each; the input, product and activation of the feed-forward layer. Attention scores are not among them.

    Args:
      tokens: of a device.
    """
    D, size = model.embed_dim, jnp.dtype(model.dtype).itemsize
    width = D + qkv_width(model) + attention_width(model) + 2 * D + D
    if model.num_experts is None:
        width += D + hidden_width(model)
    return size * tokens * width / mesh["tensor"] + expert_bytes(model, mesh, tokens)


def expert_bytes(model: GPTConfig, mesh: Mapping[str, int], tokens: float) -> float:
    """Bytes of all activations of a layer's experts: inputs, products, activations, outputs; 0 without experts.

    Inputs and outputs are whole on each device of tensor. With mesh axis expert there are two more arrays of their
    size, sent and received.
    """
    rows, size = expert_rows(model, mesh, tokens), jnp.dtype(model.dtype).itemsize
    ends = 4 if mesh["expert"] > 1 else 2
    return size * rows * (ends * model.embed_dim + hidden_width(model) / mesh["tensor"])


def saved_bytes(model: GPTConfig, mesh: Mapping[str, int], tokens: float) -> float:
    """Bytes of the activations of a layer that `model.remat` keeps for the backward pass.

    No policy but "none" keeps the grouped products of experts.
    """
    if model.remat == "none":
        return layer_bytes(model, mesh, tokens)
    products = model.embed_dim + qkv_width(model) + model.embed_dim
    if model.num_experts is None:
        products += (2 if model.gated else 1) * model.feed_forward_dim
    attention = attention_width(model)
    width = {
        "cheap": products + attention,
        "dots": products,
        "attention": model.embed_dim + attention,
        "full": model.embed_dim,
        "offload": 0,
    }[model.remat]
    return jnp.dtype(model.dtype).itemsize * tokens * width / mesh["tensor"]


def qkv_width(model: GPTConfig) -> int:
    """Queries, keys and values of a position, in numbers."""
    return (model.num_heads + 2 * model.kv_heads) * model.head_dim


def key_value_width(model: GPTConfig, shards: int) -> int:
    """Keys and values of a position, in numbers, for `shards` devices along tensor.

    Heads are repeated where there are too few for that many devices (`models.dot_product.divisible_heads`).
    """
    heads = math.lcm(model.kv_heads, shards)
    return 2 * model.head_dim * (heads if model.num_heads % heads == 0 else model.num_heads)


def attention_width(model: GPTConfig) -> int:
    """Output of attention of a position, in numbers."""
    return model.num_heads * model.head_dim


def hidden_width(model: GPTConfig) -> int:
    """Products and activation of a feed-forward layer at a position, in numbers."""
    return (3 if model.gated else 2) * model.feed_forward_dim
