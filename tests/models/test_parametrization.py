"""muP and CompleteP: sizes of parameters and of their first change by class, and identity at the base size."""

import dataclasses
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import config as c
from gptjax.config.checks import check
from gptjax.models import peft
from gptjax.models.axis_roles import tree_axes
from gptjax.models.gpt import GPT, init_params, model_axes
from gptjax.models.heads import Head, init_with_head
from gptjax.models.parametrization import gradient_factor, init_factor, lr_factor
from gptjax.optim.optimizers import make_optimizer
from gptjax.scaling.model_sizes import resized
from gptjax.stages import registry
from gptjax.training.coordinate_check import one_batch

# All kinds of parameters: experts and a router, value embeddings and their gates, sinks, gains, biases, scalars.
BASE = c.GPTConfig(
    vocab_size=31,
    context_length=8,
    num_layers=2,
    num_heads=2,
    embed_dim=16,
    dtype="float32",
    layer_loop="scan",
    qk_norm=True,
    attention_sinks=True,
    value_embeddings="all",
    residual_scalars=True,
    num_experts=3,
    router_bias=True,
)
LAYERS = "layers/block_0/"
WIDE, DEEP = 4, 8
# Class -> factors at 4 times the width and 8 times the depth: initialisation, update of Adam, update of Muon.
CLASSES = {
    f"{LAYERS}attention/qkv/kernel": (1 / 2, 1 / 4, 1 / 2),
    f"{LAYERS}attention/out/kernel": (1 / 2, 1 / 4, 1 / 2),
    f"{LAYERS}mlp/experts/up/kernel": (1 / 2, 1 / 4, 1 / 2),
    f"{LAYERS}mlp/experts/down/kernel": (1 / 2, 1 / 4, 1 / 2),
    f"{LAYERS}mlp/router/kernel": (1 / 4, 1 / 4, 1 / 4),
    f"{LAYERS}attention/value_gate/kernel": (1, 1, 2),  # 4 times the outputs, and the 12 inputs stay the larger side
    f"{LAYERS}attention/qkv/bias": (1, 1, 1),
    f"{LAYERS}mlp/router/bias": (1, 1, 1),
    f"{LAYERS}attention_norm/scale": (1, 1, 1),
    f"{LAYERS}attention/q_norm/scale": (1, 1, 1),
    f"{LAYERS}attention/sinks/bias": (1, 1, 1),
    f"{LAYERS}residual/scale": (1, 1 / 8, 1 / 8),
    "token_embedding/embedding": (1, 1, 1),
    "position_embedding/embedding": (1, 1, 1),
    "value_embedding/embedding": (1, 1, 1),
    "head_embedding/embedding": (1, 1, 1),
    "final_norm/bias": (1, 1, 1),
}


def transferred(kind: str, width: int = 1, depth: int = 1, **fields: object) -> c.GPTConfig:
    """BASE, `width` times as wide and `depth` times as deep."""
    base = dataclasses.replace(BASE, **fields)
    if kind != "standard":
        base = dataclasses.replace(base, parametrization=kind, base_width=BASE.embed_dim)
    if kind == "completep":
        base = dataclasses.replace(base, base_depth=BASE.num_layers)
    return resized(base, width=width * BASE.embed_dim, layers=depth * BASE.num_layers)


def rms(tree: object) -> dict[str, float]:
    return {path: float(jnp.sqrt(jnp.mean(jnp.square(leaf)))) for path, leaf in peft.flatten(tree).items()}


def parameters(model: c.GPTConfig, seed: int = 0) -> dict:
    return nn.unbox(init_params(GPT(model), jax.random.key(seed)))


def update(model: c.GPTConfig, name: str, gradients: dict, params: dict, **settings: object) -> dict:
    """The first update of the parameters."""
    config = c.Config(model=model, optimizer=c.OptimizerConfig(name=name, clip_norm=None, **settings))
    optimizer = make_optimizer(config, model_axes(model))
    return optimizer.update(gradients, optimizer.init(params), params)[0]


def noise(params: dict) -> dict:
    """Gradients as random matrices of full rank; each leaf has its own."""
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: jax.random.normal(jax.random.key(len(str(path))), leaf.shape), params
    )


