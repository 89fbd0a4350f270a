"""Chinchilla's approaches 1 and 2, on points and curves of a known law."""

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.metrics.law_figures import draw_allocation
from gptjax.scaling.allocations import allocation_of_tree, budgets, fit_envelope, fit_isoflop
from gptjax.scaling.fit_files import FittedLaw
from gptjax.scaling.law_fits import published
from gptjax.scaling.run_table import RunTable

LAW = published("epoch")
A = 0.3658 / (0.3478 + 0.3658)  # the exponent of N_opt: beta / (alpha + beta)


def table(sizes, tokens, noise=0.0, names=None) -> RunTable:
    sizes, tokens = np.asarray(sizes, np.float64), np.asarray(tokens, np.float64)
    losses = LAW.law.value(LAW.theta, {"parameters": sizes, "tokens": tokens})
    losses *= np.exp(noise * np.random.default_rng(0).standard_normal(len(losses)))
    names = tuple(map(str, range(len(sizes)))) if names is None else tuple(names)
    columns = {"parameters": sizes, "tokens": tokens, "flops": 6 * sizes * tokens, "loss": losses}
    return RunTable("runs.csv", names, columns, "")


def profiles(noise: float = 0.0) -> RunTable:
    """9 sizes within a factor of 3 of the optimum, for each of 6 budgets that differ by up to 5 % in compute."""
    flops = np.repeat(np.geomspace(1e19, 1e22, 6), 9)
    sizes = np.array([LAW.optimum(budget)[0] for budget in flops]) * np.tile(np.geomspace(1 / 3, 3, 9), 6)
    return table(sizes, flops * np.tile(np.linspace(1, 1.05, 9), 6) / (6 * sizes), noise)


def test_isoflop_profiles_find_the_exponents_and_the_losses_of_the_optima(tmp_path):
    runs = profiles(0.001)
    fit = fit_isoflop(runs, samples=50)
    (picture,) = draw_allocation(fit, runs, tmp_path)
    assert picture.stat().st_size > 10_000
    assert len(fit.parabolas) == 6
    assert fit.parameters["a"] == pytest.approx(A, abs=0.02)
    assert fit.parameters["a"] + fit.parameters["b"] == pytest.approx(1, abs=1e-6)
    assert fit.intervals is not None
    assert fit.intervals["a"][0] < A < fit.intervals["a"][1]
    size, tokens = fit.optimum(1e23)  # 10 times the largest budget
    assert size == pytest.approx(LAW.optimum(1e23)[0], rel=0.1)
    assert 6 * size * tokens == pytest.approx(1e23, rel=0.05)
    assert fit.frontier is not None
    best = LAW.law.value(LAW.theta, dict(zip(("parameters", "tokens"), LAW.optimum(1e23), strict=True)))[0]
    assert fit.frontier.predict({"flops": 1e23})[0] == pytest.approx(best, rel=0.01)
    again = allocation_of_tree(fit.tree())
    assert again.optimum(1e23) == pytest.approx((size, tokens))
    assert again.intervals == fit.intervals
    law = FittedLaw("fit.json", again, "total")
    assert law.predict({"flops": 1e23, "parameters": size})[0] == fit.frontier.predict({"flops": 1e23})[0]
    with pytest.raises(UserError, match="predicts the loss of models of optimal size, and this one has 3 times"):
        law.predict({"flops": 1e23, "parameters": 3 * size})


def test_a_budget_without_a_minimum_is_left_out_and_named():
    runs = profiles()
    kept = np.ones(len(runs), bool)
    kept[4:9] = False  # of the first budget, the sizes from the optimum on
    kept[11:18] = False  # of the second, all but two
    fit = fit_isoflop(runs.take(kept), samples=0)
    assert [line.split("FLOPs")[1] for line in fit.left_out] == [
        " has no minimum within its model sizes",
        " has 2 model sizes, fewer than 3",
    ]
    assert len(fit.parabolas) == 4
    with pytest.raises(UserError, match="1 budgets have an isoFLOP profile with a minimum, and a power law needs 2"):
        fit_isoflop(runs.take(range(9)), samples=0)


def test_budgets_do_not_chain():
    """Many runs of slightly different compute are several budgets, not one."""
    groups = budgets(np.geomspace(1, 2, 50)[::-1])
    assert sorted(np.concatenate(groups)) == list(range(50))
    assert len(groups) == 5


def test_the_envelope_of_training_curves_finds_the_exponents(tmp_path):
    sizes = np.geomspace(1e8, 1e10, 9)
    tokens = np.geomspace(3e8, 3e12, 60)
    names = np.repeat([f"run{i}" for i in range(9)], 60)
    curves = table(np.repeat(sizes, 60), np.tile(tokens, 9), names=names)
    fit = fit_envelope(curves, samples=20)
    assert fit.parameters["a"] == pytest.approx(A, abs=0.04)
    assert fit.parameters["b"] == pytest.approx(1 - A, abs=0.04)
    # At the ends the best model is only the smallest or the largest one.
    assert set(fit.points[:, 1]) == set(sizes[1:-1])
    (picture,) = draw_allocation(fit, curves, tmp_path)
    assert picture.name == "envelope.png"
    assert picture.stat().st_size > 10_000
    with pytest.raises(UserError, match="run0 has one measured loss"):
        fit_envelope(curves.take(range(0, 540, 60)))
    with pytest.raises(UserError, match="fewer than 3 model sizes"):
        fit_envelope(curves.take(range(120)))
    with pytest.raises(UserError, match="the best model changes too rarely"):
        fit_envelope(curves.take(range(180)))
