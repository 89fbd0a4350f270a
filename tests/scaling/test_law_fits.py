"""Fits of scaling laws: to points drawn from a known law, and to the public table of 104 models."""

import os
from pathlib import Path

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.scaling.law_fits import fit_law, fit_of_tree, published
from gptjax.scaling.laws import LAWS, PUBLISHED
from gptjax.scaling.run_table import RunTable, read_csv

FIXTURE = Path(__file__).parents[1] / "fixtures" / "overtraining" / "models.csv"
COLUMNS = {"parameters": "params", "loss": "loss_c4_val"}
CHINCHILLA, EPOCH = LAWS["chinchilla"], PUBLISHED["epoch"][1]


def table(**columns) -> RunTable:
    arrays = {name: np.asarray(values, np.float64) for name, values in columns.items()}
    count = len(next(iter(arrays.values())))
    return RunTable("runs.csv", tuple(map(str, range(count))), arrays, "")


def drawn(seed: int = 0) -> RunTable:
    """240 runs of Epoch's law: 9 budgets from 6e18 to 3e21 FLOPs, with a spread of 0.5 % and a tail, as Epoch's have.

    Epoch's own points are not here: they have no license. `CHINCHILLA_POINTS` names the file for the test below.
    """
    generator = np.random.default_rng(seed)
    flops = np.repeat(np.geomspace(6e18, 3e21, 9), 27)[:240]
    optimal = 2.8e9 * (flops / 1e21) ** 0.51
    sizes = optimal * np.exp(generator.uniform(-1.8, 1.8, 240))
    tokens = flops / (6 * sizes)
    noise = 0.004 * generator.standard_t(3, 240)
    losses = published("epoch").law.value(published("epoch").theta, {"parameters": sizes, "tokens": tokens})
    return table(parameters=sizes, tokens=tokens, loss=losses * np.exp(noise))


def overtrained(dataset: str) -> RunTable:
    """The 26 or 27 models of a training set that read at least 20 tokens per parameter."""
    runs = read_csv(FIXTURE, COLUMNS, ("parameters", "tokens", "loss"), {"train_dataset": dataset})
    return runs.take(runs.columns["tokens"] / runs.columns["parameters"] > 19.9)


def test_parameters_of_the_law_that_the_points_were_drawn_from_lie_in_their_intervals():
    runs = drawn()
    runs.columns["loss"][7] *= 1.5  # the Huber loss bounds the pull of an outlier
    fit = fit_law(CHINCHILLA, runs, samples=60)
    for name, (low, high) in (fit.intervals or {}).items():
        assert low < EPOCH[name] < high, name
    assert fit.parameters["alpha"] == pytest.approx(EPOCH["alpha"], abs=0.03)
    assert fit.parameters["beta"] == pytest.approx(EPOCH["beta"], abs=0.03)
    assert fit.parameters["E"] == pytest.approx(EPOCH["E"], abs=0.05)
    # Chinchilla itself has 30 times the compute of the largest of these runs.
    loss, interval = fit.predict({"parameters": 70e9, "tokens": 1.4e12})
    true = published("epoch").predict({"parameters": 70e9, "tokens": 1.4e12})[0]
    assert loss == pytest.approx(true, rel=0.01)
    assert interval is not None
    assert interval[0] < true < interval[1]
    again = fit_of_tree(fit.tree())
    np.testing.assert_allclose(again.predict({"parameters": 70e9, "tokens": 1.4e12})[1], interval, rtol=1e-9)


@pytest.mark.skipif("CHINCHILLA_POINTS" not in os.environ, reason="needs Epoch's svg_extracted_data.csv")
def test_epochs_fit_of_chinchilla_is_reproduced():
    runs = read_csv(Path(os.environ["CHINCHILLA_POINTS"]), {"loss": "loss"}, ("parameters", "tokens", "loss"), {})
    runs = runs.take(runs.columns["loss"] < np.sort(runs.columns["loss"])[-5])
    fit = fit_law(CHINCHILLA, runs, samples=200)
    assert len(runs) == 240
    assert fit.objective < 1.01828e-3  # Epoch's rounded parameters have 1.0228e-3
    for name, (low, high) in (fit.intervals or {}).items():
        assert low < EPOCH[name] < high, name


@pytest.mark.parametrize(
    ("dataset", "objective", "exponents"),
    [
        ("c4_original", 2.17739e-4, (0.2781, 0.2345)),
        ("rpj", 1.37309e-4, (0.2605, 0.2504)),
    ],
)
def test_the_optimum_on_public_tables_is_found(dataset, objective, exponents):
    """The values of an independent fit, with other starts and BFGS."""
    fit = fit_law(CHINCHILLA, overtrained(dataset), samples=0)
    assert fit.objective == pytest.approx(objective, rel=1e-4)
    assert (fit.parameters["alpha"], fit.parameters["beta"]) == pytest.approx(exponents, abs=2e-3)


def test_larger_runs_of_a_public_table_are_predicted_within_1_percent():
    """Runs on RedPajama of 9 and 12 times the compute of the largest fitted one, of 6.9 and 1.4 billion parameters."""
    runs = overtrained("rpj")
    large = runs.columns["flops"] > 1e21
    small, held_out = runs.take(~large), runs.take(large)
    fit = fit_law(CHINCHILLA, small, samples=0)
    factors = held_out.columns["flops"] / small.columns["flops"].max()
    assert sorted(factors) == pytest.approx([8.8, 12.2], abs=0.1)
    errors = fit.law.value(fit.theta, held_out.columns) / held_out.columns["loss"] - 1
    assert np.abs(errors).max() < 0.01


def test_fits_of_compute_and_pass_rate():
    flops = np.geomspace(1e15, 1e19, 12)
    noise = np.exp(0.001 * np.random.default_rng(1).standard_normal(12))
    fit = fit_law(LAWS["compute"], table(flops=flops, loss=(90 * flops**-0.12 + 1.6) * noise), samples=30)
    # 1,000 times the compute of the largest run
    assert fit.predict({"flops": 1e22})[0] == pytest.approx(90 * 1e22**-0.12 + 1.6, rel=0.01)
    fit = fit_law(LAWS["pass_rate"], table(flops=flops, surprise=50 * flops**-0.08 * noise), samples=0)
    assert fit.parameters["k"] == pytest.approx(0.08, abs=0.002)
    kaplan = published("kaplan_parameters")
    sizes = np.geomspace(1e6, 1e9, 8)
    runs = table(parameters=sizes, loss=kaplan.law.value(kaplan.theta, {"parameters": sizes}))
    fit = fit_law(LAWS["kaplan_parameters"], runs, samples=0)
    assert fit.parameters == pytest.approx(PUBLISHED["kaplan_parameters"][1], rel=1e-4)


def test_runs_that_cannot_determine_the_law_are_refused():
    runs = drawn()
    with pytest.raises(UserError, match=r"runs.csv: 5 runs are too few for the law chinchilla, which needs at least 6"):
        fit_law(CHINCHILLA, runs.take(range(5)))
    two = table(parameters=np.repeat([1e8, 1e9], 10), tokens=np.geomspace(1e9, 1e11, 20), loss=np.linspace(4, 3, 20))
    with pytest.raises(UserError, match="2 different parameters: the law chinchilla needs at least 3"):
        fit_law(CHINCHILLA, two)
    rising = table(flops=np.geomspace(1e15, 1e18, 8), loss=np.linspace(2, 3, 8))
    with pytest.raises(UserError, match="loss does not decrease with flops in these runs"):
        fit_law(LAWS["compute"], rising)
