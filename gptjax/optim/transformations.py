"""What a gradient becomes before the learning rate: Adam's, Muon's and Adafactor's rules, all of them Optax's.

What is here tells Optax which axes of our arrays are matrices: layers are stacked on a leading axis, and kernels of
attention have an axis of heads.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax.contrib import MuonDimensionNumbers, scale_by_muon

from gptjax.config import OptimizerConfig
from gptjax.models import peft
from gptjax.models.heads import VALUE
from gptjax.parallel.mesh import LogicalAxes

# Of Muon's updates, whose root mean square is then that of AdamW's: one learning rate serves both (Liu et al. 2025,
# "Muon is scalable for LLM training", section 2.2).
MUON_RMS = 0.2


def scale_by_rule(config: OptimizerConfig) -> optax.GradientTransformation:
    """The rule of `optimizer.name`. Params may be boxed with their logical axes: then the state is."""
    first = _first_moment_dtype(config)
    adam = optax.scale_by_adam(config.beta1, config.beta2, config.eps, mu_dtype=first)
    if config.name == "adamw":
        return adam
    if config.name == "adafactor":
        return _adafactor(config)
    muon = scale_by_muon(beta=config.muon_momentum, mu_dtype=first, weight_dimension_numbers=_with_paths(_matrix))

    def label(path: str, _: Any) -> str:
        return "adam" if _matrix(path, _) is None else "muon"

    return optax.partition({"muon": optax.chain(muon, _scale_to_adam()), "adam": adam}, _with_paths(label))


def _first_moment_dtype(config: OptimizerConfig) -> str | None:
    """None: that of the parameters."""
    return None if config.first_moment_dtype == "param_dtype" else config.first_moment_dtype


def _with_paths(function: Any) -> Any:
    """A tree to the tree of `function(path, leaf)`; a box counts as a leaf."""

    def of_tree(tree: Any) -> Any:
        def of_leaf(path: tuple[Any, ...], leaf: Any) -> Any:
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            return function(name.removeprefix(f"{VALUE}/"), leaf)

        return jax.tree_util.tree_map_with_path(of_leaf, tree, is_leaf=_is_box)

    return of_tree


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, LogicalAxes)


# --- Muon (Jordan et al. 2024) ----------------------------------------------------------------------------------------


def _matrix(path: str, leaf: Any) -> MuonDimensionNumbers | None:
    """The axes of a kernel of stacked layers that make its inputs and outputs; all others count matrices.

    None: not a matrix of a layer. Queries, keys and values are a matrix each.
    """
    if not (peft.is_stacked(path) and path.endswith("/kernel")):
        return None
    axes = range(1, len(leaf.names) if _is_box(leaf) else leaf.ndim)
    inputs = peft.input_axes(path)
    outputs = axes[inputs + path.endswith("attention/qkv/kernel") :]
    return MuonDimensionNumbers(tuple(axes[:inputs]), tuple(outputs))


def _scale_to_adam() -> optax.GradientTransformation:
    """Orthogonal matrices of m inputs and n outputs times MUON_RMS sqrt(max(m, n)), which makes that their RMS."""

    def scaled(path: str, update: jax.Array) -> jax.Array:
        axes = _matrix(path, update)
        assert axes is not None
        sizes = [np.prod([update.shape[axis] for axis in group]) for group in axes]
        return update * float(MUON_RMS * np.sqrt(max(sizes)))

    return optax.stateless(lambda updates, params: _with_paths(scaled)(updates))


# --- Adafactor (Shazeer & Stern 2018) ---------------------------------------------------------------------------------


def _adafactor(config: OptimizerConfig) -> optax.GradientTransformation:
    """With given learning rates, as Zhai et al. 2021, section 3.5: no factor of the parameter's own size, and a first
    moment where beta1 > 0.
    """

    def decay(step: Any, exponent: Any) -> jax.Array:
        return jnp.minimum(config.beta2, 1 - (step + 1.0) ** -exponent)

    second = optax.scale_by_factored_rms(min_dim_size_to_factor=config.min_factored_dim, decay_rate_fn=decay)
    transforms = [_each_alone(optax.chain(second, optax.clip_by_block_rms(1.0)))]
    if config.beta1 > 0:
        transforms.append(optax.ema(config.beta1, accumulator_dtype=_first_moment_dtype(config)))
    return optax.chain(*transforms)


def _each_alone(transform: optax.GradientTransformation) -> optax.GradientTransformation:
    """`transform` of each array by itself, and of stacked layers of each layer by itself.

    Unstacked, Optax would factor over the number of layers where that is a large axis.
    """

    def init(path: str, param: Any) -> Any:
        value = param.value if _is_box(param) else param
        state = (jax.vmap(transform.init) if peft.is_stacked(path) else transform.init)(value)
        return _boxed(state, param, stacked=peft.is_stacked(path)) if _is_box(param) else state

    def update(path: str, update: jax.Array, state: Any, param: jax.Array) -> Any:
        return (jax.vmap(transform.update) if peft.is_stacked(path) else transform.update)(update, state, param)

    def update_all(updates: Any, states: Any, params: Any = None) -> tuple[Any, Any]:
        paths = _with_paths(lambda path, _: path)(updates)
        pairs = jax.tree.map(update, paths, updates, states, params)
        new_updates, new_states = (jax.tree.map(lambda _, pair, i=i: pair[i], paths, pairs) for i in (0, 1))
        return new_updates, new_states

    return optax.GradientTransformation(_with_paths(init), update_all)


def _boxed(state: Any, param: LogicalAxes, stacked: bool) -> Any:
    """The state of `_adafactor` for one array, whose parts lie as the axes that they keep."""
    shape, names = param.value.shape, param.names
    *_, columns, rows = np.argsort(shape[stacked:]) + stacked if len(shape) > 1 + stacked else (0, 0)

    def box(leaf: jax.Array, dropped: int | None) -> Any:
        kept = [axis for axis in range(len(shape)) if axis != dropped]
        is_part = leaf.shape == tuple(shape[axis] for axis in kept)  # else it stands for a part that there is not
        return LogicalAxes(leaf, tuple(names[axis] for axis in kept)) if is_part else leaf

    factored, *rest = state
    parts = {"v_row": box(factored.v_row, rows), "v_col": box(factored.v_col, columns), "v": box(factored.v, None)}
    return (factored._replace(**parts), *rest)
