"""Models of other sizes in the proportions of a given one, and rules for their rates."""

import dataclasses

import pytest

from gptjax.config import GPTConfig, UserError
from gptjax.scaling.hyperparameters import RULES
from gptjax.scaling.model_sizes import COUNTS, nearest_model, scaled_models

GPT2 = GPTConfig(vocab_size=50_257)
GROUPED = dataclasses.replace(GPT2, num_kv_heads=3, head_width=128, ffw_dim=2048, gated=True)


@pytest.mark.parametrize("model", [GPT2, GROUPED])
def test_proportions_are_kept(model):
    for other in scaled_models(model):
        assert other.num_heads % other.kv_heads == 0
        assert other.num_heads // other.kv_heads == model.num_heads // model.kv_heads
        assert other.head_dim == model.head_dim
        assert 0.5 < (other.embed_dim / other.num_layers) / 64 < 1.6 or other.num_layers < 3


@pytest.mark.parametrize("count", ["total", "non_embedding"])
def test_a_model_of_about_every_size_exists(count):
    for parameters in (1e8, 7e8, 1.3e10, 1.7e11):
        found = COUNTS[count](nearest_model(GPT2, count, parameters))
        assert found == pytest.approx(parameters, rel=0.15)


def test_rules_of_learning_rate_and_batch_size():
    """Values that the papers name: DeepSeek 67B on 2T tokens trained at 3.2e-4 with batches of 4,608 x 4,096 tokens."""
    rates = RULES["deepseek"](6.5e10, 2e12, 2.0)
    assert rates.peak_lr == pytest.approx(3.2e-4, rel=0.15)
    assert rates.tokens_per_batch == pytest.approx(4608 * 4096, rel=0.2)
    # Kaplan et al. 2020, section 5.1: about 1 to 2 million tokens at the convergence of the largest models
    assert 5e6 > RULES["kaplan"](1.5e9, 2e10, 2.6).tokens_per_batch > 1e6
    assert RULES["step"](1e9, 1e11, 2.5).peak_lr == pytest.approx(1.6e-3, rel=0.1)
    with pytest.raises(UserError, match="the rule kaplan has no learning rate"):
        RULES["kaplan"](2e10, 1e12, 2.0)
