from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import pytest

from gptjax.config import GPTConfig, load_config
from gptjax.models.attention import GATE_CHANNELS
from gptjax.models.gpt import GPT, init_params, model_axes
from gptjax.models.peft import flatten
from gptjax.scaling import parameters
from tests.scaling.covering_models import COMBINATIONS, SMALL, gpt2

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("model", "published"),
    [
        (gpt2(12, 768, 12), 124_439_808),
        (gpt2(24, 1024, 16), 354_823_168),
        (gpt2(36, 1280, 20), 774_030_080),
        (gpt2(48, 1600, 25), 1_557_611_200),
    ],
)
def test_gpt2_sizes_are_exact(model: GPTConfig, published: int) -> None:
    assert parameters.parameter_count(model) == published


@pytest.mark.parametrize(
    ("num_layers", "embed_dim", "num_heads", "millions", "digits"),
    [
        (12, 768, 12, 125, 0),
        (24, 1024, 16, 356, 0),
        (24, 1536, 16, 760, 0),
        (24, 2048, 16, 1_320, -1),
        (32, 2560, 32, 2_650, -1),
        (32, 4096, 32, 6_660, -1),
        (40, 5120, 40, 12_850, -1),
        (96, 12288, 96, 174_600, -2),
    ],
)
def test_gpt3_sizes_round_to_table_2_1(
    num_layers: int, embed_dim: int, num_heads: int, millions: int, digits: int
) -> None:
    model = gpt2(num_layers, embed_dim, num_heads, context_length=2048)
    assert round(parameters.parameter_count(model) / 1e6, digits) == millions


def test_gpt1_has_117_million_parameters() -> None:
    model = GPTConfig(vocab_size=40_000 + 478, context_length=512, norm_position="post")
    assert parameters.parameter_count(model) == 116_534_784


@pytest.mark.parametrize(
    ("size", "total", "active"), [("20b", 20_914_757_184, 3_608_307_264), ("120b", 116_829_156_672, 5_132_849_472)]
)
def test_gpt_oss_sizes_are_exact(size: str, total: int, active: int) -> None:
    """Those of `GptOssForCausalLM` in transformers 5.24: active are all but the token table and unchosen experts."""
    model = load_config(f"{CONFIGS / 'gpt_oss.py'}:size={size}", {"data.tokenizer": "gpt2"}).model
    assert parameters.parameter_count(model) == total
    assert parameters.active_parameter_count(model) == active


@pytest.mark.parametrize("name", COMBINATIONS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    """By kind, from the roles of the axes in the model's tree: totals, kernels, tables, experts, and active ones."""
    model = COMBINATIONS[name]
    leaves = flatten(nn.unbox(jax.eval_shape(lambda: init_params(GPT(model), jax.random.key(0)))))
    axes = model_axes(model)
    assert parameters.parameter_count(model) == sum(leaf.size for leaf in leaves.values())

    def sizes(kind: str) -> int:
        return sum(part.size for part in parameters.parameters(model) if part.kind == kind)

    def of_model(*chosen: str) -> int:
        return sum(leaves[path].size for path in chosen)

    layers = [path for path in leaves if axes[path].is_stacked]
    head = "head_embedding/embedding" if not model.tied_head else "token_embedding/embedding"
    tables = [path for path in leaves if axes[path].is_embedding and path != head]
    assert sizes("kernel") == of_model(*(path for path in layers if axes[path].is_kernel))
    assert sizes("head") == of_model(head)
    assert sizes("table") == of_model(*tables)
    assert parameters.non_embedding_parameter_count(model) == of_model(*leaves) - of_model(head, *tables)
    experts = [path for path in leaves if "expert" in axes[path].roles]
    assert parameters.expert_parameter_count(model) == of_model(*experts)
    unchosen = 1 - model.experts_per_token / (model.num_experts or model.experts_per_token)
    active = of_model(*leaves) - of_model(*tables) - round(unchosen * of_model(*experts))
    assert parameters.active_parameter_count(model) == active


def test_gates_of_value_embeddings_read_as_many_channels_as_the_models() -> None:
    assert parameters.GATE_CHANNELS == GATE_CHANNELS


def test_an_expert_is_a_feed_forward_layer() -> None:
    """A mixture of one expert has the parameters of the dense layer and a router's, and all are active."""
    one = replace(SMALL, num_experts=1, experts_per_token=1)
    assert parameters.parameter_count(one) == parameters.parameter_count(SMALL) + SMALL.num_layers * SMALL.embed_dim
    assert parameters.active_parameter_count(one) == parameters.parameter_count(one) - 64 * 128  # but the positions
