"""Parameter-efficient fine-tuning (PEFT) as transformations of the parameter tree, independent of the layers.

`split` separates frozen from trained parameters, and `join` undoes it. LoRA (Hu et al. 2021) and AdaLoRA (Zhang et al.
2023) add low-rank leaves next to the kernels that they adapt: `low_rank` initialises them, `applied` computes with
them, `merge` folds them into the kernels.

Trees are nested dicts; their leaves are arrays, or boxed with logical axes as `model.init` leaves them. A path is that
of `jax.tree_util.keystr(path, simple=True, separator="/")` in the unboxed tree, such as "token_embedding/embedding".
"""

import contextlib
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax import traverse_util

from gptjax.config import PeftConfig, UserError
from gptjax.models.axis_roles import layer_numbers, parameter_axes
from gptjax.models.experts import ExpertDense
from gptjax.parallel.mesh import LogicalAxes

# Leaves of an adapted kernel: W + scale A B, or W + scale P diag(lambda) Q. A and P are multiplied by the inputs.
LORA = ("lora_a", "lora_b")
ADALORA = ("lora_p", "lora_lambda", "lora_q")


def flatten(params: Any) -> dict[str, Any]:
    """The leaves of a nested dict by their paths."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of leaves by their paths."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def count(tree: Any) -> int:
    """Number of parameters in `tree`, whose leaves are arrays or their shapes; 0 for None."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_matrices(tree: Any) -> int:
    """Number of kernels that AdaLoRA adapts in `tree`; the kernels of stacked layers count one for each layer."""
    lambdas = (nn.unbox(leaf) for path, leaf in flatten(tree).items() if path.endswith("/lora_lambda"))
    return sum(math.prod(lambda_.shape[:-1]) for lambda_ in lambdas)


# --- low-rank matrices ------------------------------------------------------------------------------------------------


def low_rank(config: PeftConfig, params: Any, rng: jax.Array) -> dict[str, Any]:
    """Initialises the leaves that LoRA or AdaLoRA adds next to the kernels of `targets`: a nested dict.

    For a kernel of D inputs and F outputs they are (D, A) and (A, F), float32, with all axes that the kernel has for D
    and F, after those of stacked layers and of experts. Their product is 0 at first.

    lora: lora_a is Gaussian (Hu et al. 2021, section 4.1) of variance 1 / 3D, that of the uniform distribution in the
    authors' code; lora_b is 0. A is `rank`.
    adalora: lora_p and lora_q are Gaussian (Zhang et al. 2023, section 3.1). The paper states no variance: here the
    vectors that are to become orthonormal have length 1 on average. lora_lambda, (A,), is 0. A is `initial_rank`.

    Args:
      params: boxed with logical axes, as the result is; the leaves are sharded as their kernels, along all axes but A.

    Raises:
      UserError: a regex of `targets` matches no parameter or no kernel, or A exceeds the rank of a kernel.
    """
    key = {"lora": "rank", "adalora": "initial_rank"}[config.method]
    rank = getattr(config, key)
    leaves = flatten(params)
    new: dict[str, Any] = {}
    for path in _targets(config, leaves):
        kernel, axes = leaves[path], parameter_axes(leaves[path])
        shape = kernel.value.shape
        batch, inputs, outputs = axes.having("layer", "expert"), axes.having("input"), axes.having("part", "output")
        num_inputs, num_outputs = (math.prod(shape[axis] for axis in group) for group in (inputs, outputs))
        if rank > min(num_inputs, num_outputs):
            raise UserError(f"peft.{key}={rank} is above the rank of {path}, {num_inputs} x {num_outputs}: lower it")
        # By name: the axes of the kernel before and after the rank, and the variance.
        leaf_axes: dict[str, tuple[tuple[int, ...], tuple[int, ...], float]] = {
            "lora_a": (inputs, (), 1 / (3 * num_inputs)),
            "lora_b": ((), outputs, 0.0),
            "lora_p": (inputs, (), 1 / num_inputs),
            "lora_lambda": ((), (), 0.0),
            "lora_q": ((), outputs, 1 / num_outputs),
        }
        for name in LORA if config.method == "lora" else ADALORA:
            before, after, variance = leaf_axes[name]
            place = path.removesuffix("kernel") + name
            rng_of_leaf = jax.random.fold_in(rng, zlib.crc32(place.encode()))  # independent of the other targets
            value = _gaussian(rng_of_leaf, variance, kernel.value, [*batch, *before], rank, list(after))
            names = (*(kernel.names[axis] for axis in (*batch, *before)), "rank", *(kernel.names[i] for i in after))
            new[place] = LogicalAxes(value, names, inputs=len(before))
    return unflatten(new)


