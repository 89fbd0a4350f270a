"""Scaling laws: derivatives, changes of parameters, and the optimum."""

import numpy as np
import pytest

from gptjax.scaling.law_fits import Fit, published
from gptjax.scaling.laws import LAWS, PUBLISHED, compute_optimal

PARAMETERS = {
    "chinchilla": PUBLISHED["epoch"][1],
    "kaplan": {"alpha_N": 0.076, "N_c": 6.4e13, "alpha_D": 0.103, "D_c": 1.8e13},
    "compute": {"a": 30.0, "b": -0.08, "c": 1.2},
    "pass_rate": {"alpha": 40.0, "k": 0.1},
} | {name: PUBLISHED[name][1] for name in PUBLISHED if name.startswith("kaplan_")}


def inputs(law) -> np.ndarray:
    """Logs of inputs, (5, columns)."""
    return np.random.default_rng(0).uniform(18, 28, (5, len(law.columns)))


@pytest.mark.parametrize("name", LAWS)
def test_jacobian_is_the_derivative(name):
    law = LAWS[name]
    theta, logs = law.encode(PARAMETERS[name]), inputs(law)
    _, jacobian = law.log_value(theta, logs)
    for place in range(len(theta)):
        step = np.zeros_like(theta)
        step[place] = 1e-6
        slope = (law.log_value(theta + step, logs)[0] - law.log_value(theta - step, logs)[0]) / 2e-6
        np.testing.assert_allclose(jacobian[:, place], slope, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("name", LAWS)
def test_encode_inverts_decode_and_shift_moves_the_inputs(name):
    law = LAWS[name]
    theta, logs = law.encode(PARAMETERS[name]), inputs(law)
    assert law.decode(theta) == pytest.approx(PARAMETERS[name], rel=1e-9)
    assert set(law.decode(theta)) == set(law.names)
    by = np.arange(1.0, 1 + len(law.columns))
    moved = law.log_value(law.shift(theta, by), logs - by)[0]
    np.testing.assert_allclose(moved, law.log_value(theta, logs)[0], rtol=1e-12)


def test_laws_agree_with_their_equations():
    size, tokens = 7e10, 1.4e12
    at = published("hoffmann")
    expected = 1.69 + 406.4 / size**0.33917 + 410.7 / tokens**0.28491
    assert at.law.value(at.theta, {"parameters": size, "tokens": tokens})[0] == pytest.approx(expected)
    kaplan = LAWS["kaplan"]
    p = PARAMETERS["kaplan"]
    expected = ((p["N_c"] / size) ** (p["alpha_N"] / p["alpha_D"]) + p["D_c"] / tokens) ** p["alpha_D"]
    assert kaplan.value(kaplan.encode(p), {"parameters": size, "tokens": tokens})[0] == pytest.approx(expected)
    gpt4 = LAWS["compute"]
    value = gpt4.value(gpt4.encode(PARAMETERS["compute"]), {"flops": 1e20})[0]
    assert value == pytest.approx(30 * 1e20**-0.08 + 1.2)


@pytest.mark.parametrize("name", ["chinchilla", "kaplan"])
def test_no_other_size_of_the_budget_is_better_than_the_optimum(name):
    law = LAWS[name]
    theta = law.encode(PARAMETERS[name])
    size, tokens = Fit(law, theta, np.zeros((0, len(theta))), np.zeros(0)).optimum(1e21)
    assert 6 * size * tokens == pytest.approx(1e21)
    sizes = size * np.geomspace(0.5, 2, 101)
    losses = law.value(theta, {"parameters": sizes, "tokens": 1e21 / (6 * sizes)})
    assert np.argmin(losses) == 50


def test_compute_optimal_model_of_the_published_laws():
    """G (C / 6)^a of Hoffmann et al. 2022; at Chinchilla's compute Epoch's law gives about 20 tokens per parameter."""
    size, tokens = compute_optimal(PUBLISHED["epoch"][1], 5.76e23)
    assert 15 < tokens / size < 25
