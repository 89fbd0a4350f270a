"""Muon and Adafactor of stacked layers equal Optax's on each matrix; the storage of moments."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax import config as c
from gptjax.config import Config, OptimizerConfig, UserError, replace
from gptjax.models.axis_roles import tree_axes
from gptjax.models.heads import VALUE
from gptjax.optim.optimizers import make_optimizer
from gptjax.parallel.mesh import LogicalAxes

L, D, H, K, F = 3, 16, 2, 8, 24
KERNELS = {"attention/qkv": (D, 3, H, K), "attention/out": (H, K, D), "mlp/up": (D, F), "mlp/down": (F, D)}
PLAIN = OptimizerConfig(weight_decay=0.0, clip_norm=None, min_factored_dim=8)


def layers(scale: float) -> dict:
    """Stacked layers, other in each, as a model has them."""
    block: dict = {"attention": {}, "mlp": {}}
    for i, (path, shape) in enumerate(KERNELS.items()):
        part, name = path.split("/")
        kernel = scale * jax.random.normal(jax.random.key(i), (L, *shape))
        block[part][name] = {"kernel": kernel, "bias": kernel.reshape(L, -1)[:, :D]}
    return {"block_0": block}


INPUTS = {"attention/qkv": 1, "attention/out": 2, "mlp/up": 1, "mlp/down": 1}
NAMES = {  # logical axes, as the model declares them
    "attention/qkv": ("embed", "qkv", "heads", "head_dim"),
    "attention/out": ("heads", "head_dim", "embed"),
    "mlp/up": ("embed", "ffw"),
    "mlp/down": ("ffw", "embed"),
}


def optimizer_of(config: OptimizerConfig, params: dict) -> optax.GradientTransformation:
    """The optimizer of `params`, with the roles that their axes have in a model."""

    def box(path: tuple, leaf: jax.Array) -> LogicalAxes:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removeprefix(f"{VALUE}/")
        part = name.removeprefix("layers/block_0/").removesuffix("/kernel")
        if name.endswith("/kernel"):
            return LogicalAxes(leaf, ("layers", *NAMES[part]), inputs=INPUTS[part])
        return LogicalAxes(leaf, ("layers", "norm") if name.startswith("layers") else ("norm",) * leaf.ndim)

    return make_optimizer(Config(optimizer=config), tree_axes(jax.tree_util.tree_map_with_path(box, params)))


PARAMS = {
    "layers": layers(1.0),
    "token_embedding": {"embedding": jax.random.normal(jax.random.key(9), (40, D))},
    "final_norm": {"scale": jnp.ones((D,))},
}


def gradients(step: int) -> dict:
    return jax.tree.map(lambda p: jnp.sin(3 * p + step), PARAMS)


def updates(optimizer: optax.GradientTransformation, params: dict, gradients: list) -> dict:
    """The updates of the last step; the parameters stay as they are."""
    state = optimizer.init(params)
    for gradient in gradients:
        update, state = optimizer.update(gradient, state, params)
    return update


def matrices(tree: dict) -> dict[str, jax.Array]:
    """Each matrix of each layer by itself, two axes each."""
    block, found = tree["layers"]["block_0"], {}
    for layer in range(L):
        qkv_D3HK = block["attention"]["qkv"]["kernel"][layer]
        for i in range(3):
            found[f"{layer}/qkv/{i}"] = qkv_D3HK[:, i].reshape(D, H * K)
        found[f"{layer}/out"] = block["attention"]["out"]["kernel"][layer].reshape(H * K, D)
        for name in ("up", "down"):
            found[f"{layer}/{name}"] = block["mlp"][name]["kernel"][layer]
    return found


@pytest.mark.parametrize("inside", [(), (VALUE,)])
def test_muon_orthogonalises_each_matrix_of_each_layer_alone(inside):
    def within(tree: dict) -> dict:
        return dict.fromkeys(inside, tree) or tree

    optimizer = optimizer_of(dataclasses.replace(PLAIN, name="muon"), within(PARAMS))
    steps = [gradients(step) for step in range(3)]
    found = updates(optimizer, within(PARAMS), [within(step) for step in steps])
    found = found[VALUE] if inside else found
    reference = optax.contrib.muon(-1.0, beta=0.95, consistent_rms=0.2)
    expected = updates(reference, matrices(PARAMS), [matrices(step) for step in steps])
    for name, update in matrices(found).items():
        np.testing.assert_allclose(update, expected[name], rtol=1e-4, atol=1e-5, err_msg=name)
        assert float(jnp.sqrt(jnp.mean(update**2))) == pytest.approx(0.2, rel=0.25 + 0.5 * (max(update.shape) > D))
    # All else is Adam's.
    adam = updates(optax.scale_by_adam(0.9, 0.95, 1e-8), PARAMS, steps)
    for path, leaf in jax.tree_util.tree_leaves_with_path(found):
        if "kernel" not in jax.tree_util.keystr(path):
            of_adam = dict(jax.tree_util.tree_leaves_with_path(adam))[path]
            np.testing.assert_allclose(leaf, of_adam, rtol=1e-6, err_msg=str(path))


def test_polar_express_is_nearer_to_orthogonal():
    """The mean distance of singular values from 1, of matrices with some values near 0."""
    errors = {}
    for iteration in ("newton_schulz", "polar_express"):
        config = dataclasses.replace(PLAIN, name="muon", muon_iteration=iteration)
        found = matrices(updates(optimizer_of(config, PARAMS), PARAMS, [gradients(0)]))
        values = [jnp.linalg.svdvals(m / (0.2 * max(m.shape) ** 0.5)) for m in found.values()]
        errors[iteration] = float(jnp.mean(jnp.abs(jnp.concatenate(values) - 1)))
    assert errors["polar_express"] < 0.1 < errors["newton_schulz"]


def test_normuon_is_the_papers_update_of_each_matrix():
    """Li et al. 2025, algorithm 1, in NumPy on the updates of plain Muon; the norm of each matrix is kept."""
    config = dataclasses.replace(PLAIN, name="muon")
    normuon = optimizer_of(dataclasses.replace(config, muon_variance_decay=0.9), PARAMS)
    averages: dict[str, np.ndarray] = {}
    for step in range(1, 4):
        steps = [gradients(number) for number in range(step)]
        plain, found = (
            matrices(updates(optimizer, PARAMS, steps)) for optimizer in (optimizer_of(config, PARAMS), normuon)
        )
        for name, update in plain.items():
            square = np.mean(np.square(update), axis=0)  # of each output, over its inputs
            averages[name] = 0.9 * averages.get(name, 0.0) + 0.1 * square
            scaled = np.asarray(update) / np.sqrt(averages[name])
            expected = scaled * np.linalg.norm(update) / np.linalg.norm(scaled)
            np.testing.assert_allclose(found[name], expected, rtol=1e-4, atol=1e-6, err_msg=f"{name}, step {step}")


def test_cautious_decay_spares_what_grows():
    config = dataclasses.replace(PLAIN, weight_decay=0.5, cautious_decay=True)
    plain = dataclasses.replace(PLAIN, weight_decay=0.0)
    with_decay, without = (updates(optimizer_of(each, PARAMS), PARAMS, [gradients(0)]) for each in (config, plain))
    kernel, update, decayed = (
        tree["layers"]["block_0"]["mlp"]["up"]["kernel"] for tree in (PARAMS, without, with_decay)
    )
    shrinks = update * kernel > 0
    assert 0.2 < jnp.mean(shrinks) < 0.8
    np.testing.assert_allclose(decayed - update, jnp.where(shrinks, 0.5 * kernel, 0), atol=1e-6)


def test_adafactor_factors_each_layer_alone():
    """Kernels of attention over the model's width and a head's: what is kept of (D, H, K) is (D, H) and (H, K)."""
    config = dataclasses.replace(PLAIN, name="adafactor", beta1=0.0)
    steps = [gradients(step) for step in range(4)]
    found = updates(optimizer_of(config, PARAMS), PARAMS, steps)
    reference = optax.adafactor(1.0, min_dim_size_to_factor=8, multiply_by_parameter_scale=False)
    for layer in range(L):
        of_layer = [jax.tree.map(lambda leaf: leaf[layer], tree["layers"]) for tree in (found, PARAMS, *steps)]  # noqa: B023
        expected = updates(reference, of_layer[1], of_layer[2:])
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, -b, rtol=1e-5), of_layer[0], expected)
    expected = updates(reference, PARAMS["final_norm"], [step["final_norm"] for step in steps])
    np.testing.assert_allclose(found["final_norm"]["scale"], -expected["scale"], rtol=1e-5)


def test_adafactor_forgets_as_fast_as_beta2_says():
    """The decay grows as 1 - t^-0.8, and no further: from then on what came first fades."""
    config = dataclasses.replace(PLAIN, name="adafactor", beta1=0.0, beta2=0.5)
    params = {"scale": jnp.ones((4,))}
    steps = [{"scale": jnp.full((4,), value)} for value in (100.0, *[1.0] * 30)]
    last = updates(optimizer_of(config, params), params, steps)
    np.testing.assert_allclose(last["scale"], 1.0, rtol=1e-3)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_the_first_moment_alone_is_kept_in_bfloat16(name):
    halved = dataclasses.replace(PLAIN, name=name, first_moment_dtype="bfloat16")
    optimizer = optimizer_of(halved, PARAMS)
    state = optimizer.init(PARAMS)
    sizes = dict.fromkeys(("float32", "bfloat16", "int32"), 0)
    for leaf in jax.tree.leaves(state):
        sizes[str(leaf.dtype)] += leaf.size
    assert sizes["bfloat16"] == sum(leaf.size for leaf in jax.tree.leaves(PARAMS))
    update, new_state = optimizer.update(gradients(0), state, PARAMS)
    assert jax.tree.map(lambda leaf: leaf.dtype, new_state) == jax.tree.map(lambda leaf: leaf.dtype, state)
    exact = updates(optimizer_of(dataclasses.replace(PLAIN, name=name), PARAMS), PARAMS, [gradients(0)])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.1, atol=0.02), update, exact)


@pytest.mark.parametrize(
    ("changes", "culprit"),
    [
        ({"optimizer": {"name": "muon"}, "peft": {"method": "lora"}}, "optimizer.name=muon"),
        ({"optimizer": {"muon_momentum": 1.0}}, "optimizer.muon_momentum=1.0"),
        ({"optimizer": {"muon_variance_decay": 0.9}}, "optimizer.muon_variance_decay=0.9"),
        ({"optimizer": {"muon_iteration": "polar_express"}}, "optimizer.muon_iteration=polar_express"),
        ({"optimizer": {"name": "muon", "muon_variance_decay": 1.0}}, "optimizer.muon_variance_decay=1.0"),
        ({"optimizer": {"lr_rules": ((".*", 0.0),)}}, "optimizer.lr_rules"),
        ({"optimizer": {"min_factored_dim": 0}}, "optimizer.min_factored_dim=0"),
    ],
)
def test_mistakes_are_told(changes, culprit):
    config = replace(Config(init_from="."), {"batch": {"total_tokens": 524_288}, **changes})
    with pytest.raises(UserError) as error:
        c.check(config)
    assert culprit in str(error.value)