def _gaussian(
    rng: jax.Array, variance: float, kernel: jax.Array, before: list[int], rank: int, after: list[int]
) -> jax.Array:
    """A float32 Gaussian array, or zeros; its shape is `kernel`'s axes `before`, the rank, `kernel`'s axes `after`."""
    shape = (*(kernel.shape[axis] for axis in before), rank, *(kernel.shape[axis] for axis in after))
    if variance == 0:
        return jnp.zeros(shape, jnp.float32)
    return math.sqrt(variance) * jax.random.normal(rng, shape, jnp.float32)


def _targets(config: PeftConfig, leaves: Mapping[str, LogicalAxes]) -> list[str]:
    """The paths of the kernels that match `targets`."""
    kernels = [path for path, leaf in leaves.items() if parameter_axes(leaf).is_kernel]
    found: set[str] = set()
    for pattern in config.targets:
        try:
            matches = [path for path in leaves if re.fullmatch(pattern, path)]
        except re.error as error:
            raise UserError(f"peft.targets: {pattern!r} is not a regular expression: {error}") from None
        others = [path for path in matches if path not in kernels]
        if others or not matches:
            wrong = f"matches {others[0]}, which is not a kernel" if others else "matches no parameter"
            raise UserError(f"peft.targets: {pattern!r} {wrong}: the kernels are {', '.join(kernels)}")
        experts = [path for path in matches if "expert" in parameter_axes(leaves[path]).roles]
        if experts and config.dropout > 0:
            raise UserError(f"peft.dropout={config.dropout} is not supported for experts, {experts[0]}: set it to 0")
        found.update(matches)
    if not found:
        raise UserError(f"peft.targets is empty: name some of the kernels, which are {', '.join(kernels)}")
    return [path for path in kernels if path in found]


def _scale(config: PeftConfig) -> float:
    """The factor of low-rank products, alpha / rank. AdaLoRA's final rank is used, so that it never changes."""
    return config.alpha / config.rank


@contextlib.contextmanager
def applied(config: PeftConfig, deterministic: bool) -> Iterator[None]:
    """Context in which models compute with the low-rank leaves in their parameters.

    A dense layer of inputs x adds scale x dropout(x) A B or scale x dropout(x) P diag(lambda) Q to its outputs, in its
    own dtype and precision; scale is `alpha` / `rank`. The kernels of experts are merged instead, without dropout.

    Args:
      deterministic: no dropout; otherwise the model needs a "dropout" rng where `dropout` is above 0.
    """

    def add_product(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        y, module = call(*args, **kwargs), context.module
        if not isinstance(module, nn.Dense | nn.DenseGeneral | ExpertDense) or context.method_name != "__call__":
            return y
        names = next((names for names in (LORA, ADALORA) if module.has_variable("params", names[0])), None)
        if names is None:
            return y
        leaves = [nn.unbox(module.get_variable("params", name)) for name in names]
        if isinstance(module, ExpertDense):
            delta_EDF = _scale(config) * jax.vmap(_product)(leaves)
            return y.replace(kernel_EDF=(y.kernel_EDF + delta_EDF).astype(y.kernel_EDF.dtype))
        first, *middle, last = (leaf.astype(module.dtype) for leaf in leaves)
        x = args[0].astype(module.dtype)
        if config.dropout > 0 and not deterministic:
            keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - config.dropout, x.shape)
            x = jnp.where(keep, x / (1 - config.dropout), 0)
        h = _scale(config) * jnp.tensordot(x, first, first.ndim - 1, precision=module.precision)
        for lambda_A in middle:
            h = h * jnp.expand_dims(lambda_A, range(h.ndim - 1))
        return y + jnp.tensordot(h, last, 1, precision=module.precision)

    with nn.intercept_methods(add_product):
        yield


def merge(config: PeftConfig, params: Any) -> dict[str, Any]:
    """Folds the low-rank leaves of `params` into their kernels; other leaves are unchanged.

    Sums and products are computed in float32, whatever the dtypes.
    """
    leaves = flatten(params)
    merged = {path: leaf for path, leaf in leaves.items() if not path.endswith(LORA + ADALORA)}
    for names in (LORA, ADALORA):
        for path in [path for path in leaves if path.endswith(f"/{names[0]}")]:
            place = path.removesuffix(names[0])
            parts = [nn.unbox(leaves[place + name]).astype(jnp.float32) for name in names]
            kernel = leaves[place + "kernel"]
            # First and last have the kernel's axes, the rank twice, and the axes of layers and experts once more.
            product = _product
            for _ in range(parts[0].ndim + parts[-1].ndim - 2 - nn.unbox(kernel).ndim):
                product = jax.vmap(product)
            delta = _scale(config) * product(parts)
            merged[place + "kernel"] = jax.tree.map(lambda w, d=delta: (w + d).astype(w.dtype), kernel)
    return unflatten(merged)


