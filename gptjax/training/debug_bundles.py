"""Debug bundles: what a run that stops because of non-finite numbers saves, to find out where they began.

`<workdir>/debug/step_00000123/` has batch.npz, the (M, B, ...) arrays of the step's microbatches, and report.json, what
`diagnose` finds in them. The parameters are those of checkpoint 123: a skipped update has changed nothing.
"""

import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from gptjax.checkpoint.state import TrainState
from gptjax.config import UserError
from gptjax.files import read_arrays, written_locally
from gptjax.training.objective import Batch, Objective
from gptjax.training.step import dropout_rng, loss_and_gradient


def save_bundle(workdir: Path, objective: Objective, state: TrainState, batch: Batch, count: int) -> Path:
    """Writes the bundle of the step that led to `state`, process 0 alone; returns its directory.

    Args:
      batch: (M, B, ...) arrays on the mesh in use, of which `count` microbatches were trained on.
    """
    directory = workdir / "debug" / f"step_{int(state.step):08d}"
    whole = jax.jit(lambda batch: batch, out_shardings=PartitionSpec())(batch)
    microbatches = {name: np.asarray(array_MBT)[:count] for name, array_MBT in whole.items()}
    report = diagnose(objective, state, microbatches)
    if jax.process_index() == 0:
        with written_locally(directory) as place:
            np.savez(place / "batch.npz", **microbatches)  # type: ignore[arg-type]
            (place / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    return directory


def load_bundle(directory: Path) -> tuple[int, dict[str, np.ndarray]]:
    """Returns the step of a bundle and the (M, B, ...) arrays of its microbatches; UserError if it cannot be read."""
    step = re.fullmatch(r"step_(\d+)", directory.name)
    if step is None:
        raise UserError(f"{directory} is not a debug bundle: give a directory such as WORKDIR/debug/step_00000123")
    try:
        return int(step[1]), read_arrays(directory / "batch.npz")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {directory / 'batch.npz'}: {error}") from None


def diagnose(objective: Objective, state: TrainState, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """Recomputes the loss and the gradient of each microbatch (M, B, ...), with the same dropout masks.

    Args:
      state: after the step; its parameters are those before it, as the update was skipped.

    Returns:
      JSON-serialisable: `microbatches`, the loss (nats per target) and gradient norm of each; `worst`, the index of the
      first that is not finite, or else of the one with the largest norm; `norms` of that one: for each parameter, by
      layer, its norm, the norm of its gradient, and how many elements of the gradient are not finite.
    """

    @jax.jit
    def numbers(base: Any, params: Any, rows: Batch, rng: Any) -> Any:
        (loss_sum, (weight, _)), grads = loss_and_gradient(objective, base, params, rows, rng)
        grads = jax.tree.map(lambda g: g / weight.astype(g.dtype), grads)
        norms = {}
        for (path, param), grad in zip(
            jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(grads), strict=True
        ):
            name = jax.tree_util.keystr(path, simple=True, separator="/")
            norms[name] = _norms(param, grad, stacked=name.startswith("layers/"))
        return loss_sum / weight, norms

    found = []
    for i in range(next(iter(batch.values())).shape[0]):
        rng = dropout_rng(state.rng, state.step - 1, i)
        rows = {name: array_MBT[i] for name, array_MBT in batch.items()}
        found.append(jax.device_get(numbers(state.base, state.params, rows, rng)))
    grad_norms = [float(np.sqrt(sum(np.sum(leaf[:, 1] ** 2) for leaf in norms.values()))) for _, norms in found]
    losses = [float(loss) for loss, _ in found]
    finite = np.isfinite(losses) & np.isfinite(grad_norms)
    worst = int(np.argmax(grad_norms) if finite.all() else np.argmin(finite))
    period = len(objective.config.model.attention_pattern)
    return {
        "step": int(state.step),
        "microbatches": [
            {"loss": str(nats), "grad_norm": str(norm)} for nats, norm in zip(losses, grad_norms, strict=True)
        ],
        "worst": worst,
        "norms": {
            _layer(name, i, period): {"parameter": str(param), "gradient": str(grad), "not_finite": int(count)}
            for name, table in found[worst][1].items()
            for i, (param, grad, count) in enumerate(table)
        },
    }


def _norms(param: jax.Array, grad: jax.Array, stacked: bool) -> jax.Array:
    """(layers or 1, 3): the norms of a parameter and of its gradient, and how many of the gradient are not finite."""
    rows = param.shape[0] if stacked else 1

    def norm(array: jax.Array) -> jax.Array:
        return jnp.linalg.norm(array.astype(jnp.float32).reshape(rows, -1), axis=1)

    return jnp.stack([norm(param), norm(grad), jnp.sum(~jnp.isfinite(grad.reshape(rows, -1)), axis=1)], axis=1)


def _layer(name: str, row: int, period: int) -> str:
    """The name of a layer's parameter: `layers/block_b/...` stacks layers b, b + period, b + 2 * period, ..."""
    return re.sub(r"^layers/block_(\d+)/", lambda block: f"layers/{row * period + int(block[1])}/", name)
