"""Products, zips and random draws of overrides."""

import math

import pytest

from gptjax.config import UserError
from gptjax.launch import grid


def test_products_and_zips():
    rates, seeds = grid.values("optimizer.peak_lr", [1e-3, 1e-2]), grid.values("seed", range(2))
    assert grid.product(rates, seeds) == [
        {"optimizer.peak_lr": rate, "seed": seed} for rate in (1e-3, 1e-2) for seed in (0, 1)
    ]
    assert grid.zipped(rates, seeds) == [
        {"optimizer.peak_lr": 1e-3, "seed": 0},
        {"optimizer.peak_lr": 1e-2, "seed": 1},
    ]
    assert grid.product() == [{}]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: grid.product([{"seed": 0}], [{"seed": 1}]), "sets 'seed' twice"),
        (lambda: grid.zipped([{"seed": 0}], []), "1, 0 entries"),
        (lambda: grid.LogUniform(0.0, 1.0), "0 < low <= high"),
        (lambda: grid.Uniform(2, 1), "low <= high"),
        (lambda: grid.Uniform(math.nan, 1), "low <= high"),
        (lambda: grid.Choice([]), "at least one"),
    ],
)
def test_what_cannot_be_a_sweep_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        make()


def test_draws_depend_on_the_seed_and_the_key_alone():
    space = {
        "optimizer.peak_lr": grid.LogUniform(1e-4, 1e-1),
        "model.num_layers": grid.Integers(2, 4),
        "optimizer.name": grid.Choice(["adamw", "muon"]),
        "optimizer.weight_decay": grid.Uniform(0, 1),
    }
    drawn = grid.draws(40, space, seed=3)
    assert drawn[:10] == grid.draws(10, space, seed=3)
    assert drawn != grid.draws(40, space, seed=4)
    alone = grid.draws(40, {"optimizer.peak_lr": space["optimizer.peak_lr"]}, seed=3)
    assert [one["optimizer.peak_lr"] for one in drawn] == [one["optimizer.peak_lr"] for one in alone]
    rates = [one["optimizer.peak_lr"] for one in drawn]
    assert all(1e-4 <= rate <= 1e-1 for rate in rates)
    assert 5 < sum(rate < 10**-2.5 for rate in rates) < 35
    assert {one["model.num_layers"] for one in drawn} == {2, 3, 4}
    assert {one["optimizer.name"] for one in drawn} == {"adamw", "muon"}
