"""AdaLoRA's budget against values computed by hand, and its algorithm 1 against numpy."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import PeftConfig
from gptjax.models import peft
from gptjax.optim import adalora
from gptjax.parallel.mesh import LogicalAxes

CONFIG = PeftConfig(
    method="adalora",
    rank=2,
    initial_rank=4,
    alpha=2.0,
    initial_fraction=0.2,
    final_fraction=0.3,
    prune_every_steps=1,
    sensitivity_beta=0.7,
    uncertainty_beta=0.6,
)
INPUTS, OUTPUTS, LAYERS = 6, (2, 4), 3  # of each of two targets; 6 matrices


def test_the_budget_in_numbers():
    """T = 100 steps, t_i = 10, t_f = 30; 5 matrices of rank 12 at first, of rank 8 on average at the end."""
    config = PeftConfig(rank=8, initial_rank=12, initial_fraction=0.1, final_fraction=0.3)
    # 40 + 20 (1 - (t - 10) / 60)^3: at 20 by 125 / 216, at 25 by 27 / 64, at 40 by 1 / 8, at 55 by 1 / 64, at 69 by
    # (1 / 60)^3 of the 20.
    expected = {1: 60, 9: 60, 10: 60, 11: 59, 20: 51, 25: 48, 40: 42, 55: 40, 69: 40, 70: 40, 100: 40}
    assert {t: adalora.budget(config, t, 100, 5) for t in expected} == expected
    assert [adalora.budget(config, 1000 * t, 100_000, 5) for t in expected] == list(expected.values())
    budgets = [adalora.budget(config, t, 100, 5) for t in range(101)]
    assert budgets == sorted(budgets, reverse=True)


def test_the_budget_of_a_step():
    """Every second step prunes, and from the 70th of 100 on every one; in between everything may grow."""
    config = PeftConfig(rank=8, initial_rank=12, initial_fraction=0.1, final_fraction=0.3, prune_every_steps=2)
    expected = {9: 60, 10: 60, 19: 60, 20: 51, 21: 60, 40: 42, 41: 60, 69: 60, 70: 40, 71: 40, 99: 40, 100: 40}
    assert {t: adalora.budget_of_step(config, t, 7 * t, 700, 5) for t in expected} == expected


def test_extreme_schedules():
    config = PeftConfig(rank=8, initial_rank=12, initial_fraction=0.0, final_fraction=0.0)
    assert [adalora.budget(config, t, 2, 1) for t in (0, 1, 2)] == [12, 8, 8]
    equal = dataclasses.replace(config, initial_rank=8)
    assert {adalora.budget(equal, t, 10, 3) for t in range(11)} == {24}


# --- algorithm 1 ------------------------------------------------------------------------------------------------------


def draw(seed: int = 0):
    """Leaves as `low_rank` places them, random; and what their products are to become."""
    random = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(random.normal(size=shape) * 0.5, jnp.float32)

    params, wanted = {}, {}
    for target in ("up", "out"):
        params[target] = {
            "lora_p": normal(LAYERS, INPUTS, 4),
            "lora_lambda": normal(LAYERS, 4),
            "lora_q": normal(LAYERS, 4, *OUTPUTS),
        }
        wanted[target] = normal(LAYERS, INPUTS, *OUTPUTS)
    return {"layers": {"block_0": params}, "head": {"linear": {"bias": normal(2)}}}, wanted


def by_matrix(params):
    """numpy P (d1, r), lambda (r,) and Q (r, d2) of each matrix, in the order of the tree: targets, then layers."""
    targets = params["layers"]["block_0"]
    return [
        [
            np.array(targets[target][name][layer]).reshape(shape)
            for name, shape in (("lora_p", (INPUTS, 4)), ("lora_lambda", (4,)), ("lora_q", (4, -1)))
        ]
        for target in sorted(targets)
        for layer in range(LAYERS)
    ]


def loss(params, wanted):
    """The gradient of half the squared distance of the products from `wanted`."""
    total = jnp.sum(params["head"]["linear"]["bias"] ** 2)
    for target, leaves in params["layers"]["block_0"].items():
        p, lambda_, q = (leaves[name] for name in peft.ADALORA)
        delta = jnp.einsum("LDr,Lr,Lrhk->LDhk", p, lambda_, q, precision="highest")
        total += 0.5 * jnp.sum((delta - wanted[target]) ** 2)
    return total


class Transcription:
    """Algorithm 1 matrix by matrix and entry by entry, with gradients by hand and plain gradient descent."""

    def __init__(self, params, wanted, lr):
        self.matrices, self.lr = by_matrix(params), lr
        self.wanted = [np.array(wanted[t][k]).reshape(INPUTS, -1) for t in sorted(wanted) for k in range(LAYERS)]
        self.smoothed = [[np.zeros_like(w) for w in matrix] for matrix in self.matrices]
        self.uncertainty = [[np.zeros_like(w) for w in matrix] for matrix in self.matrices]
        self.kept = None

    def step(self, budget, final):
        importance = []
        for k, (p, lambda_, q) in enumerate(self.matrices):
            error = p @ np.diag(lambda_) @ q - self.wanted[k]
            grads = [error @ q.T * lambda_, np.diag(p.T @ error @ q.T), (lambda_ * p).T @ error]
            for i, (w, g) in enumerate(zip((p, lambda_, q), grads, strict=True)):
                now = np.abs(w * g)
                self.smoothed[k][i] = 0.7 * self.smoothed[k][i] + 0.3 * now
                self.uncertainty[k][i] = 0.6 * self.uncertainty[k][i] + 0.4 * np.abs(now - self.smoothed[k][i])
            s_p, s_lambda, s_q = (a * b for a, b in zip(self.smoothed[k], self.uncertainty[k], strict=True))
            s = [s_lambda[i] + sum(s_p[:, i]) / INPUTS + sum(s_q[i]) / q.shape[1] for i in range(4)]
            importance += [(s[i], k, i) for i in range(4)]
            self.matrices[k] = [w - self.lr * g for w, g in zip((p, lambda_, q), grads, strict=True)]
        if not (final and self.kept is not None and len(self.kept) == budget):
            self.kept = {(k, i) for _, k, i in sorted(importance, reverse=True)[:budget]}
        for k, i in {(k, i) for _, k, i in importance} - self.kept:
            self.matrices[k][1][i] = 0


@pytest.mark.parametrize("every", [1, 3])
def test_twenty_steps_are_those_of_algorithm_1(every):
    config, total, lr = dataclasses.replace(CONFIG, prune_every_steps=every), 20, 0.1
    params, wanted = draw()
    numpy = Transcription(params, wanted, lr)
    num_matrices = peft.count_matrices(params)
    assert num_matrices == 6
    # Clipping and Adam behind it must not reach what is tracked.
    optimizer = optax.chain(adalora.track(config), optax.identity())
    state = optimizer.init(params)

    @jax.jit
    def step(params, state, budget):
        updates, state = optimizer.update(jax.grad(loss)(params, wanted), state, params)
        params = jax.tree.map(lambda p, u: p - lr * u, params, updates)
        return adalora.prune(config, params, state, budget), state

    kept = []
    for t in range(1, total + 1):
        budget = adalora.budget_of_step(config, t, t, total, num_matrices)
        params, state = step(params, state, np.int32(budget))
        numpy.step(budget, final=budget == 2 * 6)
        for ours, theirs in zip(by_matrix(params), numpy.matrices, strict=True):
            for a, b in zip(ours, theirs, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
        assert np.sum(np.concatenate([matrix[1] for matrix in by_matrix(params)]) != 0) == budget
        for tree, theirs in ((state[0].smoothed, numpy.smoothed), (state[0].uncertainty, numpy.uncertainty)):
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), by_matrix(tree), theirs)
        kept.append(budget)
    assert step._cache_size() == 1  # the budget is a number, not a shape
    assert kept[0] == 24
    assert kept[-7:] == [12] * 7
    ranks = [int(np.sum(matrix[1] != 0)) for matrix in by_matrix(params)]
    assert len(set(ranks)) > 1  # the budget is one for all: some keep more than others


def test_the_last_distribution_is_fixed():
    """Whatever becomes important: a gradient that favours pruned triplets brings none of them back."""
    params, _ = draw()
    tracker = adalora.track(CONFIG)
    state = tracker.init(params)
    zero_grads = jax.tree.map(jnp.zeros_like, params)
    patterns = []
    for seed, budget in enumerate((24, 15, 15, 12, 12, 12)):
        random = jax.tree.map(jnp.asarray, draw(seed + 10)[0])
        _, state = tracker.update(random, state, params)
        moved = jax.tree.map(lambda p, g: p + 0.1 * g, params, random)
        params = adalora.prune(CONFIG, moved, (state, zero_grads), np.int32(budget))
        patterns.append(np.concatenate([matrix[1] != 0 for matrix in by_matrix(params)]))
        assert patterns[-1].sum() == budget
    assert np.any(patterns[2] & ~patterns[1])  # while the budget shrinks, what was pruned comes back
    np.testing.assert_array_equal(patterns[3], patterns[4])
    np.testing.assert_array_equal(patterns[3], patterns[5])


def test_pruning_keeps_what_is_important_and_touches_nothing_else():
    params, _ = draw()
    state = adalora.track(CONFIG).init(params)
    one = {name: np.zeros_like(leaf) for name, leaf in params["layers"]["block_0"]["up"].items()}
    smoothed = {"layers": {"block_0": {"up": one, "out": jax.tree.map(np.copy, one)}}}
    # Importance 8 by an entry of P of 6 inputs, 16 by one of Q of 8 outputs, 3 by lambda.
    smoothed["layers"]["block_0"]["up"]["lora_p"][2, 5, 1] = 48.0
    smoothed["layers"]["block_0"]["out"]["lora_q"][0, 3, 1, 2] = 128.0
    smoothed["layers"]["block_0"]["out"]["lora_lambda"][1, 0] = 3.0
    ones = jax.tree.map(np.ones_like, smoothed)
    state = state._replace(smoothed=smoothed, uncertainty=ones)
    places = [("out", 0, 3), ("up", 2, 1), ("out", 1, 0)]
    for budget in range(4):
        pruned = adalora.prune(CONFIG, params, state, np.int32(budget))
        kept = [
            (target, int(layer), int(i))
            for target in ("up", "out")
            for layer, i in np.argwhere(pruned["layers"]["block_0"][target]["lora_lambda"])
        ]
        assert sorted(kept) == sorted(places[:budget])
    for (path, before), after in zip(peft.flatten(params).items(), peft.flatten(pruned).values(), strict=True):
        if not path.endswith("lambda"):
            np.testing.assert_array_equal(before, after)


def test_ties_are_broken_by_the_order_of_paths():
    params, _ = draw()
    state = adalora.track(CONFIG).init(params)  # nothing is known: all are equal
    pruned = adalora.prune(CONFIG, params, state, np.int32(5))["layers"]["block_0"]
    kept = {target: np.argwhere(pruned[target]["lora_lambda"]).tolist() for target in ("out", "up")}
    assert sum(map(len, kept.values())) == 5
    assert kept["out"] == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0]]


def test_tracking_passes_updates_through_and_keeps_logical_axes():
    params, wanted = draw()
    tracker = adalora.track(CONFIG)
    grads = jax.grad(loss)(params, wanted)
    updates, state = tracker.update(grads, tracker.init(params), params)
    assert updates is grads
    assert "head" not in state.smoothed
    boxed = jax.tree.map(lambda leaf: LogicalAxes(leaf, ("layers", *[None] * (leaf.ndim - 1))), params)
    boxed_state = tracker.init(boxed)
    assert jax.tree.structure(nn.unbox(boxed_state)) == jax.tree.structure(state)
    assert isinstance(boxed_state.smoothed["layers"]["block_0"]["up"]["lora_q"], LogicalAxes)
    assert isinstance(boxed_state.nonzero["layers"]["block_0"]["up"]["lora_lambda"], LogicalAxes)


def test_sensitivities_of_half_precision_are_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draw()[0])
    tracker = adalora.track(CONFIG)
    _, state = tracker.update(params, tracker.init(params), params)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32"), jnp.dtype("bool")}
    pruned = adalora.prune(CONFIG, params, state, np.int32(3))
    assert jax.tree.map(lambda leaf: leaf.dtype, pruned) == jax.tree.map(lambda leaf: leaf.dtype, params)


def test_the_penalty_is_that_of_each_matrix():
    params, _ = draw()
    expected = 0.0
    for p, _, q in by_matrix(params):
        expected += np.sum((p.T @ p - np.eye(4)) ** 2) + np.sum((q @ q.T - np.eye(4)) ** 2)
    assert float(jax.jit(adalora.penalty)(params)) == pytest.approx(expected, rel=1e-5)
    # A matrix outside the layers has no axis of layers.
    random = np.random.default_rng(0)
    p, q = np.linalg.qr(random.normal(size=(6, 3)))[0], random.normal(size=(3, 5))
    alone = {"head": {"linear": {"lora_p": jnp.asarray(p), "lora_lambda": jnp.zeros(3), "lora_q": jnp.asarray(q)}}}
    assert float(adalora.penalty(alone)) == pytest.approx(np.sum((q @ q.T - np.eye(3)) ** 2), rel=1e-5)
    assert float(adalora.penalty({"head": {"linear": {"kernel": jnp.ones((2, 2))}}})) == 0
