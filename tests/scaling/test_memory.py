from dataclasses import replace

import flax.linen as nn
import jax
import pytest

from gptjax.checkpoint.state import init_state
from gptjax.config import Config, GPTConfig, OptimizerConfig
from gptjax.scaling.memory import MemorySummary, memory_summary
from gptjax.scaling.parameters import expert_parameter_count, layer_parameters, parameter_count
from gptjax.stages import registry
from tests.scaling.covering_models import EVERYTHING, MIXTURE, SMALL


def test_memory_counts_state_and_divides_by_shards() -> None:
    count = parameter_count(SMALL)
    whole = memory_summary(SMALL, OptimizerConfig())
    assert whole == MemorySummary(4 * count, 4 * count, 8 * count, 0)
    assert whole.total == 16 * count
    assert memory_summary(SMALL, OptimizerConfig(ema_decay=0.99)).total == 20 * count
    # Trained parameters are float32, frozen ones of param_dtype.
    half = replace(SMALL, param_dtype="bfloat16")
    assert memory_summary(half, OptimizerConfig(), shards=4).total == 4 * count
    assert memory_summary(half, OptimizerConfig(), trained=1000).parameters == 2 * (count - 1000) + 4 * 1000


def test_experts_are_divided_by_their_axis_too() -> None:
    count, experts = parameter_count(MIXTURE), expert_parameter_count(MIXTURE)
    held = memory_summary(MIXTURE, OptimizerConfig(), shards=2, expert_shards=4).parameters
    assert held == pytest.approx(4 * ((count - experts) / 2 + experts / 8), abs=1)
    assert memory_summary(SMALL, OptimizerConfig(), 2, expert_shards=4) == memory_summary(SMALL, OptimizerConfig(), 2)


@pytest.mark.parametrize("model", [SMALL, EVERYTHING], ids=["plain", "everything"])
@pytest.mark.parametrize(
    "optimizer",
    [
        OptimizerConfig(),
        OptimizerConfig(first_moment_dtype="bfloat16"),
        OptimizerConfig(name="muon"),
        OptimizerConfig(name="adafactor", min_factored_dim=16),
        OptimizerConfig(name="adafactor", beta1=0.0, min_factored_dim=16),
        OptimizerConfig(name="adafactor", min_factored_dim=1000),
    ],
    ids=lambda optimizer: f"{optimizer.name}-{optimizer.first_moment_dtype}",
)
def test_moments_are_those_of_the_state(optimizer: OptimizerConfig, model: GPTConfig) -> None:
    config = Config(model=model, optimizer=optimizer)
    state = jax.eval_shape(lambda: init_state(registry.parameters(config)))
    arrays = [leaf for leaf in jax.tree.leaves(nn.unbox(state).opt_state) if leaf.ndim > 0]
    # Adafactor has a number in the place of what it does not keep, and Muon its coefficients.
    small = 12 + 3 * 4 * model.num_layers * (8 + len(layer_parameters(model, 0)))
    counted = memory_summary(model, optimizer).moments
    assert counted <= sum(leaf.size * leaf.dtype.itemsize for leaf in arrays) <= counted + small