def _product(parts: list[jax.Array]) -> jax.Array:
    """Computes A B, or P diag(lambda) Q, for one kernel."""
    first, *middle, last = parts
    for lambda_A in middle:
        first = first * jnp.expand_dims(lambda_A, range(first.ndim - 1))
    return jnp.tensordot(first, last, 1, precision="highest")


# --- frozen and trained parameters ------------------------------------------------------------------------------------


def split(
    config: PeftConfig, params: Any, given: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Splits all parameters into frozen and trained ones.

    Parameters that `given` lacks are trained: a head, adapters, low-rank leaves. If a leaf is longer than in `given`,
    its additional rows are trained: new tokens. Also trained are, for adapters, the layer norms (Houlsby et al. 2019,
    section 2.1); for top_layers, the last `num_layers` layers and the final norm; for none, all parameters; and those
    whose paths match a regex of `trained`.

    A partly trained leaf is in both trees at the same path: its first rows are frozen, its last rows trained.

    Args:
      given: shapes of the pretrained weights, by path.

    Raises:
      UserError: a leaf that does not fit that of `given`, a regex of `trained` that matches no parameter, or top_layers
        exceeds the number of layers.
    """
    for pattern_of_paths in config.trained:
        _check_matches(pattern_of_paths, params)
    pattern = len(params.get("layers", {}))
    base: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        shape = nn.unbox(leaf).shape
        rows = _frozen_rows(config, path, shape, given.get(path), pattern)
        if rows == 0:
            trained[path] = leaf
        elif rows == shape[0]:
            base[path] = leaf
        else:
            base[path], trained[path] = _part(leaf, slice(None, rows)), _part(leaf, slice(rows, None))
    return unflatten(base), unflatten(trained)


def _check_matches(pattern: str, params: Any) -> None:
    """Raises UserError unless a regex of `trained` matches a parameter."""
    paths = list(flatten(params))
    try:
        matches = any(re.fullmatch(pattern, path) for path in paths)
    except re.error as error:
        raise UserError(f"peft.trained: {pattern!r} is not a regular expression: {error}") from None
    if not matches:
        raise UserError(f"peft.trained: {pattern!r} matches no parameter: they are {', '.join(paths)}")


def _frozen_rows(
    config: PeftConfig, path: str, shape: tuple[int, ...], given: tuple[int, ...] | None, pattern: int
) -> int:
    """The number of leading rows of a leaf that are frozen; `pattern` is the length of the attention pattern."""
    if given is None:
        return 0
    if given[1:] != shape[1:] or given[0] > shape[0]:
        raise UserError(f"init_from has {path} of shape {list(given)}, which does not fit the model's {list(shape)}")
    if config.method == "none" or (config.method == "adapters" and re.search(r"norm/(scale|bias)$", path)):
        return 0
    if any(re.fullmatch(trained, path) for trained in config.trained):
        return 0
    if config.method == "top_layers":
        if path.startswith("final_norm/"):
            return 0
        if (numbers := layer_numbers(path, shape[0], shape[0], pattern)) is not None:
            num_layers = pattern * shape[0]
            if config.num_layers > num_layers:
                raise UserError(f"peft.num_layers={config.num_layers} is more than the {num_layers} of the model")
            return sum(number < num_layers - config.num_layers for number in numbers)
    return given[0]


def _part(leaf: Any, rows: slice) -> Any:
    if not isinstance(leaf, LogicalAxes):
        return leaf[rows]
    # The parts of a vocabulary need not be divisible by a mesh axis.
    first, *names = leaf.names
    return leaf.replace(value=leaf.value[rows], names=("vocab_part" if first == "vocab" else first, *names))


def join(base: Any, trained: Any) -> dict[str, Any]:
    """Undoes `split`; trees that share no leaf are merged."""
    first, rest = flatten(base), flatten(trained)
    both = {path: _whole(first[path], rest[path]) for path in first.keys() & rest.keys()}
    return unflatten({**first, **rest, **both})


def _whole(first: Any, rest: Any) -> Any:
    value = jnp.concatenate([nn.unbox(first), nn.unbox(rest)])
    if not isinstance(first, LogicalAxes):
        return value
    names = tuple("vocab" if name == "vocab_part" else name for name in first.names)
    return first.replace(value=value, names=names)
