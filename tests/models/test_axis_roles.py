"""The roles of the axes of a model's parameters, and the layers that their rows belong to."""

import jax
import jax.numpy as jnp
import pytest

from gptjax.config import GPTConfig
from gptjax.models.axis_roles import layer_numbers, tree_axes
from gptjax.models.gpt import model_axes
from gptjax.models.heads import Head

MODEL = GPTConfig(vocab_size=61, context_length=16, num_layers=2, num_heads=2, embed_dim=16, adapter_dim=4)
BLOCK = "layers/block_0/"
ROLES = {
    f"{BLOCK}attention/qkv/kernel": ("layer", "input", "part", "output", "output"),
    f"{BLOCK}attention/qkv/bias": ("layer", "part", "output", "output"),
    f"{BLOCK}attention/out/kernel": ("layer", "input", "input", "output"),
    f"{BLOCK}mlp/up/kernel": ("layer", "input", "output"),
    f"{BLOCK}mlp/down/kernel": ("layer", "input", "output"),
    f"{BLOCK}mlp_adapter/down/kernel": ("layer", "input", "output"),
    f"{BLOCK}mlp_norm/scale": ("layer", "output"),
    "token_embedding/embedding": ("vocabulary", "output"),
    "position_embedding/embedding": ("position", "output"),
    "final_norm/bias": ("output",),
}


@pytest.mark.parametrize("path", ROLES)
def test_roles(path):
    assert model_axes(MODEL)[path].roles == ROLES[path]


def test_every_weight_matrix_is_a_kernel_and_nothing_else_is():
    for path, axes in model_axes(MODEL).items():
        assert axes.is_kernel == path.endswith("/kernel"), path
        assert axes.is_stacked == path.startswith("layers/"), path
        assert axes.is_embedding == path.endswith("/embedding"), path
    head = jax.eval_shape(lambda: Head(MODEL, 3, 0.0).init(jax.random.key(0), jnp.zeros((1, 16)), True)["params"])
    assert tree_axes(head)["linear/kernel"].roles == ("input", "output")


def test_rows_of_stacked_parameters_are_layers():
    """Six layers, two kinds of attention in turn: block 1 has layers 1, 3 and 5."""
    assert list(layer_numbers("layers/block_1/mlp/up/kernel", rows=3, total_rows=3, period=2)) == [1, 3, 5]
    assert list(layer_numbers("value/layers/block_0/mlp/up/kernel", rows=2, total_rows=3, period=2)) == [2, 4]
    assert layer_numbers("token_embedding/embedding", rows=7, total_rows=3, period=2) is None
