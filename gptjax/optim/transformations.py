"""The update rules of the optimizers: those of Adam, Muon and Adafactor, as Optax implements them.

This module tells Optax which axes of our arrays form matrices: layers are stacked on a leading axis, and kernels of
attention have an axis of heads. It reads that from the roles of the axes (`models.axis_roles`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gptjax.config import OptimizerConfig
from gptjax.models.axis_roles import ParameterAxes
from gptjax.parallel.mesh import LogicalAxes

Axes = Mapping[str, ParameterAxes]  # by parameter path

# Root mean square of Muon's updates. It is that of AdamW's, so that one learning rate serves both (Liu et al. 2025,
# "Muon is scalable for LLM training", section 2.2).
MUON_RMS = 0.2


def scale_by_rule(config: OptimizerConfig, axes: Axes) -> optax.GradientTransformation:
    """The update rule of `optimizer.name`. If the parameters are boxed with logical axes, so is the state.

    Args:
      axes: of all parameters.
    """
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=_first_moment_dtype(config))
    match config.name:
        case "adamw":
            return adam
        case "adafactor":
            return _adafactor(config, axes)
        case "muon":
            return _muon(config, axes, adam)


def _muon(config: OptimizerConfig, axes: Axes, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon for the kernels of layers, `adam` for all other parameters."""

    def dimensions(path: str, _: Any) -> MuonDimensionNumbers | None:
        return _matrix(axes[path])

    def label(path: str, _: Any) -> str:
        return "adam" if _matrix(axes[path]) is None else "muon"

    first = _first_moment_dtype(config)
    muon = scale_by_muon(beta=config.muon_momentum, mu_dtype=first, weight_dimension_numbers=_map_paths(dimensions))
    return optax.partition({"muon": optax.chain(muon, _scale_to_adam(axes)), "adam": adam}, _map_paths(label))


def _first_moment_dtype(config: OptimizerConfig) -> str | None:
    """The dtype of first moments; None: that of the parameters, float32."""
    return None if config.first_moment_dtype == "param_dtype" else config.first_moment_dtype


def _map_paths(function: Callable[[str, Any], Any]) -> Callable[[Any], Any]:
    """A function from a tree to the tree of `function(path, leaf)`; a boxed array is one leaf."""

    def mapped(tree: Any) -> Any:
        def of_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
            return function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf)

        return jax.tree_util.tree_map_with_path(of_leaf, tree, is_leaf=_is_box)

    return mapped


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, LogicalAxes)


# --- Muon (Jordan et al. 2024) ----------------------------------------------------------------------------------------


def _matrix(axes: ParameterAxes) -> MuonDimensionNumbers | None:
    """The input and output axes of a kernel in the stacked layers, whose other axes are batch axes; None: not one.

    Queries, keys and values are a matrix each.
    """
    if not (axes.is_stacked and axes.is_kernel):
        return None
    return MuonDimensionNumbers(axes.having("input"), axes.having("output"))


def _scale_to_adam(axes: Axes) -> optax.GradientTransformation:
    """Multiplies orthogonal matrices of m inputs and n outputs by MUON_RMS sqrt(max(m, n)), so that RMS is MUON_RMS."""

    def scaled(path: str, update: jax.Array) -> jax.Array:
        matrix = _matrix(axes[path])
        assert matrix is not None, path
        sizes = [np.prod([update.shape[axis] for axis in group]) for group in matrix]
        return update * float(MUON_RMS * np.sqrt(max(sizes)))

    return optax.stateless(lambda updates, params: _map_paths(scaled)(updates))


# --- Adafactor (Shazeer & Stern 2018) ---------------------------------------------------------------------------------


def _adafactor(config: OptimizerConfig, axes: Axes) -> optax.GradientTransformation:
    """Adafactor with given learning rates, as in Zhai et al. 2021, section 3.5.

    Updates are not scaled by the size of the parameter, and there is a first moment if beta1 > 0.
    """

    def decay(step: Any, exponent: Any) -> jax.Array:
        return jnp.minimum(config.beta2, 1 - (step + 1.0) ** -exponent)

    second = optax.scale_by_factored_rms(min_dim_size_to_factor=config.min_factored_dim, decay_rate_fn=decay)
    transforms = [_for_each_array(optax.chain(second, optax.clip_by_block_rms(1.0)), axes)]
    if config.beta1 > 0:
        transforms.append(optax.ema(config.beta1, accumulator_dtype=_first_moment_dtype(config)))
    return optax.chain(*transforms)


def _for_each_array(transform: optax.GradientTransformation, axes: Axes) -> optax.GradientTransformation:
    """Applies `transform` to each array separately, and to each layer of stacked layers.

    Applied to the stack, Optax would factor along the axis of layers where that is one of the two largest.
    """

    def init(path: str, param: Any) -> Any:
        stacked = axes[path].is_stacked
        value = param.value if _is_box(param) else param
        state = (jax.vmap(transform.init) if stacked else transform.init)(value)
        return _boxed(state, param, stacked) if _is_box(param) else state

    def update(path: str, update: jax.Array, state: Any, param: jax.Array) -> Any:
        return (jax.vmap(transform.update) if axes[path].is_stacked else transform.update)(update, state, param)

    def update_all(updates: Any, states: Any, params: Any = None) -> tuple[Any, Any]:
        paths = _map_paths(lambda path, _: path)(updates)
        pairs = jax.tree.map(update, paths, updates, states, params)
        new_updates, new_states = (jax.tree.map(lambda _, pair, i=i: pair[i], paths, pairs) for i in (0, 1))
        return new_updates, new_states

    return optax.GradientTransformation(_map_paths(init), update_all)


def _boxed(state: Any, param: LogicalAxes, stacked: bool) -> Any:
    """Boxes the state of `_adafactor` for one array with the logical axes that its parts keep."""
    shape, names = param.value.shape, param.names
    *_, columns, rows = np.argsort(shape[stacked:]) + stacked if len(shape) > 1 + stacked else (0, 0)

    def box(leaf: jax.Array, dropped: int | None) -> Any:
        kept = [axis for axis in range(len(shape)) if axis != dropped]
        is_part = leaf.shape == tuple(shape[axis] for axis in kept)  # else a placeholder for a part that is not used
        return LogicalAxes(leaf, tuple(names[axis] for axis in kept)) if is_part else leaf

    factored, *rest = state
    parts = {"v_row": box(factored.v_row, rows), "v_col": box(factored.v_col, columns), "v": box(factored.v, None)}
    return (factored._replace(**parts), *rest)