@pytest.mark.parametrize(
    "name", ["adamw", *(pytest.param(name, marks=pytest.mark.slow) for name in ("muon", "adafactor"))]
)
def test_initialisation_and_first_update_of_every_class(name):
    """At 4 times the width and 8 times the depth of the base model, with gradients of any size."""
    found = []
    for width, depth in ((1, 1), (WIDE, DEEP)):
        model = transferred("completep", width, depth, tied_head=False, kernel_init_std=0.5, scale_residual_init=False)
        params = parameters(model)
        found.append((rms(params), rms(update(model, name, noise(params), params, weight_decay=0.0))))
    (init, small), (wide_init, large) = found
    for path, (init_std, entrywise, orthogonal) in CLASSES.items():
        if init[path] > 0:
            assert wide_init[path] / init[path] == pytest.approx(init_std, rel=0.25), path
        is_matrix = name == "muon" and model_axes(model)[path].is_kernel
        expected = orthogonal if is_matrix else entrywise
        assert large[path] / small[path] == pytest.approx(expected, rel=0.3), path


@pytest.mark.slow
def test_spectral_norm_of_muons_updates_follows_the_shape():
    """Yang, Simon and Bernstein 2023, condition 1: sqrt(outputs / inputs), up to a factor that no size changes."""
    for path, growth in ((f"{LAYERS}mlp/experts/up/kernel", 1.0), (f"{LAYERS}mlp/router/kernel", WIDE**-0.5)):
        norms = []
        for width in (1, WIDE):
            model = transferred("mup", width)
            params = parameters(model)
            updates = peft.flatten(update(model, "muon", noise(params), params, weight_decay=0.0))[path]
            norms.append(float(jnp.linalg.norm(updates.reshape(-1, *updates.shape[-2:])[0], ord=2)))
        assert norms[1] / norms[0] == pytest.approx(growth, rel=0.15), path


@pytest.mark.slow
def test_epsilon_shrinks_with_the_gradient():
    """Gradients of the larger model are smaller by m_N m_L; an update divided by its epsilon has the same share."""
    found = []
    for width, depth in ((1, 1), (WIDE, DEEP)):
        model = transferred("completep", width, depth)
        params, axes = parameters(model), model_axes(model)
        gradients = {path: jnp.full(leaf.shape, 1e-8) for path, leaf in peft.flatten(params).items()}
        smaller = {path: leaf / gradient_factor(model, axes[path]) for path, leaf in gradients.items()}
        updates = peft.flatten(update(model, "adamw", peft.unflatten(smaller), params, weight_decay=0.0))
        # By the learning-rate factor: what is left is g / (g + eps) = 1 / 2.
        found.append({path: float(leaf.mean()) / lr_factor(model, axes[path]) for path, leaf in updates.items()})
        np.testing.assert_allclose(list(found[-1].values()), 0.5, rtol=1e-3)
    axes = model_axes(model)
    assert gradient_factor(model, axes[f"{LAYERS}attention/qkv/kernel"]) == WIDE * DEEP
    assert gradient_factor(model, axes["token_embedding/embedding"]) == WIDE
    assert gradient_factor(model, axes[f"{LAYERS}mlp/router/kernel"]) == DEEP
    assert gradient_factor(model, axes[f"{LAYERS}residual/scale"]) == 1


@pytest.mark.slow
def test_gradients_shrink_as_their_factor_says():
    """With zero-initialised branches the gradient of every class is exact at first: no noise of the layers above."""
    found = []
    for width in (1, 8):
        model = transferred("mup", width, num_experts=None, router_bias=False, residual_scalars=False)
        model = dataclasses.replace(model, attention_sinks=False, qk_norm=False, token_init_std=1.0, tied_head=False)
        config = c.Config(model=model, batch=c.BatchConfig(total_tokens=64, tokens_per_batch=64))
        objective, batch = registry.objective(config), one_batch(model, 8, 0)
        params = parameters(model)
        grads = jax.grad(lambda p, o=objective, b=batch: o.loss(p, b, None)[0] / 64)(params)
        found.append(rms(grads))
    for path in ("token_embedding/embedding", "head_embedding/embedding", "final_norm/scale"):
        factor = gradient_factor(model, model_axes(model)[path])
        assert factor == 8
        assert found[0][path] / found[1][path] == pytest.approx(factor, rel=0.4), path


