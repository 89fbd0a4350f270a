"""AdaLoRA: adaptive allocation of the ranks of low-rank matrices (Zhang et al. 2023, section 3).

A kernel k of a layer is W_k + scale x P_k diag(lambda_k) Q_k (`gptjax/models/peft.py`); its triplet i is column i of
P_k, lambda_ki and row i of Q_k. In each step of algorithm 1, `track` measures sensitivities from the gradients, the
optimizer updates all parameters, and `prune` sets the lambdas of all but the `budget` most important triplets to 0.
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.config import PeftConfig
from gptjax.models import peft


def budget(config: PeftConfig, t: int, total: int, num_matrices: int) -> int:
    """The total budget b(t) of singular values of all matrices (section 3.3 and appendix A), rounded down.

        b(t) = b(0)                                                             for t < t_i
        b(t) = b(T) + (b(0) - b(T)) (1 - (t - t_i) / (T - t_i - t_f))^3         for t_i <= t < T - t_f
        b(t) = b(T)                                                             for t >= T - t_f

    b(0) is `initial_rank` for each matrix, b(T) is `rank`. The cubic descends from b(0) at t_i to b(T) at T - t_f, as
    in the authors' code.

    Args:
      t: progress of training, out of `total` = T, both in steps or both in tokens. t_i is `initial_fraction` of T, and
        t_f `final_fraction`.
      num_matrices: number of adapted kernels; those of stacked layers count one for each layer.
    """
    first, last = config.initial_rank * num_matrices, config.rank * num_matrices
    start, end = round(config.initial_fraction * total), total - round(config.final_fraction * total)
    if t < start:
        return first
    if t >= end:
        return last
    return last + (first - last) * (end - t) ** 3 // (end - start) ** 3


def budget_of_step(config: PeftConfig, step: int, tokens: int, total_tokens: int, num_matrices: int) -> int:
    """The budget of `prune` after step number `step`, when `tokens` tokens have been seen.

    Every `prune_every_steps` steps it is b(t); in between nothing is pruned, so that pruned values may grow again
    (section 3.3). In the last `final_fraction` of training it is b(T) at every step.
    """
    final = tokens >= total_tokens - round(config.final_fraction * total_tokens)
    if final or step % config.prune_every_steps == 0:
        return budget(config, tokens, total_tokens, num_matrices)
    return config.initial_rank * num_matrices


class Sensitivity(NamedTuple):
    """The statistics of the entries of P, lambda and Q: nested dicts of these leaves alone, float32.

    Attributes:
      smoothed: their smoothed sensitivity.
      uncertainty: moving average of the deviation from `smoothed`.
      nonzero: for lambda only, bool: it was not 0 when the gradient was computed.
    """

    smoothed: Any
    uncertainty: Any
    nonzero: Any


def track(config: PeftConfig) -> optax.GradientTransformation:
    """Passes updates through, and tracks the sensitivity of each entry w with gradient g (equations 8 to 10).

        I(t) = |w g|
        smoothed(t) = beta_1 smoothed(t-1) + (1 - beta_1) I(t)
        uncertainty(t) = beta_2 uncertainty(t-1) + (1 - beta_2) |I(t) - smoothed(t)|

    In a chain it comes before transformations that change the gradient. beta_1 is `sensitivity_beta`, beta_2 is
    `uncertainty_beta`.
    """
    beta_1, beta_2 = config.sensitivity_beta, config.uncertainty_beta

    def init(params: Any) -> Sensitivity:
        zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), _select(params, peft.ADALORA))
        return Sensitivity(zeros, zeros, _nonzero(params))

    def update(updates: Any, state: Sensitivity, params: Any = None) -> tuple[Any, Sensitivity]:
        entries, grads = _select(params, peft.ADALORA), _select(updates, peft.ADALORA)
        now = jax.tree.map(lambda w, g: jnp.abs(w.astype(jnp.float32) * g.astype(jnp.float32)), entries, grads)
        smoothed = jax.tree.map(lambda old, i: beta_1 * old + (1 - beta_1) * i, state.smoothed, now)
        uncertainty = jax.tree.map(
            lambda old, i, mean: beta_2 * old + (1 - beta_2) * jnp.abs(i - mean), state.uncertainty, now, smoothed
        )
        return updates, Sensitivity(smoothed, uncertainty, _nonzero(params))

    return optax.GradientTransformation(init, update)


def _select(tree: Any, names: tuple[str, ...]) -> dict[str, Any]:
    """The nested dict of the leaves with these names."""
    return peft.unflatten({path: leaf for path, leaf in peft.flatten(tree).items() if path.endswith(names)})


def _nonzero(params: Any) -> dict[str, Any]:
    return jax.tree.map(lambda lambda_: lambda_ != 0, _select(params, ("lora_lambda",)))


def prune(config: PeftConfig, trained: Any, opt_state: Any, budget: jax.Array) -> dict[str, Any]:
    """Sets all lambdas but those of the `budget` most important triplets to 0 (equations 6 and 7).

    With s = smoothed x uncertainty of an entry (equation 11), triplet i of a matrix of d_1 inputs and d_2 outputs has
    importance s(lambda_i) + sum_j s(P_ji) / d_1 + sum_j s(Q_ij) / d_2. Ties are kept in the order of paths and layers.
    Once only b(T) are left, pruned lambdas stay 0: the allocation is then fixed.

    Args:
      trained: parameters after the step; leaves that are not AdaLoRA's are returned unchanged.
      opt_state: state after the step of `track`, or of a chain that contains it.
      budget: int32 (), for all layers and targets together.
    """
    state = _sensitivity(opt_state)
    scores = peft.flatten(jax.tree.map(jnp.multiply, state.smoothed, state.uncertainty))
    leaves = peft.flatten(trained)
    nonzero = dict(sorted(peft.flatten(state.nonzero).items()))
    importances = {path: _importance(path, scores) for path in nonzero}
    importance_N = jnp.concatenate([importances[path].reshape(-1) for path in nonzero])
    pruned_N = jnp.concatenate([~nonzero[path].reshape(-1) for path in nonzero])
    is_final = (budget == config.rank * peft.count_matrices(trained)) & (jnp.sum(~pruned_N) <= budget)
    # lexsort: the last key is the primary one, and the sort is stable.
    order_N = jnp.lexsort((-importance_N, pruned_N & is_final))
    kept_N = jnp.zeros(importance_N.shape, bool).at[order_N].set(jnp.arange(importance_N.size) < budget)
    start = 0
    for path, leaf in nonzero.items():
        kept = kept_N[start : start + leaf.size].reshape(leaf.shape)
        leaves[path] = jnp.where(kept, leaves[path], 0)
        start += leaf.size
    return peft.unflatten(leaves)


def _sensitivity(opt_state: Any) -> Sensitivity:
    def found(node: Any) -> bool:
        return isinstance(node, Sensitivity)

    (state,) = [node for node in jax.tree.leaves(opt_state, is_leaf=found) if found(node)]
    return state


def _importance(path: str, scores: dict[str, jax.Array]) -> jax.Array:
    """The importance of the triplets whose lambdas are at `path`: float32 (A,), or (L, A)."""
    place = path.removesuffix("lora_lambda")
    p, lambda_, q = (scores[place + name] for name in peft.ADALORA)
    inputs, outputs = range(lambda_.ndim - 1, p.ndim - 1), range(lambda_.ndim, q.ndim)
    return lambda_ + jnp.mean(p, axis=tuple(inputs)) + jnp.mean(q, axis=tuple(outputs))


def penalty(params: Any) -> jax.Array:
    """The orthogonality penalty: float32 (), the sum over all matrices (section 3.1, equations 4 and 5) of

    R(P, Q) = ||P^T P - I||_F^2 + ||Q Q^T - I||_F^2
    """
    total = jnp.zeros((), jnp.float32)
    leaves = peft.flatten(_select(params, peft.ADALORA))
    for path, leaf in leaves.items():
        place, _, name = path.rpartition("/")
        if name == "lora_lambda":
            continue
        deviation = partial(_deviation, rank_axis=-1 if name == "lora_p" else 0)
        for _ in range(leaves[f"{place}/lora_lambda"].ndim - 1):  # the axes of layers and experts
            deviation = jax.vmap(deviation)
        total += jnp.sum(deviation(leaf))
    return total


def _deviation(matrix: jax.Array, rank_axis: int) -> jax.Array:
    """The squared Frobenius norm of P^T P - I or Q Q^T - I for one matrix."""
    matrix = jnp.moveaxis(matrix.astype(jnp.float32), rank_axis, 0)
    others = tuple(range(1, matrix.ndim))
    gram_AA = jnp.tensordot(matrix, matrix, (others, others), precision="highest")
    return jnp.sum((gram_AA - jnp.eye(len(gram_AA))) ** 2)
