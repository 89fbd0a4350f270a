"""Parameter-efficient fine-tuning: the trained parameters, and low-rank matrices against their merged kernels."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig, PeftConfig, UserError
from gptjax.models import peft
from gptjax.models.gpt import GPT
from gptjax.models.heads import Head
from gptjax.parallel.mesh import LogicalAxes

TINY = GPTConfig(
    vocab_size=61,
    context_length=16,
    num_layers=4,
    num_heads=2,
    embed_dim=16,
    attention_pattern=("dense", "banded"),
    band_width=4,
    dtype="float32",
)
ALL = ("layers/.*/kernel",)
LORA = PeftConfig(method="lora", targets=ALL, rank=3, alpha=6.0)
ADALORA = PeftConfig(method="adalora", targets=ALL, rank=3, initial_rank=5, alpha=6.0)
TOKENS_BT = jax.random.randint(jax.random.key(1), (2, 16), 0, TINY.vocab_size)
PATTERN = len(TINY.attention_pattern)
low_rank = jax.jit(peft.low_rank, static_argnums=0)  # compiled whole: op by op, it takes longer


@partial(jax.jit, static_argnums=0)
def boxed(config: GPTConfig):
    """All parameters, with a head."""
    params = GPT(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    head = Head(config, 3, 0.1).init(jax.random.key(1), jnp.zeros((1, config.embed_dim)), True)["params"]
    return {**params, "head": head}


def shapes(params):
    return {path: nn.unbox(leaf).shape for path, leaf in peft.flatten(params).items()}


def with_random_leaves(config: PeftConfig, model: GPTConfig):
    """All parameters of a model, unboxed, with low-rank leaves of random values."""
    params = boxed(model)
    leaves = peft.flatten(nn.unbox(jax.eval_shape(lambda: peft.low_rank(config, params, jax.random.key(2)))))
    leaves = {
        path: jax.random.normal(jax.random.fold_in(jax.random.key(3), i), leaf.shape, leaf.dtype) * 0.25
        for i, (path, leaf) in enumerate(leaves.items())
    }
    return peft.join(nn.unbox(params), peft.unflatten(leaves))


def equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)  # logical axes too
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@partial(jax.jit, static_argnums=(0, 1), static_argnames="deterministic")
def logits(model: GPTConfig, config: PeftConfig, params, rng=None, deterministic=True):
    with peft.applied(config, deterministic):
        rngs = None if rng is None else {"dropout": rng}
        return GPT(model).apply({"params": params}, TOKENS_BT, deterministic=deterministic, rngs=rngs)


# --- low-rank matrices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "change"),
    [
        (LORA, {}),
        (ADALORA, {}),
        (LORA, {"remat": "dots", "layer_loop": "unroll"}),
        (ADALORA, {"remat": "full", "norm_position": "post", "qkv_bias": False}),
        (LORA, {"remat": "offload"}),
    ],
)
def test_applied_is_merged(config, change):
    model = dataclasses.replace(TINY, **change)
    plain = nn.unbox(boxed(model))
    params = with_random_leaves(config, model)
    assert shapes(peft.merge(config, params)) == shapes(plain)

    @partial(jax.jit, static_argnums=1)
    def loss_logits_gradients(params, fold):
        def loss(params):
            logits_BTV = logits(model, config, peft.merge(config, params) if fold else params)
            return jnp.sum(logits_BTV**2), logits_BTV

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, got_BTV), got = loss_logits_gradients(params, False)
    (_, expected_BTV), expected = loss_logits_gradients(params, True)
    np.testing.assert_allclose(got_BTV, expected_BTV, atol=1e-5, rtol=0)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-3), got, expected)
    assert np.abs(got_BTV - logits(model, config, plain)).max() > 0.01


@pytest.mark.parametrize("config", [LORA, ADALORA], ids=lambda config: config.method)
def test_nothing_changes_at_first(config):
    params = nn.unbox(boxed(TINY))
    config = dataclasses.replace(config, targets=("layers/block_1/.*/kernel",))
    with_leaves = peft.join(params, nn.unbox(low_rank(config, boxed(TINY), jax.random.key(2))))
    np.testing.assert_array_equal(logits(TINY, config, with_leaves), logits(TINY, config, params))
    equal(peft.merge(config, with_leaves), params)
    equal(peft.merge(config, params), params)


def test_merging_changes_nothing_but_the_targets():
    config = dataclasses.replace(LORA, targets=("layers/block_1/mlp/up/kernel",))
    params = nn.unbox(boxed(TINY))
    before, after = peft.flatten(params), peft.flatten(peft.merge(config, with_random_leaves(config, TINY)))
    changed = {path for path in before if not np.array_equal(before[path], after[path])}
    assert before.keys() == after.keys()
    assert changed == {"layers/block_1/mlp/up/kernel"}


def test_the_product_counts_alpha_over_rank_times():
    config = dataclasses.replace(LORA, targets=("layers/block_0/mlp/up/kernel",), alpha=12.0)
    params = with_random_leaves(config, TINY)
    place = params["layers"]["block_0"]["mlp"]["up"]
    expected = place["kernel"][1] + 4.0 * place["lora_a"][1] @ place["lora_b"][1]
    merged = peft.merge(config, params)["layers"]["block_0"]["mlp"]["up"]["kernel"][1]
    np.testing.assert_allclose(merged, expected, atol=1e-6)


def test_adalora_in_its_svd_form():
    config = dataclasses.replace(ADALORA, targets=("layers/block_0/attention/out/kernel",))
    params = with_random_leaves(config, TINY)
    place = params["layers"]["block_0"]["attention"]["out"]
    p_DA, q_AF = np.asarray(place["lora_p"][1]).reshape(16, 5), np.asarray(place["lora_q"][1])
    delta_DF = 2.0 * p_DA @ np.diag(place["lora_lambda"][1]) @ q_AF
    merged = peft.merge(config, params)["layers"]["block_0"]["attention"]["out"]["kernel"][1]
    np.testing.assert_allclose(merged.reshape(16, 16) - place["kernel"][1].reshape(16, 16), delta_DF, atol=1e-6)


def test_initial_values():
    model = dataclasses.replace(TINY, embed_dim=128, num_heads=4)
    kernel, up = "layers/block_0/(attention|mlp)/.*/kernel", "layers/block_1/mlp/up/kernel"
    params = boxed(model)
    leaves = low_rank(dataclasses.replace(LORA, targets=(kernel, up)), params, jax.random.key(0))
    leaves = peft.flatten(nn.unbox(leaves))
    singular = low_rank(dataclasses.replace(ADALORA, targets=(kernel,)), params, jax.random.key(0))
    leaves |= peft.flatten(nn.unbox(singular))
    assert leaves["layers/block_0/attention/qkv/lora_a"].shape == (2, 128, 3)
    assert leaves["layers/block_0/attention/qkv/lora_b"].shape == (2, 3, 3, 4, 32)
    assert leaves["layers/block_0/attention/out/lora_a"].shape == (2, 4, 32, 3)
    assert leaves["layers/block_0/attention/out/lora_b"].shape == (2, 3, 128)
    assert leaves["layers/block_0/mlp/down/lora_p"].shape == (2, 512, 5)
    assert leaves["layers/block_0/mlp/down/lora_lambda"].shape == (2, 5)
    for path, leaf in leaves.items():
        sizes = {"lora_a": 3 * leaf[0, ..., 0].size, "lora_p": leaf[0, ..., 0].size, "lora_q": leaf[0, 0].size}
        std = sizes[path.split("/")[-1]] ** -0.5 if path.split("/")[-1] in sizes else 0
        assert np.std(leaf) == pytest.approx(std, rel=0.1), path
    assert not np.array_equal(*leaves["layers/block_0/mlp/up/lora_a"])  # layers differ
    assert not np.array_equal(leaves["layers/block_0/mlp/up/lora_a"], leaves["layers/block_1/mlp/up/lora_a"])
    fewer = dataclasses.replace(LORA, targets=("layers/block_0/mlp/up/kernel",))
    alone = peft.flatten(low_rank(fewer, params, jax.random.key(0)))
    np.testing.assert_array_equal(
        nn.unbox(alone["layers/block_0/mlp/up/lora_a"]), leaves["layers/block_0/mlp/up/lora_a"]
    )


def test_low_rank_leaves_are_spread_as_their_kernels():
    added = peft.flatten(jax.eval_shape(lambda: peft.low_rank(ADALORA, boxed(TINY), jax.random.key(0))))
    names = {path: leaf.names for path, leaf in added.items()}
    assert names["layers/block_0/attention/qkv/lora_p"] == ("layers", "embed", "rank")
    assert names["layers/block_0/attention/qkv/lora_lambda"] == ("layers", "rank")
    assert names["layers/block_0/attention/qkv/lora_q"] == ("layers", "rank", "qkv", "heads", "head_dim")
    assert names["layers/block_1/attention/out/lora_p"] == ("layers", "heads", "head_dim", "rank")
    assert names["layers/block_1/mlp/down/lora_q"] == ("layers", "rank", "embed")
    assert all(isinstance(leaf.value, jax.ShapeDtypeStruct) for leaf in added.values())


def test_dropout_is_of_what_the_matrices_read():
    config = dataclasses.replace(LORA, dropout=0.5)
    params = with_random_leaves(config, TINY)
    keys = jax.random.split(jax.random.key(7), 2)
    first, again, other = (
        logits(TINY, config, params, rng, deterministic=False) for rng in (keys[0], keys[0], keys[1])
    )
    np.testing.assert_array_equal(first, again)
    assert np.abs(first - other).max() > 1e-3
    np.testing.assert_array_equal(logits(TINY, config, params), logits(TINY, LORA, params))
    np.testing.assert_array_equal(logits(TINY, LORA, params, keys[0], deterministic=False), logits(TINY, LORA, params))
    # The weights themselves read everything: without low-rank leaves nothing is left out.
    plain = nn.unbox(boxed(TINY))
    np.testing.assert_array_equal(logits(TINY, config, plain, keys[0], deterministic=False), logits(TINY, LORA, plain))


def test_dropout_keeps_the_mean():
    config = dataclasses.replace(LORA, dropout=0.4)
    dense = nn.Dense(4, dtype="float32")
    a_DA, b_AF = np.ones((2000, 1), np.float32), np.ones((1, 4), np.float32)
    params = {"kernel": np.zeros((2000, 4)), "bias": np.zeros(4), "lora_a": a_DA, "lora_b": b_AF}
    with peft.applied(config, deterministic=False):
        y = dense.apply({"params": params}, np.ones((8, 2000)), rngs={"dropout": jax.random.key(0)})
    assert np.mean(y) == pytest.approx(2 * 2000, rel=0.02)
    assert len(np.unique(y)) > 4  # each row draws its own


def test_activations_keep_their_dtype():
    model = dataclasses.replace(TINY, dtype="bfloat16")
    params = with_random_leaves(LORA, model)
    with peft.applied(LORA, True):
        x_BTD = jax.eval_shape(lambda: GPT(model).apply({"params": params}, TOKENS_BT, method="hidden"))
    assert x_BTD.dtype == jnp.bfloat16
    np.testing.assert_allclose(logits(model, LORA, params), logits(TINY, LORA, params), atol=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"targets": ("layers/.*/qvk/kernel",)},
            "'layers/.*/qvk/kernel' matches no parameter: the kernels are .*mlp/up",
        ),
        ({"targets": ("layers/.*",)}, "matches layers/block_0/.*, which is not a kernel"),
        ({"targets": ("token_embedding/embedding",)}, "matches token_embedding/embedding, which is not a kernel"),
        ({"targets": ("layers/(",)}, "is not a regular expression"),
        ({"targets": ()}, "targets is empty"),
        ({"rank": 17}, "peft.rank=17 is above the rank of .*16 x"),
        ({"method": "adalora", "initial_rank": 40}, "peft.initial_rank=40 is above"),
    ],
)
def test_targets_that_cannot_be(change, message):
    with pytest.raises(UserError, match=message) as caught:
        peft.low_rank(dataclasses.replace(LORA, **change), boxed(TINY), jax.random.key(0))
    assert "\n" not in str(caught.value)


# --- what is trained --------------------------------------------------------------------------------------------------

METHODS = ("none", "lora", "adalora", "adapters", "head", "top_layers")


def start(method: str, **fields):
    """A config, the model's parameters, and the shapes of the weights that it starts from, of two tokens fewer."""
    config = PeftConfig(method=method, **({"targets": ALL, "rank": 3, "initial_rank": 5} | fields))
    model = dataclasses.replace(TINY, adapter_dim=4 if method == "adapters" else None)
    params = boxed(model)
    if method in ("lora", "adalora"):
        params = peft.join(params, low_rank(config, params, jax.random.key(5)))
    given = shapes({name: tree for name, tree in boxed(TINY).items() if name != "head"})
    return config, params, given | {"token_embedding/embedding": (59, 16)}


