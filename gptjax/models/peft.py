"""Parameter-efficient fine-tuning as transformations of the parameter tree; no layer knows of it.

`split` says what of a tree is trained, and `join` undoes it. LoRA (Hu et al. 2021) and AdaLoRA (Zhang et al. 2023) put
leaves of their own beside the kernels that they change: `low_rank` makes them, `applied` computes with them, `merge`
folds them into the kernels.

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
from gptjax.parallel.mesh import LogicalAxes

# Of a kernel W that has become W + scale A B, or W + scale P diag(lambda) Q. A and P are what reads the inputs.
LORA = ("lora_a", "lora_b")
ADALORA = ("lora_p", "lora_lambda", "lora_q")


def flatten(params: Any) -> dict[str, Any]:
    """The leaves of a nested dict by their paths."""
    return traverse_util.flatten_dict(params, sep="/")


def unflatten(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """The nested dict of leaves by their paths."""
    return traverse_util.unflatten_dict(dict(leaves), sep="/")


def count(tree: Any) -> int:
    """Parameters in `tree`, of arrays or their shapes; None: none."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(tree))


def count_matrices(tree: Any) -> int:
    """Kernels that low-rank leaves in `tree` change, those of each layer by itself."""
    last = (LORA[-1], ADALORA[-1])
    return sum(
        nn.unbox(leaf).shape[0] if is_stacked(path) else 1
        for path, leaf in flatten(tree).items()
        if path.endswith(last)
    )


def is_stacked(path: str) -> bool:
    """Whether a leaf has the layers on a leading axis."""
    return path.startswith("layers/")


def input_axes(path: str) -> int:
    """How many axes of a kernel, behind that of the layers, are its inputs; the rest are its outputs."""
    return 2 if path.endswith("attention/out/kernel") else 1  # heads, and their width


# --- low-rank matrices beside kernels ---------------------------------------------------------------------------------


def low_rank(config: PeftConfig, params: Any, rng: jax.Array) -> dict[str, Any]:
    """The leaves that LoRA or AdaLoRA adds to `params`, beside the kernels of `targets`: a nested dict of them alone.

    Beside a kernel of D inputs and F outputs they are (D, r) and (r, F), with the axes that the kernel has for D and F,
    and before them that of stacked layers. Their product is 0 at first.

    lora: lora_a is Gaussian as in the paper (Hu et al. 2021, section 4.1), of variance 1 / 3D as the uniform numbers of
    its authors' code are; lora_b is 0. r is `rank`.
    adalora: lora_p and lora_q are Gaussian (Zhang et al. 2023, section 3.1); the paper has no variance, and here what
    is to become orthonormal has length 1 on average. lora_lambda, (r,), is 0. r is `initial_rank`.

    Args:
      params: boxed or not, as the leaves will be; boxed ones are spread as the kernel is, along all axes but r.

    Raises:
      UserError: a regex of `targets` matches no parameter, or one that is no kernel; or r is above a kernel's rank.
    """
    key = {"lora": "rank", "adalora": "initial_rank"}[config.method]
    rank = getattr(config, key)
    leaves = flatten(params)
    new: dict[str, Any] = {}
    for path in _targets(config, leaves):
        kernel = leaves[path]
        shape = nn.unbox(kernel).shape
        first = int(is_stacked(path))
        second = first + input_axes(path)
        num_inputs, num_outputs = math.prod(shape[first:second]), math.prod(shape[second:])
        if rank > min(num_inputs, num_outputs):
            raise UserError(f"peft.{key}={rank} is above the rank of {path}, {num_inputs} x {num_outputs}: lower it")
        layers, inputs, outputs = range(first), range(first, second), range(second, len(shape))
        # Name: the kernel's axes before and behind the rank, and the variance.
        made: dict[str, tuple[range, range, float]] = {
            "lora_a": (inputs, range(0), 1 / (3 * num_inputs)),
            "lora_b": (range(0), outputs, 0.0),
            "lora_p": (inputs, range(0), 1 / num_inputs),
            "lora_lambda": (range(0), range(0), 0.0),
            "lora_q": (range(0), outputs, 1 / num_outputs),
        }
        for name in LORA if config.method == "lora" else ADALORA:
            before, behind, variance = made[name]
            place = path.removesuffix("kernel") + name
            rng_of_leaf = jax.random.fold_in(rng, zlib.crc32(place.encode()))  # the same whatever else is a target
            new[place] = _gaussian(rng_of_leaf, variance, kernel, [*layers, *before], rank, list(behind))
    return unflatten(new)