@pytest.mark.slow
def test_weight_decay_of_a_step_does_not_depend_on_the_size():
    for name, width in itertools.product(("adamw", "muon"), (1, WIDE)):
        model = transferred("mup", width, num_experts=None, router_bias=False)
        params = parameters(model)
        gradients = noise(params)
        with_decay, without = (update(model, name, gradients, params, weight_decay=decay) for decay in (0.5, 0.0))
        kernel = f"{LAYERS}mlp/up/kernel"
        difference = peft.flatten(with_decay)[kernel] - peft.flatten(without)[kernel]
        np.testing.assert_allclose(difference, 0.5 * peft.flatten(params)[kernel], rtol=1e-2, atol=1e-6)


def program(model: c.GPTConfig, name: str) -> str:
    """The lowered gradient and update of a model."""
    config = c.Config(
        model=model,
        batch=c.BatchConfig(total_tokens=16, tokens_per_batch=16),
        optimizer=c.OptimizerConfig(name=name),
    )
    objective, batch = registry.objective(config), one_batch(model, 2, 0)
    optimizer = objective.parameters.optimizer()

    def step(params: dict, state: optax.OptState) -> object:
        grads = jax.grad(lambda p: objective.loss(p, batch, None)[0])(params)
        return optimizer.update(grads, state, params)

    params = jax.eval_shape(lambda: parameters(model))
    return jax.jit(step).lower(params, jax.eval_shape(optimizer.init, params)).as_text()


@pytest.mark.parametrize(
    ("name", "tied"),
    [("adamw", True), *(pytest.param(name, False, marks=pytest.mark.slow) for name in ("muon", "adafactor"))],
)
def test_models_of_the_base_size_are_the_standard_ones(name, tied):
    """The same parameters bit for bit, and the same program: updates and losses are the same too."""
    standard = transferred("standard", tied_head=tied)
    model = transferred("completep", tied_head=tied, base_head_width=8)
    assert program(model, name) == program(standard, name)
    for kind in ("mup", "completep"):
        jax.tree.map(np.testing.assert_array_equal, parameters(transferred(kind, tied_head=tied)), parameters(standard))


def test_label_heads_and_low_rank_matrices():
    """A label head reads hidden states that are not divided; A of LoRA has few outputs, B few inputs."""
    model = transferred("mup", WIDE, num_experts=None, router_bias=False)
    head = Head(model, 3, 0.0)
    boxed = init_with_head(GPT(model), head, jax.random.key(0))
    axes = tree_axes(boxed)["head/linear/kernel"]
    assert (init_factor(model, axes), lr_factor(model, axes), gradient_factor(model, axes)) == (1 / 4, 1 / 4, 1)
    hidden = jax.random.normal(jax.random.key(1), (5, model.embed_dim))
    kernel = boxed["head"]["linear"]["kernel"].value
    logits = head.apply({"params": nn.unbox(boxed["head"])}, hidden / WIDE, True)
    np.testing.assert_allclose(logits, hidden @ kernel, rtol=1e-4, atol=1e-5)
    low_rank = tree_axes(peft.low_rank(c.PeftConfig(method="lora"), boxed, jax.random.key(2)))
    factors = {path.rpartition("/")[2]: lr_factor(model, leaf) for path, leaf in low_rank.items()}
    assert factors == {"lora_a": 1 / 4, "lora_b": 1}


@pytest.mark.parametrize(
    ("fields", "culprit"),
    [
        ({"parametrization": "mup"}, "model.base_width"),
        ({"parametrization": "completep", "base_width": 16}, "model.base_depth"),
        ({"base_width": 16}, "has no effect"),
        ({"parametrization": "mup", "base_width": 16, "base_depth": 2}, "model.base_depth=2"),
        ({"parametrization": "completep", "base_width": 16, "base_depth": 2, "norm_position": "post"}, "pre-LN"),
        ({"parametrization": "mup", "base_width": 0}, "must be positive"),
    ],
)
def test_base_sizes_are_checked(fields, culprit):
    with pytest.raises(c.UserError) as error:
        check(c.Config(model=c.GPTConfig(**fields), batch=c.BatchConfig(total_tokens=524_288)))
    assert culprit in str(error.value)


def test_resized_keeps_heads_or_their_number():
    assert (transferred("mup", 4).num_heads, transferred("mup", 4).head_dim) == (8, 8)
    wider = resized(dataclasses.replace(BASE, parametrization="mup", base_width=16, base_head_width=8), width=64)
    assert (wider.num_heads, wider.head_dim) == (2, 32)
    with pytest.raises(c.UserError, match="no whole number"):
        resized(BASE, width=20)