@pytest.mark.parametrize("method", METHODS)
def test_joining_undoes_splitting(method):
    config, params, given = start(method)
    base, trained = peft.split(config, params, given)
    equal(peft.join(base, trained), params)
    plain = nn.unbox(params)
    equal(peft.split(config, plain, given), (nn.unbox(base), nn.unbox(trained)))
    equal(jax.jit(lambda params: peft.join(*peft.split(config, params, given)))(plain), plain)
    abstract = jax.eval_shape(lambda: peft.join(*peft.split(config, params, given)))
    assert jax.tree.structure(abstract) == jax.tree.structure(params)
    assert peft.count(base) + peft.count(trained) == peft.count(params)


def trained_paths(method: str, **fields):
    config, params, given = start(method, **fields)
    return shapes(peft.split(config, params, given)[1])


def test_new_tokens_and_the_head_are_trained():
    head = {"head/linear/kernel": (16, 3), "head/linear/bias": (3,)}
    assert trained_paths("head") == head | {"token_embedding/embedding": (2, 16)}
    config, params, given = start("head")
    base, trained = peft.split(config, nn.unbox(params), given)
    embedding_VD = nn.unbox(params)["token_embedding"]["embedding"]
    np.testing.assert_array_equal(base["token_embedding"]["embedding"], embedding_VD[:59])
    np.testing.assert_array_equal(trained["token_embedding"]["embedding"], embedding_VD[59:])
    assert "head" not in base


