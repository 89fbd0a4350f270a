from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

from gptjax.models.gpt import GPT
from gptjax.scaling import flops
from tests.scaling.covering_models import COMBINATIONS, MIXTURE, SMALL, gpt2

TOLERANCE = 0.08


@pytest.mark.parametrize("name", COMBINATIONS)
def test_forward_flops_are_those_xla_counts(name: str) -> None:
    """Mixtures use all experts, which is what a CPU computes."""
    model = replace(COMBINATIONS[name], layer_loop="unroll")
    if model.num_experts is not None:
        model = replace(model, experts_per_token=model.num_experts, expert_backend="dense")
    gpt, tokens_BT = GPT(model), jax.ShapeDtypeStruct((2, model.context_length), jnp.int32)
    params = jax.eval_shape(gpt.init, jax.random.key(0), tokens_BT)
    analysis = jax.jit(gpt.apply).lower({"params": params["params"]}, tokens_BT).cost_analysis()
    assert analysis is not None
    # XLA computes all scores of a banded layer, and adds the element-wise operations, a few per cent at this width.
    counted = replace(model, attention_pattern=("dense",) * len(model.attention_pattern))
    assert analysis["flops"] / (2 * model.context_length) == pytest.approx(
        flops.forward_flops_per_token(counted), rel=TOLERANCE
    )


def test_a_mixture_costs_the_experts_of_a_token_and_the_router() -> None:
    """Three products of 128 x 96 for each of two experts, and the router's of 128 x 8, in four layers."""
    model = replace(MIXTURE, attention_pattern=("dense",))
    none = replace(model, num_experts=None)
    assert flops.forward_flops_per_token(model) - flops.forward_flops_per_token(none) == 4 * 2 * (3 + 8 / 96) * 128 * 96
    assert flops.expert_flops(model) == 4 * 2 * 2 * 3 * 128 * 96
    more = replace(model, num_experts=16)
    assert flops.forward_flops_per_token(more) - flops.forward_flops_per_token(model) == 4 * 2 * 8 * 128


def test_training_flops_follow_palm_appendix_b() -> None:
    model = gpt2(12, 768, 12)
    # 6N over the matrices (the tied head is one, look-ups and vectors are not) + 12 L H Q T.
    matrices = 12 * 12 * 768**2 + 50257 * 768
    assert flops.flops_per_token(model) == 6 * matrices + 12 * 12 * 768 * 1024


def test_a_banded_layer_costs_its_band() -> None:
    dense = replace(SMALL, attention_pattern=("dense",))
    mixed = replace(SMALL, attention_pattern=("dense", "banded"), band_width=16)
    saved = 4 * 128 * (64 - 16) * 2  # in two of the four layers
    assert flops.forward_flops_per_token(dense) - flops.forward_flops_per_token(mixed) == saved
    wide = replace(mixed, band_width=1000)
    assert flops.forward_flops_per_token(wide) == flops.forward_flops_per_token(dense)
