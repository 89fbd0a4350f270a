"""Schedules at the points that the papers name, the batch ramp, weight decay by regex, AdamW against optax's own."""

import collections
import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import config as c
from gptjax.config import BatchConfig, Config, OptimizerConfig, UserError
from gptjax.models.axis_roles import ParameterAxes
from gptjax.optim.optimizers import decay_factors, learning_rate, make_optimizer, num_microbatches

GPT3 = OptimizerConfig(
    peak_lr=6e-5, schedule="cosine", warmup_tokens=375_000_000, decay_tokens=260_000_000_000, floor_lr_fraction=0.1
)


def test_gpt3_schedule():
    """Appendix B: linear warm-up over 375M tokens, cosine to 10% over 260B, constant to 300B."""
    total = 300_000_000_000
    assert learning_rate(GPT3, 0, total) == 0
    assert learning_rate(GPT3, 375_000_000 // 2, total) == pytest.approx(3e-5)
    assert learning_rate(GPT3, 375_000_000, total) == pytest.approx(6e-5)
    assert learning_rate(GPT3, (375_000_000 + 260_000_000_000) // 2, total) == pytest.approx((6e-5 + 6e-6) / 2)
    quarter = 375_000_000 + (260_000_000_000 - 375_000_000) // 4
    assert learning_rate(GPT3, quarter, total) == pytest.approx(6e-6 + 5.4e-5 * (1 + math.cos(math.pi / 4)) / 2)
    for tokens in (260_000_000_000, 280_000_000_000, total):
        assert learning_rate(GPT3, tokens, total) == pytest.approx(6e-6)


def test_gpt1_schedule_ends_at_zero():
    config = OptimizerConfig(peak_lr=2.5e-4, warmup_tokens=2000, floor_lr_fraction=0.0)
    assert learning_rate(config, 100_000, 100_000) == pytest.approx(0, abs=1e-12)


def test_linear_wsd_and_constant():
    linear = OptimizerConfig(peak_lr=1.0, schedule="linear", warmup_tokens=100, floor_lr_fraction=0.0)
    assert [learning_rate(linear, t, 1100) for t in (50, 100, 600, 1100)] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    wsd = dataclasses.replace(linear, schedule="wsd", decay_tokens=200)
    assert [learning_rate(wsd, t, 1000) for t in (50, 100, 800, 900, 1000)] == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert learning_rate(dataclasses.replace(wsd, decay_tokens=None), 950, 1000) == pytest.approx(0.5)
    for config in (linear, wsd):
        by_tokens = dataclasses.replace(config, decay_tokens=400)
        by_fraction = dataclasses.replace(config, decay_tokens=None, decay_fraction=0.4)
        assert all(learning_rate(by_fraction, t, 1000) == learning_rate(by_tokens, t, 1000) for t in (300, 399, 700))
    constant = dataclasses.replace(linear, schedule="constant")
    assert learning_rate(constant, 1100, 1100) == 1.0


def test_batch_ramp_grows_linearly_in_whole_microbatches():
    config = BatchConfig(
        total_tokens=10_000, tokens_per_batch=800, microbatch_size=10, ramp_start_tokens=100, ramp_tokens=7_000
    )
    counts = [num_microbatches(config, 10, tokens) for tokens in range(0, 10_000, 100)]
    assert (counts[0], counts[10], counts[35], counts[69], counts[70], counts[99]) == (1, 2, 4, 7, 8, 8)
    assert counts == sorted(counts)
    assert num_microbatches(dataclasses.replace(config, ramp_start_tokens=None, ramp_tokens=None), 10, 0) == 8
    assert num_microbatches(BatchConfig(tokens_per_batch=800), 10, 0) == 1


PARAMS = {
    "dense": {"kernel": jnp.full((3, 2), 0.5), "bias": jnp.full((2,), 0.5)},
    "norm": {"scale": jnp.ones((3,)), "bias": jnp.zeros((3,))},
}


def test_decay_spares_biases_and_gains():
    factors = decay_factors(OptimizerConfig(), PARAMS)
    assert factors == {"dense": {"kernel": 1.0, "bias": 0.0}, "norm": {"scale": 0.0, "bias": 0.0}}


@pytest.mark.parametrize(
    ("rules", "culprit"),
    [
        (((".*/kernel", 1.0),), "dense/bias"),
        ((("typo/.*", 0.0), (".*", 1.0)), "typo"),
        (((".*", 1.0), (".*/bias", 0.0)), ".*/bias"),
        ((("(", 1.0),), "not a regular expression"),
    ],
)
def test_decay_rules_must_cover_every_parameter_and_be_used(rules, culprit):
    with pytest.raises(UserError) as error:
        decay_factors(OptimizerConfig(decay_rules=rules), PARAMS)
    assert culprit in str(error.value)


def test_lr_rules_scale_the_whole_update():
    """Weight decay included, as a learning rate of its own would."""
    config = OptimizerConfig(weight_decay=0.3, lr_rules=(("dense/.*", 4.0), (".*/bias", 0.5)))
    gradients = jax.tree.map(jnp.sin, PARAMS)

    def update(config: OptimizerConfig) -> dict:
        optimizer = make_optimizer(Config(optimizer=config), {})
        return optimizer.update(gradients, optimizer.init(PARAMS), PARAMS)[0]

    plain, found = update(dataclasses.replace(config, lr_rules=())), update(config)
    factors = {"dense": {"kernel": 4.0, "bias": 4.0}, "norm": {"scale": 1.0, "bias": 0.5}}
    jax.tree.map(lambda u, f, factor: np.testing.assert_allclose(f, factor * u, rtol=1e-6), plain, found, factors)


@pytest.mark.parametrize(("pattern", "culprit"), [("typo/.*", "typo"), ("(", "not a regular expression")])
def test_lr_rules_must_be_used(pattern, culprit):
    optimizer = make_optimizer(Config(optimizer=OptimizerConfig(lr_rules=((pattern, 2.0),))), {})
    with pytest.raises(UserError, match=r"optimizer\.lr_rules") as error:
        optimizer.update(PARAMS, optimizer.init(PARAMS), PARAMS)
    assert culprit in str(error.value)


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_equals_optax_adamw(clip_norm):
    config = OptimizerConfig(clip_norm=clip_norm, weight_decay=0.3, beta2=0.98)
    mask = jax.tree.map(bool, decay_factors(config, PARAMS))
    reference = optax.adamw(0.01, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.3, mask=mask)
    if clip_norm is not None:
        reference = optax.chain(optax.clip_by_global_norm(clip_norm), reference)
    ours, theirs = PARAMS, PARAMS
    optimizer = make_optimizer(Config(optimizer=config), {})  # AdamW does not depend on the roles of axes
    state, reference_state = optimizer.init(ours), reference.init(theirs)
    for step in range(5):
        grads = jax.tree.map(lambda p, step=step: jnp.sin(p + step), PARAMS)
        updates, state = optimizer.update(grads, state, ours)
        ours = jax.tree.map(lambda p, u: p - 0.01 * u, ours, updates)
        updates, reference_state = reference.update(grads, reference_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), ours, theirs)


def test_warmup_as_a_share_of_training():
    config = OptimizerConfig(peak_lr=1.0, schedule="linear", warmup_fraction=0.1, floor_lr_fraction=0.0)
    tokens = (50, 100, 550, 1000)
    assert [learning_rate(config, t, 1000) for t in tokens] == pytest.approx([0.5, 1.0, 0.5, 0.0])
    in_tokens = dataclasses.replace(config, warmup_fraction=None, warmup_tokens=100)
    assert [learning_rate(config, t, 1000) for t in tokens] == [learning_rate(in_tokens, t, 1000) for t in tokens]
    without = dataclasses.replace(config, warmup_fraction=0.0)
    assert learning_rate(without, 0, 1000) == 1.0


def test_each_layer_below_learns_more_slowly():
    """Howard & Ruder 2018, section 3.2, over layers that are dense and banded in turn."""
    layers = c.GPTConfig(num_layers=4, embed_dim=16, num_heads=2, attention_pattern=("dense", "banded"), band_width=4)
    config = Config(model=layers, optimizer=OptimizerConfig(layer_lr_decay=0.5, weight_decay=0.0, clip_norm=None))
    params = {
        "token_embedding": {"embedding": jnp.zeros((7, 3))},
        "layers": {f"block_{i}": {"mlp": {"kernel": jnp.zeros((2, 3, 5))}} for i in (0, 1)},
        "final_norm": {"scale": jnp.zeros((3,))},
        "head": {"linear": {"kernel": jnp.zeros((3, 2))}},
    }

    axes = collections.defaultdict(lambda: ParameterAxes(("output",)))
    axes["token_embedding/embedding"] = ParameterAxes(("vocabulary", "output"))

    def updates(config: Config, params: dict) -> dict:
        optimizer = make_optimizer(config, axes)
        ones = jax.tree.map(jnp.ones_like, params)
        return optimizer.update(ones, optimizer.init(params), params)[0]

    plain = dataclasses.replace(config, optimizer=dataclasses.replace(config.optimizer, layer_lr_decay=1.0))

    def factors(params: dict) -> dict:
        return jax.tree.map(lambda u, p: np.asarray(u / p), updates(config, params), updates(plain, params))

    found = factors(params)
    np.testing.assert_allclose(found["token_embedding"]["embedding"], 0.5**5)
    for i, of_rows in ((0, (0.5**4, 0.5**2)), (1, (0.5**3, 0.5**1))):  # layers 0 and 2; 1 and 3
        kernel = found["layers"][f"block_{i}"]["mlp"]["kernel"]
        np.testing.assert_allclose(kernel, np.broadcast_to(np.reshape(of_rows, (2, 1, 1)), kernel.shape), rtol=1e-6)
    np.testing.assert_allclose(found["final_norm"]["scale"], 1)
    np.testing.assert_allclose(found["head"]["linear"]["kernel"], 1)
    last = {"layers": {"block_1": {"mlp": {"kernel": jnp.zeros((1, 3, 5))}}}}  # where the last layer alone is trained
    np.testing.assert_allclose(factors(last)["layers"]["block_1"]["mlp"]["kernel"], 0.5)