@pytest.mark.parametrize("config", [LORA, ADALORA], ids=lambda config: config.method)
def test_low_rank_leaves_are_trained(config):
    added = {path for path in trained_paths(config.method) if path.startswith("layers/")}
    names = peft.LORA if config.method == "lora" else peft.ADALORA
    kernels = ("attention/qkv", "attention/out", "mlp/up", "mlp/down")
    assert added == {f"layers/block_{i}/{kernel}/{name}" for i in (0, 1) for kernel in kernels for name in names}
    assert len(trained_paths(config.method)) == len(added) + 3


def test_adapters_and_norms_are_trained():
    layers = {path.removeprefix("layers/block_0/") for path in trained_paths("adapters") if "block_0" in path}
    parts = {f"{place}_adapter/{way}" for place in ("attention", "mlp") for way in ("up", "down")}
    norms = {f"{norm}/{leaf}" for norm in ("attention_norm", "mlp_norm") for leaf in ("scale", "bias")}
    assert layers == norms | {f"{part}/{leaf}" for part in parts for leaf in ("kernel", "bias")}
    others = {path for path in trained_paths("adapters") if not path.startswith("layers/")}
    assert others == {"final_norm/scale", "final_norm/bias", "token_embedding/embedding"} | {
        "head/linear/kernel",
        "head/linear/bias",
    }


