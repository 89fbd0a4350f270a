"""The coordinate check of a parametrization: sizes of activations in the first steps, against width or depth.

Yang et al. 2022, appendix D.1: under muP the mean absolute entry of every activation, and its change since the
initialisation, are about the same at all widths after a few steps; under the standard parametrization they grow. The
check is necessary, not sufficient: it does not show that the best learning rate transfers.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.checkpoint.state import create_state, state_shardings
from gptjax.config import GPTConfig, MeshConfig
from gptjax.models.attention import QUERIES
from gptjax.models.attention_backends import score_scale
from gptjax.models.decoding import blocks, embedded, logits, unstack
from gptjax.models.dot_product import repeat_heads
from gptjax.models.gpt import GPT
from gptjax.parallel.mesh import make_mesh
from gptjax.training.objective import Batch, Objective
from gptjax.training.step import make_train_step

# Kinds of activations; "router" with a mixture of experts only. Branches are measured before they are added.
KINDS = ("embedding", "attention", "feed_forward", "router", "residual", "scores", "logits")


class Coordinates(NamedTuple):
    """Mean absolute entries of the activations of a run.

    Attributes:
      size: kind -> float (steps + 1,), before the first step and after each.
      change: kind -> the same of the difference from the activations before the first step.
    """

    size: dict[str, np.ndarray]
    change: dict[str, np.ndarray]


class Slope(NamedTuple):
    """The exponents p of a kind of activations that are as size^p, after the last step.

    Attributes:
      is_flat: the change neither grows nor shrinks, and the size does not grow.
    """

    kind: str
    size: float
    change: float
    is_flat: bool


def measured(
    objective: Objective, seeds: Sequence[int], batches: Sequence[Batch], steps: int, lr: float
) -> list[Coordinates]:
    """Trains a model of each seed on one batch for a few steps, and measures the activations after each.

    Args:
      objective: of stage pretrain.
      batches: one for each seed: int tokens and targets, float weights, (B, T) each.
      lr: learning rate of all steps.
    """
    config, mesh = objective.config, make_mesh(MeshConfig(), jax.devices()[:1])
    found = []
    with jax.set_mesh(mesh):
        measure = jax.jit(lambda params, tokens_BT: activations(config.model, params, tokens_BT))
        step = make_train_step(objective, state_shardings(objective.parameters, mesh))
        for seed, batch in zip(seeds, batches, strict=True):
            own = dataclasses.replace(objective.parameters, config=dataclasses.replace(config, seed=seed))
            state, now = create_state(own, mesh), []
            for number in range(steps + 1):
                now.append(jax.device_get(measure(state.params, batch["tokens"])))
                if number < steps:
                    microbatches = jax.tree.map(lambda array: array[None], batch)
                    state, _ = step(state, microbatches, np.int32(1), {"lr": np.float32(lr)})
            found.append(_coordinates(now))
    return found


def activations(config: GPTConfig, params: Any, tokens_BT: jax.Array) -> dict[str, Any]:
    """The activations of a model by their kinds: an array, or a list with one for each layer; without dropout.

    scores are the attention scores of positions s <= t, 0 elsewhere.
    """
    model, params = GPT(config), unstack(config, params)
    x_BTD, inputs = embedded(model, params, tokens_BT, jnp.arange(tokens_BT.shape[1])[None])
    found: dict[str, Any] = {"embedding": x_BTD, "attention": [], "feed_forward": [], "router": [], "scores": []}

    def is_branch(module: Any, method: str) -> bool:
        return method == "__call__" and module.name in ("attention", "mlp", "router")

    for block, layer, given in zip(blocks(config), params["layers"], inputs, strict=True):
        (x_BTD, key_values), captured = block.apply(
            {"params": layer}, x_BTD, given, True, capture_intermediates=is_branch, mutable=[QUERIES[0]]
        )
        parts = captured[QUERIES[0]]
        found["attention"].append(parts["attention"]["__call__"][0][0])
        found["feed_forward"].append(parts["mlp"]["__call__"][0])
        if config.num_experts is not None:
            found["router"].append(parts["mlp"]["router"]["__call__"][0])
        q_BTHK = parts["attention"][QUERIES[1]][0]
        k_BTHK = repeat_heads(key_values.keys_BHSK.swapaxes(1, 2), q_BTHK.shape[2])
        scores_BHTS = score_scale(config) * jnp.einsum("BTHK,BSHK->BHTS", q_BTHK, k_BTHK, precision=config.precision)
        found["scores"].append(jnp.tril(scores_BHTS.astype(jnp.float32)))
    found |= {"residual": x_BTD, "logits": logits(model, params, x_BTD)}
    return {kind: found[kind] for kind in KINDS if kind != "router" or config.num_experts is not None}


def _coordinates(steps: list[dict[str, Any]]) -> Coordinates:
    """Mean absolute entries, over layers too, of the activations of each step, and of their change."""

    def mean(leaves: Any) -> float:
        return float(np.mean([np.mean(np.abs(np.asarray(leaf, np.float32))) for leaf in jax.tree.leaves(leaves)]))

    def change(now: Any, first: Any) -> Any:
        return jax.tree.map(lambda a, b: np.asarray(a, np.float32) - np.asarray(b, np.float32), now, first)

    size = {kind: np.array([mean(now[kind]) for now in steps]) for kind in steps[0]}
    changed = {kind: np.array([mean(change(now[kind], steps[0][kind])) for now in steps]) for kind in steps[0]}
    return Coordinates(size, changed)


def one_batch(config: GPTConfig, rows: int, seed: int) -> Batch:
    """A batch of random tokens whose frequencies follow Zipf's law, as those of text do."""
    assert config.vocab_size is not None
    weights = 1 / np.arange(1, config.vocab_size + 1)
    shape = (rows, config.context_length + 1)
    tokens = np.random.default_rng(seed).choice(config.vocab_size, shape, p=weights / weights.sum()).astype(np.int32)
    ones = np.ones((rows, config.context_length), np.float32)
    return jax.tree.map(jnp.asarray, {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "weights": ones})


def mean_of_seeds(runs: Sequence[Coordinates]) -> Coordinates:
    """The geometric means of several runs."""

    def mean(parts: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        with np.errstate(divide="ignore"):  # the change before the first step is 0
            return {kind: np.exp(np.mean(np.log([part[kind] for part in parts]), axis=0)) for kind in parts[0]}

    return Coordinates(mean([run.size for run in runs]), mean([run.change for run in runs]))


def slopes(by_size: Mapping[int, Coordinates], tolerance: float) -> list[Slope]:
    """Fits powers of the width or the depth to the activations after the last step.

    Args:
      by_size: width or number of layers -> its coordinates.
      tolerance: largest absolute exponent that counts as flat.
    """

    def power(values: Mapping[int, float]) -> float:
        if not all(math.isfinite(value) and value > 0 for value in values.values()):
            return math.nan
        return float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0])

    found = []
    for kind in next(iter(by_size.values())).size:
        size = power({width: float(run.size[kind][-1]) for width, run in by_size.items()})
        change = power({width: float(run.change[kind][-1]) for width, run in by_size.items()})
        found.append(Slope(kind, size, change, is_flat=size <= tolerance and abs(change) <= tolerance))
    return found