def _gaussian(rng: jax.Array, variance: float, kernel: Any, before: list[int], rank: int, behind: list[int]) -> Any:
    """Gaussian numbers, or zeros: `kernel`'s axes `before`, the rank, its axes `behind`; of its dtype."""
    value = nn.unbox(kernel)
    shape = (*(value.shape[axis] for axis in before), rank, *(value.shape[axis] for axis in behind))
    array = jnp.zeros(shape, value.dtype)
    if variance > 0:
        array = math.sqrt(variance) * jax.random.normal(rng, shape, value.dtype)
    if not isinstance(kernel, LogicalAxes):
        return array
    names = (*(kernel.names[axis] for axis in before), "rank", *(kernel.names[axis] for axis in behind))
    return LogicalAxes(array, names)


def _targets(config: PeftConfig, leaves: Mapping[str, Any]) -> list[str]:
    """The paths of the kernels that `targets` name."""
    kernels = [path for path in leaves if path.endswith("/kernel")]
    found: set[str] = set()
    for pattern in config.targets:
        try:
            matches = [path for path in leaves if re.fullmatch(pattern, path)]
        except re.error as error:
            raise UserError(f"peft.targets: {pattern!r} is not a regular expression: {error}") from None
        others = [path for path in matches if path not in kernels]
        if others or not matches:
            wrong = f"matches {others[0]}, which is no kernel" if others else "matches no parameter"
            raise UserError(f"peft.targets: {pattern!r} {wrong}: the kernels are {', '.join(kernels)}")
        found.update(matches)
    if not found:
        raise UserError(f"peft.targets is empty: name some of the kernels, which are {', '.join(kernels)}")
    return [path for path in kernels if path in found]


def _scale(config: PeftConfig) -> float:
    """What a low-rank product counts; AdaLoRA's too, by the rank that is left at the end, so that it never changes."""
    return config.alpha / config.rank


