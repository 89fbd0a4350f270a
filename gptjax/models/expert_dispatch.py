"""Applies the experts of a mixture to the tokens that are routed to them, on one device or over the mesh.

Two layouts compute the products. Grouped: the tokens are sorted by expert, and each is multiplied by the kernels of its
experts only. Dense: every expert computes every token, and the outputs of the others have weight 0; that is E /
experts_per_token times the work, but needs no kernel for grouped products.

With the mesh axis "expert", each of its n devices holds E / n experts, and its own tokens. Tokens are sent to the
devices of their experts and back by two all-to-alls, with buffers for the worst case, so that no token is lost.

Shapes: X tokens of a device, E experts, U experts of a token, N rows that are computed (X U assignments of tokens to
experts), D and F the widths of inputs and outputs.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig
from gptjax.parallel.mesh import axis_size, fitting_spec, partition_spec
from gptjax.parallel.platforms import platform_defaults


class Routes(NamedTuple):
    """The experts of each token, int, and the weights of their outputs, float32; both (B, T, U)."""

    experts_BTU: jax.Array
    weights_BTU: jax.Array


class Dense(flax.struct.PyTreeNode):
    """A linear layer of every expert."""

    kernel_EDF: Any  # array, or its sharding
    bias_EF: Any  # array or its sharding; None: there is none


class Layout(Protocol):
    """How the rows of expert computations are arranged."""

    def product(self, x: jax.Array, layer: Dense) -> jax.Array:
        """Applies a linear layer of the experts to their rows."""
        ...


class GroupedRows(NamedTuple):
    """Rows (N, D) sorted by expert.

    Attributes:
      sizes_E: number of rows of each expert; rows after these belong to no expert, and are 0 in every product.
      expert_N: the expert of each row, E for none.
    """

    sizes_E: jax.Array
    expert_N: jax.Array
    precision: str | None

    def product(self, x_ND: jax.Array, layer: Dense) -> jax.Array:
        y_NF = jax.lax.ragged_dot(x_ND, layer.kernel_EDF, self.sizes_E, precision=self.precision)
        if layer.bias_EF is None:
            return y_NF
        return y_NF + jnp.take(layer.bias_EF, self.expert_N, axis=0, mode="fill", fill_value=0)


class AllRows(NamedTuple):
    """All rows for each expert: (N, D), or (E, N, D) from the second product on."""

    precision: str | None

    def product(self, x_END: jax.Array, layer: Dense) -> jax.Array:
        axes = "ND,EDF->ENF" if x_END.ndim == 2 else "END,EDF->ENF"
        y_ENF = jnp.einsum(axes, x_END, layer.kernel_EDF, precision=self.precision)
        return y_ENF if layer.bias_EF is None else y_ENF + layer.bias_EF[:, None]


Layers = dict[str, Dense]
FeedForward = Callable[[Layout, jax.Array, Layers], jax.Array]


def apply_experts(
    config: GPTConfig, feed_forward: FeedForward, x_BTD: jax.Array, routes: Routes, layers: Layers
) -> jax.Array:
    """The weighted sum of each token's experts, (B, T, D).

    Args:
      feed_forward: (layout, rows, layers) -> rows: an expert's computation.
      layers: kernels sharded as the parameters are, along the logical axes experts, embed and ffw.
    """
    if jax.sharding.get_abstract_mesh().empty:
        x_XD, routes = x_BTD.reshape(-1, x_BTD.shape[-1]), jax.tree.map(_flat, routes)
        return _local(config, feed_forward, x_XD, routes, layers).reshape(x_BTD.shape)
    rows = fitting_spec(x_BTD.shape[:2], "batch", "length")
    out = fitting_spec(x_BTD.shape[:2], "batch", "sequence")
    scatters = axis_size("tensor") > 1 and out[1] is not None

    def on_device(x_BTD: jax.Array, routes: Routes, layers: Layers) -> jax.Array:
        x_XD, routes = x_BTD.reshape(-1, x_BTD.shape[-1]), jax.tree.map(_flat, routes)
        out_XD = _on_device(config, feed_forward, x_XD, routes, _gathered(layers), exchanged=rows[0] is not None)
        out_BTD = out_XD.reshape(x_BTD.shape)
        if scatters:
            return jax.lax.psum_scatter(out_BTD, "tensor", scatter_dimension=1, tiled=True)
        return out_BTD if axis_size("tensor") == 1 else jax.lax.psum(out_BTD, "tensor")

    return jax.shard_map(
        on_device, in_specs=(rows, rows, _layer_specs(layers)), out_specs=out if scatters else rows, check_vma=False
    )(x_BTD, routes, layers)


def _flat(x_BTU: jax.Array) -> jax.Array:
    return x_BTU.reshape(-1, x_BTU.shape[-1])


def _layer_specs(layers: Layers) -> Any:
    """The mesh axes of the kernels and biases, as the parameters are sharded."""

    def specs(name: str, layer: Dense) -> Dense:
        kernel, bias = ("experts", "embed", "ffw"), ("experts", "ffw")
        if name == "down":
            kernel, bias = ("experts", "ffw", "embed"), ("experts", "norm")
        return Dense(partition_spec(kernel), None if layer.bias_EF is None else partition_spec(bias))

    return {name: specs(name, layer) for name, layer in layers.items()}


def _gathered(layers: Layers) -> Layers:
    """All-gathers a device's kernels over fsdp; the bias after the sum over tensor is kept on one device only."""

    def gather(name: str, layer: Dense) -> Dense:
        kernel, bias = layer.kernel_EDF, layer.bias_EF
        if axis_size("fsdp") > 1:
            kernel = jax.lax.all_gather(kernel, "fsdp", axis=2 if name == "down" else 1, tiled=True)
        if name == "down" and bias is not None and axis_size("tensor") > 1:
            bias = jnp.where(jax.lax.axis_index("tensor") == 0, bias, 0)
        return Dense(kernel, bias)

    return {name: gather(name, layer) for name, layer in layers.items()}


