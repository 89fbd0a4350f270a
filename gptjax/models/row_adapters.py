"""Low-rank adapters that differ from row to row of a batch: many fine-tuned models on one base.

The matrices of all adapters are stacked, and each row of a batch reads those of its own adapter (Chen et al. 2023,
Punica, section 3). Adapter 0 is zero, which leaves the base model.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from gptjax.config import GPTConfig, PeftConfig, UserError
from gptjax.models import peft
from gptjax.models.decoding import unstack
from gptjax.models.gpt import model_axes

STACKED_A, STACKED_B = "adapters_a", "adapters_b"  # leaves next to a kernel: (N, inputs, A) and (N, A, outputs)


def with_adapters(config: GPTConfig, params: Any, adapters: Sequence[tuple[PeftConfig, Any]]) -> Any:
    """Adds the stacked matrices of adapters to the parameters of a model, stacked or unstacked.

    Args:
      adapters: for each the settings and the low-rank leaves of LoRA or AdaLoRA, a nested dict as `peft.low_rank`
        returns it, unboxed. Adapter i of the list is adapter i + 1 of a row.

    Raises:
      UserError: an adapter has other leaves, does not fit the model, or adapts experts.
    """
    if not adapters:
        return params
    pairs = [_pairs(config, settings, peft.flatten(tree)) for settings, tree in adapters]
    leaves: dict[str, jax.Array] = {}
    for place in sorted({place for adapter in pairs for place in adapter}):
        found = [adapter.get(place) for adapter in pairs]
        rank = max(pair[0].shape[-1] for pair in found if pair is not None)
        first, last = next(pair for pair in found if pair is not None)
        zero = (jnp.zeros((*first.shape[:-1], rank)), jnp.zeros((last.shape[0], rank, *last.shape[2:])))
        padded = [zero] + [zero if pair is None else _padded(pair, rank) for pair in found]
        # The axis of the layers stays the first, so that it is unstacked as that of the kernels.
        leaves[place + STACKED_A] = jnp.stack([first for first, _ in padded], axis=1)
        leaves[place + STACKED_B] = jnp.stack([last for _, last in padded], axis=1)
    added = peft.unflatten(leaves)
    if isinstance(params["layers"], list):
        layers = [peft.join(*pair) for pair in zip(params["layers"], unstack(config, added)["layers"], strict=True)]
        return {**params, "layers": layers}
    return peft.join(params, added)


def _pairs(config: GPTConfig, settings: PeftConfig, leaves: dict[str, Any]) -> dict[str, tuple[jax.Array, jax.Array]]:
    """The matrices A (layers, inputs, A) and scale B (layers, A, outputs) of an adapter, by the place of the kernel."""
    names = peft.LORA if settings.method == "lora" else peft.ADALORA
    axes, pairs = model_axes(config), {}
    for path in leaves:
        place, name = path.rpartition("/")[0] + "/", path.rpartition("/")[2]
        kernel = axes.get(place + "kernel")
        if name not in names or kernel is None:
            raise UserError(f"{path} is no low-rank matrix next to a kernel of this model: only those can be adapters")
        if "expert" in kernel.roles:
            raise UserError(f"{path} adapts experts, which cannot differ from row to row: merge this adapter instead")
        if name == names[0]:
            first, *middle, last = (jnp.asarray(leaves[place + each], jnp.float32) for each in names)
            for lambda_LA in middle:
                first = first * jnp.expand_dims(lambda_LA, range(1, first.ndim - 1))
            pairs[place] = first, settings.alpha / settings.rank * last
    return pairs


def _padded(pair: tuple[jax.Array, jax.Array], rank: int) -> tuple[jax.Array, jax.Array]:
    """Both matrices with zeros up to a rank."""
    first, last = pair
    missing = rank - first.shape[-1]
    return (
        jnp.pad(first, [(0, 0)] * (first.ndim - 1) + [(0, missing)]),
        jnp.pad(last, [(0, 0), (0, missing)] + [(0, 0)] * (last.ndim - 2)),
    )


@contextlib.contextmanager
def applied(adapter_B: jax.Array) -> Iterator[None]:
    """Context in which dense layers add the low-rank product of each row's adapter, int32 (B,), to their outputs."""

    def add_product(
        call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], context: nn.module.InterceptorContext
    ) -> Any:
        y, module = call(*args, **kwargs), context.module
        if context.method_name != "__call__" or not isinstance(module, nn.Dense | nn.DenseGeneral):
            return y
        if not module.has_variable("params", STACKED_A):
            return y
        a_BXA: jax.Array = module.get_variable("params", STACKED_A)[adapter_B].astype(module.dtype)
        b_BAX: jax.Array = module.get_variable("params", STACKED_B)[adapter_B].astype(module.dtype)
        (rows, length), rank = y.shape[:2], a_BXA.shape[-1]
        x_BTX = args[0].astype(module.dtype).reshape(rows, length, -1)
        h_BTA = jnp.einsum("BTX,BXA->BTA", x_BTX, a_BXA.reshape(rows, -1, rank), precision=module.precision)
        product = jnp.einsum("BTA,BAX->BTX", h_BTA, b_BAX.reshape(rows, rank, -1), precision=module.precision)
        return y + product.reshape(y.shape)

    with nn.intercept_methods(add_product):
        yield