@contextlib.contextmanager
def applied(config: PeftConfig, deterministic: bool) -> Iterator[None]:
    """In which models compute with the low-rank leaves that their parameters have.

    A dense layer of inputs x adds scale x dropout(x) A B or scale x dropout(x) P diag(lambda) Q to its outputs, in its
    own dtype and precision; scale is `alpha` / `rank`.

    Args:
      deterministic: no dropout; otherwise the model needs a "dropout" rng where `dropout` is above 0.
    """

    def add_product(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        y, module = call(*args, **kwargs), context.module
        if not isinstance(module, nn.Dense | nn.DenseGeneral) or context.method_name != "__call__":
            return y
        names = next((names for names in (LORA, ADALORA) if module.has_variable("params", names[0])), None)
        if names is None:
            return y
        first, *middle, last = (nn.unbox(module.get_variable("params", name)).astype(module.dtype) for name in names)
        x = args[0].astype(module.dtype)
        if config.dropout > 0 and not deterministic:
            keep = jax.random.bernoulli(module.make_rng("dropout"), 1 - config.dropout, x.shape)
            x = jnp.where(keep, x / (1 - config.dropout), 0)
        h = _scale(config) * jnp.tensordot(x, first, first.ndim - 1, precision=module.precision)
        for lambda_r in middle:
            h = h * jnp.expand_dims(lambda_r, range(h.ndim - 1))
        return y + jnp.tensordot(h, last, 1, precision=module.precision)

    with nn.intercept_methods(add_product):
        yield


def merge(config: PeftConfig, params: Any) -> dict[str, Any]:
    """`params` with the low-rank leaves folded into their kernels; all else as it is.

    Sums and products are float32, whatever the dtypes.
    """
    leaves = flatten(params)
    merged = {path: leaf for path, leaf in leaves.items() if not path.endswith(LORA + ADALORA)}
    for names in (LORA, ADALORA):
        for path in [path for path in leaves if path.endswith(f"/{names[0]}")]:
            place = path.removesuffix(names[0])
            parts = [nn.unbox(leaves[place + name]).astype(jnp.float32) for name in names]
            delta = _scale(config) * (jax.vmap(_product) if is_stacked(path) else _product)(parts)
            merged[place + "kernel"] = jax.tree.map(
                lambda w, d=delta: (w + d).astype(w.dtype), leaves[place + "kernel"]
            )
    return unflatten(merged)


def _product(parts: list[jax.Array]) -> jax.Array:
    """A B, or P diag(lambda) Q, of one kernel."""
    first, *middle, last = parts
    for lambda_r in middle:
        first = first * jnp.expand_dims(lambda_r, range(first.ndim - 1))
    return jnp.tensordot(first, last, 1, precision="highest")


# --- what is trained --------------------------------------------------------------------------------------------------


def split(
    config: PeftConfig, params: Any, given: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """All parameters as those that stay as they are, and those that are trained.

    What `given` lacks is trained: a head, adapters, low-rank leaves. So are, of a leaf longer than in `given`, the rows
    behind those given: new tokens. Besides, adapters: the layer norms (Houlsby et al. 2019, section 2.1); top_layers:
    the last `num_layers` layers and the final norm; none: everything.

    A leaf of which a part is trained is in both trees, by the same path: its first rows stay, its last are trained.

    Args:
      given: the shapes, by path, of the weights that the run starts from.

    Raises:
      UserError: a leaf that does not fit that of `given`; top_layers has more layers than there are.
    """
    pattern = len(params.get("layers", {}))
    base: dict[str, Any] = {}
    trained: dict[str, Any] = {}
    for path, leaf in flatten(params).items():
        shape = nn.unbox(leaf).shape
        rows = _rows_that_stay(config, path, shape, given.get(path), pattern)
        if rows == 0:
            trained[path] = leaf
        elif rows == shape[0]:
            base[path] = leaf
        else:
            base[path], trained[path] = _part(leaf, slice(None, rows)), _part(leaf, slice(rows, None))
    return unflatten(base), unflatten(trained)


def _rows_that_stay(
    config: PeftConfig, path: str, shape: tuple[int, ...], given: tuple[int, ...] | None, pattern: int
) -> int:
    """How many of the first rows of a leaf are not trained; `pattern` layers are those of the attention pattern."""
    if given is None:
        return 0
    if given[1:] != shape[1:] or given[0] > shape[0]:
        raise UserError(f"init_from has {path} of shape {list(given)}, which does not fit the model's {list(shape)}")
    if config.method == "none" or (config.method == "adapters" and re.search(r"norm/(scale|bias)$", path)):
        return 0
    if config.method == "top_layers":
        if path.startswith("final_norm/"):
            return 0
        if (block := re.match(r"layers/block_(\d+)/", path)) is not None:
            num_layers = pattern * shape[0]
            if config.num_layers > num_layers:
                raise UserError(f"peft.num_layers={config.num_layers} is more than the {num_layers} of the model")
            # Row r of block i is layer r x pattern + i.
            return max(0, math.ceil((num_layers - config.num_layers - int(block[1])) / pattern))
    return given[0]


def _part(leaf: Any, rows: slice) -> Any:
    if not isinstance(leaf, LogicalAxes):
        return leaf[rows]
    # Neither part of a vocabulary need divide over a mesh.
    first, *names = leaf.names
    return LogicalAxes(leaf.value[rows], ("vocab_part" if first == "vocab" else first, *names))


def join(base: Any, trained: Any) -> dict[str, Any]:
    """What `split` has split; of trees that share no leaf, all leaves."""
    first, rest = flatten(base), flatten(trained)
    both = {path: _whole(first[path], rest[path]) for path in first.keys() & rest.keys()}
    return unflatten({**first, **rest, **both})


def _whole(first: Any, rest: Any) -> Any:
    value = jnp.concatenate([nn.unbox(first), nn.unbox(rest)])
    if not isinstance(first, LogicalAxes):
        return value
    return LogicalAxes(value, tuple("vocab" if name == "vocab_part" else name for name in first.names))