@pytest.mark.parametrize(("num_layers", "rows"), [(1, (0, 1)), (2, (1, 1)), (3, (1, 2)), (4, (2, 2))])
def test_the_last_layers_are_trained(num_layers, rows):
    """With a pattern of two, block 0 has layers 0 and 2, block 1 layers 1 and 3."""
    config, params, given = start("top_layers", num_layers=num_layers)
    base, trained = peft.split(config, nn.unbox(params), given)
    number = jnp.arange(4).reshape(2, 2)  # of the layer in each row of each block
    found = [
        len(trained["layers"][f"block_{i}"]["mlp"]["up"]["kernel"]) if f"block_{i}" in trained["layers"] else 0
        for i in range(PATTERN)
    ]
    assert tuple(found) == rows
    assert set(trained) == {"layers", "final_norm", "head", "token_embedding"}
    for i in range(PATTERN):
        kernel = nn.unbox(params)["layers"][f"block_{i}"]["attention"]["out"]["kernel"]
        chosen = [kernel[row] for row in range(2) if number[row, i] >= 4 - num_layers]
        if chosen:
            np.testing.assert_array_equal(trained["layers"][f"block_{i}"]["attention"]["out"]["kernel"], chosen)
        if len(chosen) < 2:
            assert len(base["layers"][f"block_{i}"]["attention"]["out"]["kernel"]) == 2 - len(chosen)


