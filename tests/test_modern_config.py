"""The dial of configs/gpt_modern.py: sizes and rates that follow from the number of layers."""

import runpy
from pathlib import Path

import pytest

from gptjax import config as c

CONFIGS = Path(__file__).parents[1] / "configs"
MODERN = runpy.run_path(str(CONFIGS / "gpt_modern.py"))
GET_CONFIG = MODERN["get_config"]


def test_without_all_ingredients_it_is_gpt2():
    gpt2 = runpy.run_path(str(CONFIGS / "gpt2.py"))["get_config"]
    without = "+".join(MODERN["INGREDIENTS"])
    assert c.resolve(GET_CONFIG(f"runlocal,without={without}")) == c.resolve(gpt2("runlocal"))


@pytest.mark.parametrize("name", MODERN["INGREDIENTS"])
def test_each_ingredient_can_be_switched_back(name):
    """The config is valid without it, as it is for the whole and at a published size."""
    for arguments in (f"runlocal,without={name}", f"size=355m,without={name}"):
        config = c.resolve(GET_CONFIG(arguments))
        c.check(config)
        assert config != c.resolve(GET_CONFIG(arguments.partition(",without")[0]))


@pytest.mark.parametrize("depth", [4, 20])
def test_sizes_and_rates_follow_from_the_depth(depth):
    base, config = (c.resolve(GET_CONFIG(f"depth={layers}")) for layers in (12, depth))
    model = config.model
    assert (model.num_layers, model.embed_dim, model.head_dim) == (depth, 64 * depth, 64)
    assert (base.model.width_factor, base.model.depth_factor) == (1, 1)
    assert (model.width_factor, model.depth_factor) == (depth / 12, depth / 12)
    assert base.optimizer.peak_lr == 6e-4
    assert config.batch.total_tokens == pytest.approx(base.batch.total_tokens * (depth / 12) ** 3, rel=0.02)
    batch = config.batch.tokens_per_batch / base.batch.tokens_per_batch
    assert config.optimizer.peak_lr / base.optimizer.peak_lr == pytest.approx(batch**0.5, rel=1e-3)

    def decayed(config: c.Config) -> float:
        """Learning rate x weight decay, summed over the steps."""
        optimizer, length = config.optimizer, config.batch
        return optimizer.peak_lr * optimizer.weight_decay * length.total_tokens / length.tokens_per_batch

    assert decayed(config) == pytest.approx(decayed(base), rel=1e-3)


@pytest.mark.parametrize("arguments", ["depth=5", "depth=8,size=355m", "depth=8,runlocal", "depth=-2"])
def test_dial_refuses_contradictions(arguments):
    with pytest.raises(c.UserError, match="depth="):
        GET_CONFIG(arguments)
    assert c.resolve(GET_CONFIG("depth=5,without=value_embeddings")).model.num_layers == 5
