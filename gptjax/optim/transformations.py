"""The update rules of the optimizers: those of Adam, Muon and Adafactor, as Optax implements them.

This module tells Optax which axes of our arrays form matrices: layers are stacked on a leading axis, and kernels of
attention have an axis of heads. It reads that from the roles of the axes (`models.axis_roles`).
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gptjax.config import Config, GPTConfig, OptimizerConfig
from gptjax.models.axis_roles import ParameterAxes
from gptjax.models.parametrization import is_base_size, lr_factor, orthogonal_factor
from gptjax.parallel.mesh import LogicalAxes

Axes = Mapping[str, ParameterAxes]  # by parameter path

# Root mean square of Muon's updates. It is that of AdamW's, so that one learning rate serves both (Liu et al. 2025,
# "Muon is scalable for LLM training", section 2.2).
MUON_RMS = 0.2
# Coefficients of the quintic steps, those of Amsel et al. 2025 for five steps in low precision.
POLAR_EXPRESS = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)


def scale_by_rule(config: Config, axes: Axes) -> optax.GradientTransformation:
    """The update rule of `optimizer.name`, with the learning-rate factors of `model.parametrization`.

    If the parameters are boxed with logical axes, so is the state.

    Args:
      axes: of all parameters.
    """
    optimizer, model = config.optimizer, config.model
    entrywise = optax.scale_by_adam(
        optimizer.beta1, optimizer.beta2, optimizer.eps, mu_dtype=_first_moment_dtype(optimizer)
    )
    if optimizer.name == "adafactor":
        entrywise = _adafactor(optimizer, axes)
    if not is_base_size(model):
        entrywise = optax.chain(entrywise, scale_by_path(lambda path, shape: lr_factor(model, axes[path])))
    return _muon(config, axes, entrywise) if optimizer.name == "muon" else entrywise


def scale_by_path(factor: Callable[[str, tuple[int, ...]], float | np.ndarray]) -> optax.GradientTransformation:
    """Multiplies each update by the factor of its path and shape."""

    def scaled(path: str, update: jax.Array) -> jax.Array:
        return update * factor(path, update.shape)

    return optax.stateless(lambda updates, params: _map_paths(scaled)(updates))


def _muon(config: Config, axes: Axes, adam: optax.GradientTransformation) -> optax.GradientTransformation:
    """Muon for the kernels of layers, `adam` for all other parameters."""

    def dimensions(path: str, _: Any) -> MuonDimensionNumbers | None:
        return _matrix(axes[path])

    def label(path: str, _: Any) -> str:
        return "adam" if _matrix(axes[path]) is None else "muon"

    optimizer = config.optimizer
    steps = {"ns_coeffs": POLAR_EXPRESS} if optimizer.muon_iteration == "polar_express" else {}
    muon: list[optax.GradientTransformation] = [
        scale_by_muon(
            beta=optimizer.muon_momentum,
            mu_dtype=_first_moment_dtype(optimizer),
            weight_dimension_numbers=_map_paths(dimensions),
            **steps,
        )
    ]
    if optimizer.muon_variance_decay is not None:
        muon.append(_normalise_neurons(optimizer.muon_variance_decay, axes))
    muon.append(scale_by_path(lambda path, shape: _scale_to_adam(config.model, axes[path], shape)))
    return optax.partition({"muon": optax.chain(*muon), "adam": adam}, _map_paths(label))


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


def _by_array(
    init: Callable[[str, Any], Any], update: Callable[[str, jax.Array, Any, jax.Array], tuple[jax.Array, Any]]
) -> optax.GradientTransformation:
    """A transformation with a state for each array.

    Args:
      init: (path, parameter, perhaps boxed) -> state.
      update: (path, update, state, parameter) -> the new update and state.
    """

    def update_all(updates: Any, states: Any, params: Any = None) -> tuple[Any, Any]:
        paths = _map_paths(lambda path, _: path)(updates)
        pairs = jax.tree.map(update, paths, updates, states, params)
        new_updates, new_states = (jax.tree.map(lambda _, pair, i=i: pair[i], paths, pairs) for i in (0, 1))
        return new_updates, new_states

    return optax.GradientTransformation(_map_paths(init), update_all)


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


def _scale_to_adam(model: GPTConfig, axes: ParameterAxes, shape: tuple[int, ...]) -> float:
    """The factor MUON_RMS sqrt(max(m, n)) of orthogonal matrices of m inputs and n outputs, so that RMS is MUON_RMS.

    Times the factor of `model.parametrization`.
    """
    matrix = _matrix(axes)
    assert matrix is not None, axes
    inputs, outputs = (
        math.prod(shape[axis] for axis in group) for group in (matrix.reduction_axis, matrix.output_axis)
    )
    return float(MUON_RMS * np.sqrt(max(inputs, outputs))) * orthogonal_factor(model, axes, inputs, outputs)


def _normalise_neurons(decay: float, axes: Axes) -> optax.GradientTransformation:
    """Divides the update of each output neuron by its root mean square over time (Li et al. 2025, "NorMuon").

    The Frobenius norm of each matrix stays as it is. The moving average starts at 0 without bias correction, which
    would multiply all neurons of a matrix by the same factor.
    """

    def init(path: str, param: Any) -> Any:
        value = param.value if _is_box(param) else param
        inputs = axes[path].having("input")
        square = jnp.zeros([size for axis, size in enumerate(value.shape) if axis not in inputs], jnp.float32)
        names = (name for axis, name in enumerate(param.names) if axis not in inputs) if _is_box(param) else ()
        return LogicalAxes(square, tuple(names)) if _is_box(param) else square

    def update(path: str, update: jax.Array, average: jax.Array, param: jax.Array) -> tuple[jax.Array, jax.Array]:
        matrix = _matrix(axes[path])
        assert matrix is not None, path
        inputs, both = matrix.reduction_axis, (*matrix.reduction_axis, *matrix.output_axis)
        average = decay * average + (1 - decay) * jnp.mean(jnp.square(update), axis=inputs)
        scaled = update * jax.lax.rsqrt(jnp.expand_dims(average, inputs) + 1e-20)
        before, after = (jnp.sqrt(jnp.sum(jnp.square(x), axis=both, keepdims=True)) for x in (update, scaled))
        return scaled * (before / jnp.maximum(after, 1e-20)), average

    return _by_array(init, update)


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

    return _by_array(init, update)


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