def test_gradients_are_those_of_the_trained_part():
    config, params, given = start("top_layers", num_layers=1)
    base, trained = peft.split(config, nn.unbox(params), given)

    def loss(params):
        return jnp.mean(logits(TINY, config, {k: v for k, v in params.items() if k != "head"}) ** 2)

    got = jax.jit(jax.grad(lambda trained: loss(peft.join(base, trained))))(trained)
    _, expected = peft.split(config, jax.jit(jax.grad(loss))(nn.unbox(params)), given)
    assert peft.count(got) == peft.count(trained) < peft.count(params) / 2
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-8), got, expected)


def test_neither_part_of_a_vocabulary_is_spread():
    """59 and 2 rows need not divide over a mesh over which 61 do."""
    config, params, given = start("head")
    base, trained = peft.split(config, params, given)
    for part in (base, trained):
        assert isinstance(part["token_embedding"]["embedding"], LogicalAxes)
        assert part["token_embedding"]["embedding"].names == ("vocab_part", "embed")
    assert peft.join(base, trained)["token_embedding"]["embedding"].names == ("vocab", "embed")


def test_weights_of_another_model_are_refused():
    config, params, given = start("head")
    for shape in ((59, 8), (62, 16)):
        with pytest.raises(UserError, match=r"init_from has token_embedding/embedding of shape .* model's \[61, 16\]"):
            peft.split(config, params, given | {"token_embedding/embedding": shape})
    config = dataclasses.replace(config, method="top_layers", num_layers=5)
    with pytest.raises(UserError, match=r"peft.num_layers=5 is more than the 4"):
        peft.split(config, params, given)


def test_matrices_are_counted_by_layers():
    config = dataclasses.replace(
        ADALORA, targets=("layers/.*/attention/(qkv|out)/kernel", "layers/block_1/mlp/up/kernel")
    )
    leaves = jax.eval_shape(lambda: peft.low_rank(config, boxed(TINY), jax.random.key(0)))
    assert peft.count_matrices(leaves) == peft.count_matrices(nn.unbox(leaves)) == 4 * 2 + 2
    assert peft.count_matrices(boxed(TINY)) == 0
