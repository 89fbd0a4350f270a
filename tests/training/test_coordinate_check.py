"""The coordinate check: flat for muP and CompleteP, far from flat for the standard parametrization."""

import dataclasses

import pytest

from gptjax import config as c
from gptjax.scaling.model_sizes import resized
from gptjax.stages import registry
from gptjax.training.coordinate_check import mean_of_seeds, measured, one_batch, slopes

BASE = c.GPTConfig(
    vocab_size=32, context_length=8, num_layers=2, num_heads=4, embed_dim=32, dtype="float32", layer_loop="scan"
)
MUP = {"parametrization": "mup", "base_width": 32}
COMPLETEP = {"parametrization": "completep", "base_width": 32, "base_depth": 2}


def found(fields: dict, sizes: list[dict], optimizer: str) -> dict:
    """Kind -> slope."""
    by_size = {}
    for size in sizes:
        model = resized(dataclasses.replace(BASE, **fields), **size)
        config = c.Config(
            model=model,
            batch=c.BatchConfig(total_tokens=64, tokens_per_batch=64),
            optimizer=c.OptimizerConfig(name=optimizer, min_factored_dim=8),
        )
        seeds = [0, 1]
        runs = measured(registry.objective(config), seeds, [one_batch(model, 8, seed) for seed in seeds], 3, 2**-6)
        by_size[next(iter(size.values()))] = mean_of_seeds(runs)
    return {slope.kind: slope for slope in slopes(by_size, 0.35)}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("optimizer", "tied"),
    [
        *(("adamw", True), ("adamw", False), ("muon", True), ("muon", False), ("adafactor", True)),
        # The residual stream was found to shrink as width^-0.39 from 32 to 128.
        pytest.param("adafactor", False, marks=pytest.mark.xfail(strict=True)),
    ],
)
def test_width(optimizer, tied):
    widths = [{"width": 32}, {"width": 128}]
    flat = found({**MUP, "tied_head": tied}, widths, optimizer)
    assert all(slope.is_flat for slope in flat.values()), flat
    standard = found({"tied_head": tied}, widths, optimizer)
    # By the theory: orthogonal updates grow as the square root of the width, entrywise ones as the width.
    least = 0.4 if optimizer == "muon" else 0.7
    assert max(standard[kind].change for kind in ("attention", "feed_forward", "residual")) > least, standard


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_depth(optimizer):
    depths = [{"layers": 2}, {"layers": 16}]
    flat = found(COMPLETEP, depths, optimizer)
    assert all(slope.is_flat for slope in flat.values()), flat
    assert found({}, depths, optimizer)["residual"].change > 0.5