# --- one device -------------------------------------------------------------------------------------------------------


def _local(config: GPTConfig, feed_forward: FeedForward, x_XD: jax.Array, routes: Routes, layers: Layers) -> jax.Array:
    """The weighted sum over the experts of `layers`; an index of E or more stands for no expert."""
    experts_XU, weights_XU = routes
    num_experts, precision = len(layers["down"].kernel_EDF), config.precision
    backend = platform_defaults().expert_backend if config.expert_backend == "auto" else config.expert_backend
    if backend == "dense":
        out_EXD = feed_forward(AllRows(precision), x_XD, layers)
        one_hot_XUE = jax.nn.one_hot(experts_XU, num_experts, dtype=jnp.float32)
        weights_XE = jnp.einsum("XUE,XU->XE", one_hot_XUE, weights_XU).astype(out_EXD.dtype)
        return jnp.einsum("EXD,XE->XD", out_EXD, weights_XE, precision=precision)
    expert_N = experts_XU.reshape(-1)
    order_N = jnp.argsort(expert_N, stable=True)
    sizes_E = jnp.bincount(expert_N, length=num_experts + 1)[:num_experts].astype(jnp.int32)
    layout = GroupedRows(sizes_E, expert_N[order_N], precision)
    out_ND = feed_forward(layout, x_XD[order_N // experts_XU.shape[1]], layers)
    out_XUD = out_ND[jnp.argsort(order_N)].reshape(*experts_XU.shape, -1)
    return jnp.einsum("XUD,XU->XD", out_XUD, weights_XU.astype(out_XUD.dtype), precision=precision)


def within_capacity(config: GPTConfig, routes: Routes, is_token_BT: jax.Array | None = None) -> Routes:
    """Removes the assignments above `expert_capacity` times an expert's mean, the last ones in the batch first.

    Args:
      is_token_BT: bool, False at padding, whose assignments are removed too. None: there is no padding.
    """
    if config.expert_capacity is None:
        return routes
    assert config.num_experts is not None
    is_token_BT = jnp.ones(routes.experts_BTU.shape[:2], bool) if is_token_BT is None else is_token_BT
    experts_BTU = jnp.where(is_token_BT[..., None], routes.experts_BTU, config.num_experts)
    mean = jnp.sum(is_token_BT) * config.experts_per_token / config.num_experts
    place_BTU = _places(experts_BTU.reshape(-1), config.num_experts).reshape(experts_BTU.shape)
    kept_BTU = is_token_BT[..., None] & (place_BTU < jnp.ceil(config.expert_capacity * mean))
    return Routes(
        jnp.where(kept_BTU, routes.experts_BTU, config.num_experts), jnp.where(kept_BTU, routes.weights_BTU, 0)
    )


def _places(group_N: jax.Array, num_groups: int) -> jax.Array:
    """The number of earlier rows of the same group, for each row."""
    order_N = jnp.argsort(group_N, stable=True)
    sizes = jnp.bincount(group_N, length=num_groups + 1)
    starts = jnp.cumsum(sizes) - sizes
    return (jnp.arange(len(group_N)) - starts[group_N[order_N]])[jnp.argsort(order_N)]


# --- the mesh axis "expert" -------------------------------------------------------------------------------------------


def _on_device(
    config: GPTConfig, feed_forward: FeedForward, x_XD: jax.Array, routes: Routes, layers: Layers, exchanged: bool
) -> jax.Array:
    """The weighted sum over all experts for a device's tokens.

    Args:
      layers: of the device's experts.
      exchanged: whether the devices along "expert" have different tokens; otherwise all have all of them, as in
        decoding a few rows, and each computes its own experts.
    """
    shards, here = axis_size("expert"), len(layers["down"].kernel_EDF)
    if shards == 1:
        return _local(config, feed_forward, x_XD, routes, layers)
    if exchanged:
        return _exchange(config, feed_forward, x_XD, routes, layers)
    first = jax.lax.axis_index("expert") * here
    local_XU = routes.experts_BTU - first
    is_here_XU = (local_XU >= 0) & (local_XU < here)
    mine = Routes(jnp.where(is_here_XU, local_XU, here), jnp.where(is_here_XU, routes.weights_BTU, 0))
    return jax.lax.psum(_local(config, feed_forward, x_XD, mine, layers), "expert")


def _exchange(
    config: GPTConfig, feed_forward: FeedForward, x_XD: jax.Array, routes: Routes, layers: Layers
) -> jax.Array:
    """Sends each token to the devices of its experts, which compute it, and sums what they send back."""
    experts_XU, weights_XU = routes
    shards, here = axis_size("expert"), len(layers["down"].kernel_EDF)
    tokens, chosen = experts_XU.shape
    room = tokens * min(chosen, here)  # most rows for one device: all tokens, with all their experts there
    expert_N = experts_XU.reshape(-1)
    device_N = expert_N // here
    slot_N = jnp.where(device_N < shards, device_N * room + _places(device_N, shards), shards * room)

    def send(rows: jax.Array) -> jax.Array:
        """Sends block j of this device's rows to device j, and returns the blocks sent to this one, in their order."""
        blocks = rows.reshape(shards, room, *rows.shape[1:])
        return jax.lax.all_to_all(blocks, "expert", 0, 0).reshape(rows.shape)

    rows_ND = jnp.zeros((shards * room, x_XD.shape[1]), x_XD.dtype)
    rows_ND = send(rows_ND.at[slot_N].set(x_XD[jnp.arange(tokens * chosen) // chosen], mode="drop"))
    local_N = send(jnp.full(shards * room, here).at[slot_N].set(expert_N % here, mode="drop"))
    weights = (local_N < here).astype(jnp.float32)
    out_ND = send(_local(config, feed_forward, rows_ND, Routes(local_N[:, None], weights[:, None]), layers))
    out_XUD = jnp.take(out_ND, slot_N, axis=0, mode="fill", fill_value=0).reshape(tokens, chosen, -1)
    return jnp.einsum("XUD,XU->XD", out_XUD, weights_XU.astype(out_XUD.dtype), precision=config.precision)
