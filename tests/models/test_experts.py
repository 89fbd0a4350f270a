"""A mixture of experts loses no token, treats all experts alike, and balances their load."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import BatchConfig, Config, GPTConfig, OptimizerConfig, PeftConfig
from gptjax.losses.cross_entropy import cross_entropy
from gptjax.models import peft
from gptjax.models.axis_roles import ParameterAxes
from gptjax.models.experts import MixtureOfExperts, choose, measure, with_load_gradient
from gptjax.models.feed_forward import MLP
from gptjax.models.gpt import GPT, init_params
from gptjax.optim.optimizers import gradient_norm, make_optimizer
from gptjax.stages.pretrain import next_token_loss

CONFIG = GPTConfig(
    vocab_size=31,
    context_length=16,
    num_layers=2,
    num_heads=2,
    embed_dim=8,
    ffw_dim=12,
    dtype="float32",
    kernel_init_std=0.5,
    num_experts=4,
    experts_per_token=2,
    gated=True,
    activation="silu",
)
X_BTD = jax.random.normal(jax.random.key(5), (3, 10, 8))


def layer(**changes):
    return MixtureOfExperts(dataclasses.replace(CONFIG, **changes), nn.initializers.normal(0.5))


def parameters(module, seed=0):
    params = nn.unbox(jax.jit(module.init)(jax.random.key(seed), X_BTD)["params"])
    leaves, tree = jax.tree.flatten(params)
    return jax.tree.unflatten(
        tree, [x + 0.1 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    )


PARAMS = parameters(layer())


def output_and_gradient(module, params):
    def scalar(params, x_BTD):
        out_BTD = module.apply({"params": params}, x_BTD)
        return jnp.sum(jnp.sin(out_BTD)), out_BTD

    (_, out_BTD), gradients = jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(params, X_BTD)
    return out_BTD, gradients


def close(found, expected, tolerance=1e-4):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), found, expected)


def expert_of_token(params, expert, x_D):
    up, gate, down = (params["experts"][name] for name in ("up", "gate", "down"))
    h = x_D @ up["kernel"][expert] + up["bias"][expert]
    return (
        jax.nn.silu(x_D @ gate["kernel"][expert] + gate["bias"][expert]) * h @ down["kernel"][expert]
        + down["bias"][expert]
    )


@pytest.mark.parametrize("backend", ["dense", "grouped"])
def test_every_token_gets_the_weighted_sum_of_its_experts(backend):
    out_BTD, _ = output_and_gradient(layer(expert_backend=backend), PARAMS)
    logits_BTE = X_BTD @ PARAMS["router"]["kernel"]
    for row, position in np.ndindex(3, 10):
        logits_E, x_D = np.asarray(logits_BTE[row, position]), X_BTD[row, position]
        chosen = np.argsort(-logits_E)[:2]
        weights = np.exp(logits_E[chosen]) / np.exp(logits_E[chosen]).sum()
        expected = sum(w * expert_of_token(PARAMS, e, x_D) for w, e in zip(weights, chosen, strict=True))
        np.testing.assert_allclose(out_BTD[row, position], expected, rtol=1e-4, atol=1e-4)


def test_grouped_and_dense_products_agree_in_value_and_gradient():
    close(*(output_and_gradient(layer(expert_backend=backend), PARAMS) for backend in ("grouped", "dense")))


def test_one_expert_is_the_dense_layer():
    mixture = layer(num_experts=1, experts_per_token=1)
    params = parameters(mixture)
    dense = MLP(dataclasses.replace(CONFIG, num_experts=None), nn.initializers.zeros)
    same = jax.tree.map(lambda p: p[0], params["experts"])
    np.testing.assert_allclose(
        jax.jit(mixture.apply)({"params": params}, X_BTD),
        jax.jit(dense.apply)({"params": same}, X_BTD),
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("backend", ["dense", "grouped"])
def test_the_order_of_tokens_and_of_experts_means_nothing(backend):
    module = layer(expert_backend=backend)
    apply = jax.jit(lambda params, x_BTD: module.apply({"params": params}, x_BTD))
    expected = apply(PARAMS, X_BTD)
    order_T = np.random.default_rng(1).permutation(10)
    close(apply(PARAMS, X_BTD[:, order_T]), expected[:, order_T], 1e-5)
    order_E = np.array([2, 0, 3, 1])
    moved = {
        "router": {"kernel": PARAMS["router"]["kernel"][:, order_E]},
        "experts": jax.tree.map(lambda p: p[order_E], PARAMS["experts"]),
    }
    close(apply(moved, X_BTD), expected, 1e-5)


@pytest.mark.parametrize("backend", ["dense", "grouped"])
def test_an_expert_that_nobody_chose_has_no_gradient_and_no_nan(backend):
    params = PARAMS | {"router": {"kernel": PARAMS["router"]["kernel"], "bias": jnp.array([0.0, 0.0, -1e4, 0.0])}}
    _, (gradient, dx_BTD) = output_and_gradient(layer(expert_backend=backend, router_bias=True), params)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, dx_BTD)))
    for leaf in jax.tree.leaves(gradient["experts"]):
        np.testing.assert_array_equal(leaf[2], 0)
        assert np.abs(leaf[0]).max() > 0


def test_capacity_drops_the_last_tokens_of_a_full_expert():
    """All 30 tokens choose expert 0, which computes the first ceil(30 / 4)."""
    module = layer(experts_per_token=1, expert_capacity=1.0, router_bias=True)
    params = PARAMS | {"router": {"kernel": 0 * PARAMS["router"]["kernel"], "bias": jnp.array([1.0, 0.0, 0.0, 0.0])}}
    out_ND = jax.jit(module.apply)({"params": params}, X_BTD).reshape(30, 8)
    assert (np.abs(out_ND).max(axis=1) > 0).tolist() == [True] * 8 + [False] * 22


# --- the router -------------------------------------------------------------------------------------------------------


def test_sigmoid_weights_are_normalised_and_the_bias_chooses_only():
    logits_BTE, bias_E = jnp.array([[[1.0, 0.0, -1.0, 0.5]]]), jnp.array([0.0, 0.0, 9.0, 0.0])
    config = dataclasses.replace(CONFIG, router_weights="sigmoid")
    assert choose(config, logits_BTE, None).experts_BTU.tolist() == [[[0, 3]]]
    routes = choose(config, logits_BTE, bias_E)
    assert routes.experts_BTU.tolist() == [[[2, 0]]]
    scores = 1 / (1 + np.exp([1.0, -1.0]))
    np.testing.assert_allclose(routes.weights_BTU[0, 0], scores / scores.sum(), rtol=1e-6)


def test_balance_and_z_losses_by_hand():
    """Two tokens, two experts, one each: token 0 chooses 0 with p = 0.8, token 1 chooses 0 with p = 0.6."""
    logits_BTE = jnp.log(jnp.array([[[0.8, 0.2], [0.6, 0.4]]]))
    measures = measure(logits_BTE, jnp.array([[[0], [0]]]))
    assert float(measures.balance) == pytest.approx(2 * (1 * 0.7 + 0 * 0.3))
    assert float(measures.z) == pytest.approx(0, abs=1e-12)
    shifted = measure(logits_BTE + 2, jnp.array([[[0], [1]]]))
    assert float(shifted.balance) == pytest.approx(1)
    assert float(shifted.z) == pytest.approx(4)
    np.testing.assert_allclose(measures.load_E, [1, 0])


def test_the_balance_bias_moves_against_the_load_at_the_rate_of_the_schedule():
    load_E = jnp.array([0.5, 0.25, 0.2, 0.05])
    gradient_E = jax.grad(lambda bias_E: 7 * jnp.sum(with_load_gradient(jnp.ones(3), bias_E, load_E)))(jnp.zeros(4))
    np.testing.assert_allclose(gradient_E, load_E - 0.25)
    model = dataclasses.replace(CONFIG, balance_bias=True, balance_bias_rate=0.01)
    config = Config(model=model, optimizer=OptimizerConfig(peak_lr=0.5, clip_norm=1e-6, weight_decay=0.1))
    params = {"mlp": {"balance_bias": jnp.zeros(4), "up": {"kernel": jnp.ones((2, 2))}}}
    axes = {"mlp/balance_bias": ParameterAxes(("balance",)), "mlp/up/kernel": ParameterAxes(("input", "output"))}
    optimizer = make_optimizer(config, axes)
    gradients = {"mlp": {"balance_bias": gradient_E, "up": {"kernel": jnp.ones((2, 2))}}}
    updates, _ = optimizer.update(gradients, optimizer.init(params), params)
    # The step multiplies by minus the learning rate: at the peak, 0.01 up or down, or nothing at the mean.
    np.testing.assert_allclose(-0.5 * updates["mlp"]["balance_bias"], [-0.01, 0, 0.01, 0.01], rtol=1e-6)
    assert float(gradient_norm(gradients, axes)) == pytest.approx(2)


def test_training_adds_the_routers_losses_and_evaluation_does_not():
    model = dataclasses.replace(CONFIG, router_balance_loss=0.1, router_z_loss=0.01, z_loss=0.001, balance_bias=True)
    config = Config(model=model, batch=BatchConfig(epochs=1.0, tokens_per_batch=16))
    params = nn.unbox(jax.jit(lambda: init_params(GPT(model), jax.random.key(0)))())
    tokens_BT = np.random.default_rng(0).integers(0, 31, (2, 16))
    batch = {
        "tokens": tokens_BT,
        "targets": np.roll(tokens_BT, -1, axis=1),
        "weights": np.full((2, 16), 0.5, np.float32),
    }
    loss = next_token_loss(config)
    total, weight, measures = jax.jit(loss)(params, batch, jax.random.key(1))
    held_out, _, none = jax.jit(partial(loss, rng=None))(params, batch)
    assert none == {}
    added = 0.1 * measures["router_balance"] + 0.01 * measures["router_z"]
    assert float(total) == pytest.approx(float(measures["cross_entropy"] + added), rel=1e-5)
    assert float(measures["cross_entropy"]) > float(held_out) + 0.05  # the z-loss
    assert float(weight) == 16
    assert 0.9 < float(measures["router_balance"] / weight) < 4


@pytest.mark.parametrize("named", ["segments", "weights"])
def test_padding_changes_nothing(named):
    """Neither the loss, nor what routers measure, nor a gradient, with experts that have too many tokens."""
    model = dataclasses.replace(
        CONFIG, router_balance_loss=0.1, router_z_loss=0.01, balance_bias=True, expert_capacity=0.8, num_layers=1
    )
    loss = next_token_loss(Config(model=model, batch=BatchConfig(epochs=1.0, tokens_per_batch=16)))
    params = nn.unbox(jax.jit(lambda: init_params(GPT(model), jax.random.key(0)))())
    tokens_BT = np.random.default_rng(0).integers(0, 31, (2, 12))
    batch = {"tokens": tokens_BT, "targets": tokens_BT, "weights": np.ones((2, 12), np.float32)}
    if named == "segments":
        batch |= {"segments": np.ones((2, 12), int), "weights": (tokens_BT % 2).astype(np.float32)}

    def computed(batch):
        def scalar(params):
            total, weight, measures = loss(params, batch, jax.random.key(1))
            return total, (weight, measures)

        return jax.jit(jax.value_and_grad(scalar, has_aux=True))(params)

    padded = {name: np.pad(array_BT, ((0, 2), (0, 4))) for name, array_BT in batch.items()}
    found, expected = computed(padded), computed(batch)
    close(found, expected, 1e-5)
    assert np.abs(expected[1]["layers"]["block_0"]["mlp"]["balance_bias"]).max() > 0.01


def test_z_loss_and_soft_cap_have_the_gradients_of_their_definition():
    keys = jax.random.split(jax.random.key(0), 2)
    x, head = 3 * jax.random.normal(keys[0], (2, 5, 4)), jax.random.normal(keys[1], (7, 4))
    targets, weights = np.arange(10).reshape(2, 5) % 7, np.linspace(0, 1, 10, dtype=np.float32).reshape(2, 5)

    def plain(x, head):
        logits = 3 * jnp.tanh(jnp.einsum("btd,vd->btv", x, head) / 3)
        log_z = jax.nn.logsumexp(logits, axis=-1)
        nats = log_z - jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        return jnp.sum(weights * (nats + 0.1 * log_z**2))

    def ours(x, head):
        return cross_entropy(x, head, targets, weights, 2, soft_cap=3.0, z_loss=0.1)

    close(*(jax.value_and_grad(f, (0, 1))(x, head) for f in (ours, plain)), 1e-5)


# --- low-rank adapters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lora", "adalora"])
def test_each_expert_has_low_rank_matrices_of_its_own(method):
    gpt = GPT(CONFIG)
    config = PeftConfig(method=method, rank=2, initial_rank=2, alpha=4.0, targets=(r".*/experts/.*/kernel",))

    params = nn.unbox(jax.jit(lambda: init_params(gpt, jax.random.key(0)))())
    added = nn.unbox(jax.jit(lambda: peft.low_rank(config, init_params(gpt, jax.random.key(0)), jax.random.key(1)))())
    shapes = {path: leaf.shape for path, leaf in peft.flatten(added).items()}
    first, last = ("lora_a", "lora_b") if method == "lora" else ("lora_p", "lora_q")
    assert shapes[f"layers/block_0/mlp/experts/up/{first}"] == (2, 4, 8, 2)
    assert shapes[f"layers/block_0/mlp/experts/up/{last}"] == (2, 4, 2, 12)
    assert len(shapes) == 3 * (2 if method == "lora" else 3)
    added = jax.tree.map(lambda x: x + 0.3, added)
    both = peft.join(params, added)
    tokens_BT = np.arange(20).reshape(2, 10)
    with peft.applied(config, deterministic=True):
        adapted = jax.jit(gpt.apply)({"params": both}, tokens_BT)
    merged = jax.jit(gpt.apply)({"params": peft.merge(config, both)}, tokens_BT)
    np.testing.assert_allclose(adapted, merged, rtol=1e-4, atol=1e-4)
    assert np.abs(adapted - jax.jit(gpt.apply)({"params": params}, tokens_BT)).max() > 1e-2
