"""LoRA in PEFT's files: content and refusals; where PEFT is installed, equal logits."""

import dataclasses
import json
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import GPTConfig, PeftConfig, UserError
from gptjax.interop import safetensors_files
from gptjax.interop.huggingface import load_pretrained, save_pretrained
from gptjax.interop.peft_files import load_lora, save_lora
from gptjax.interop.safetensors_files import DTYPES, Declared
from gptjax.models import peft
from gptjax.models.gpt import GPT
from tests.interop.write_fixtures import draw_tokens, make_model
from tests.interop.write_fixtures import logits as their_logits

GPT2 = GPTConfig(vocab_size=33, context_length=9, num_layers=2, num_heads=3, embed_dim=12, dtype="float32")
NEO = dataclasses.replace(
    GPT2, num_layers=4, attention_pattern=("dense", "banded"), band_width=4, scale_attention=False, qkv_bias=False
)
LORA = PeftConfig(method="lora", targets=("layers/.*/kernel",), rank=3, alpha=6.0, dropout=0.1)


def draw(config: PeftConfig, model: GPTConfig):
    """Random LoRA leaves, unboxed."""
    params = jax.eval_shape(lambda: GPT(model).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32)))["params"]
    shapes = nn.unbox(jax.eval_shape(lambda: peft.low_rank(config, params, jax.random.key(0))))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.normal(size=leaf.shape).astype(leaf.dtype) * leaf.dtype.type(0.3), shapes)


def read(directory: Path) -> dict[str, np.ndarray]:
    headers = safetensors_files.read_header(directory / "adapter_model.safetensors")
    return {name: safetensors_files.read(tensor) for name, tensor in headers.items()}


def write(directory: Path, tensors: dict[str, np.ndarray], **config: object) -> Path:
    """A directory of PEFT's."""
    directory.mkdir()
    (directory / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 3, "lora_alpha": 6} | config))
    names = {dtype: name for name, dtype in DTYPES.items()}
    declared = [Declared(name, names[array.dtype], array.shape) for name, array in tensors.items()]
    safetensors_files.write(directory, declared, tensors.values())
    (directory / "model.safetensors").rename(directory / "adapter_model.safetensors")
    return directory


def equal(actual, expected):
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


@pytest.mark.parametrize("model", [GPT2, NEO, dataclasses.replace(GPT2, norm_position="post")])
@pytest.mark.parametrize("targets", [LORA.targets, ("layers/block_0/.*/(qkv|down)/kernel",)])
def test_leaves_come_back(model, targets, tmp_path):
    config = dataclasses.replace(LORA, targets=targets)
    leaves = draw(config, model)
    save_lora(tmp_path / "lora", config, model, leaves)
    read_config, read_leaves = load_lora(tmp_path / "lora", model)
    equal(read_leaves, leaves)
    for field in ("method", "rank", "alpha", "dropout"):
        assert getattr(read_config, field) == getattr(config, field)
    equal(jax.tree.map(np.shape, draw(read_config, model)), jax.tree.map(np.shape, leaves))


def test_the_files_of_gpt2(tmp_path):
    config = dataclasses.replace(LORA, targets=("layers/.*/attention/(qkv|out)/kernel",))
    leaves = draw(config, GPT2)
    save_lora(tmp_path / "lora", config, GPT2, leaves, base="runs/gpt2")
    assert sorted(path.name for path in (tmp_path / "lora").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    assert json.loads((tmp_path / "lora" / "adapter_config.json").read_text()) == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "runs/gpt2",
        "inference_mode": True,
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.1,
        "target_modules": ["attn.c_proj", "attn.c_attn"],
        "fan_in_fan_out": True,
        "bias": "none",
    }
    tensors = read(tmp_path / "lora")
    assert len(tensors) == 2 * 2 * 2
    place = leaves["layers"]["block_0"]["attention"]
    name = "base_model.model.transformer.h.1.attn"
    np.testing.assert_array_equal(tensors[f"{name}.c_attn.lora_A.weight"], place["qkv"]["lora_a"][1].T)
    np.testing.assert_array_equal(tensors[f"{name}.c_attn.lora_B.weight"], place["qkv"]["lora_b"][1].reshape(3, 36).T)
    np.testing.assert_array_equal(tensors[f"{name}.c_proj.lora_A.weight"], place["out"]["lora_a"][1].reshape(12, 3).T)
    np.testing.assert_array_equal(tensors[f"{name}.c_proj.lora_B.weight"], place["out"]["lora_b"][1].T)


def test_layers_are_numbered_through_the_pattern(tmp_path):
    """With a pattern of two, block 1 has layers 1 and 3: the file names them, since the others have none."""
    config = dataclasses.replace(LORA, targets=("layers/block_1/attention/qkv/kernel",))
    leaves = draw(config, NEO)
    save_lora(tmp_path / "lora", config, NEO, leaves)
    theirs = json.loads((tmp_path / "lora" / "adapter_config.json").read_text())
    attention = "transformer.h.{}.attn.attention.{}_proj"
    assert sorted(theirs["target_modules"]) == sorted(attention.format(i, role) for i in (1, 3) for role in "qkv")
    assert theirs["fan_in_fan_out"] is False
    tensors, place = read(tmp_path / "lora"), leaves["layers"]["block_1"]["attention"]["qkv"]
    for part, role in enumerate("qkv"):
        name = f"base_model.model.{attention.format(3, role)}"
        np.testing.assert_array_equal(tensors[f"{name}.lora_A.weight"], place["lora_a"][1].T)
        np.testing.assert_array_equal(tensors[f"{name}.lora_B.weight"], place["lora_b"][1][:, part].reshape(3, 12).T)


def test_ranks_and_alphas_of_single_modules(tmp_path):
    """Updates of a layer with another rank and alpha are scaled by these; smaller ranks are padded with zeros."""
    save_lora(tmp_path / "lora", LORA, GPT2, draw(LORA, GPT2))
    tensors = read(tmp_path / "lora")
    name = "base_model.model.transformer.h.1.mlp.c_fc.lora_{}.weight"
    a, b = (np.random.default_rng(0).normal(size=shape).astype(np.float32) for shape in ((5, 12), (48, 5)))
    tensors |= {name.format("A"): a, name.format("B"): b}
    patterns = {"rank_pattern": {"h.1.mlp.c_fc": 5}, "alpha_pattern": {"h.1.mlp.c_fc": 20}}
    config, leaves = load_lora(write(tmp_path / "other", tensors, **patterns), GPT2)
    assert (config.rank, config.alpha) == (5, LORA.alpha / LORA.rank * 5)
    up = leaves["layers"]["block_0"]["mlp"]["up"]
    update = config.alpha / config.rank * up["lora_a"] @ up["lora_b"]
    np.testing.assert_allclose(update[1], 20 / 5 * (b @ a).T, rtol=1e-5, atol=1e-5)
    assert not up["lora_a"][0, :, LORA.rank :].any()


@pytest.mark.parametrize("roles", ["qkv", "qv"])
def test_queries_keys_and_values_of_their_own(roles, tmp_path):
    """Three pairs of rank 3 are one of rank 9; where keys have none, queries and values are one of rank 6."""
    random = np.random.default_rng(0)
    tensors, deltas = {}, {}
    for layer in range(4):
        for part, role in enumerate("qkv"):
            if role in roles:
                a, b = (random.normal(size=shape).astype(np.float32) for shape in ((3, 12), (12, 3)))
                name = f"base_model.model.transformer.h.{layer}.attn.attention.{role}_proj"
                tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
                deltas[layer, part] = 2.0 * (b @ a).T
        a, b = random.normal(size=(3, 12)), random.normal(size=(48, 3))
        name = f"base_model.model.transformer.h.{layer}.mlp.c_fc"
        tensors |= {f"{name}.lora_A.weight": np.float32(a), f"{name}.lora_B.weight": np.float32(b)}
        deltas[layer] = 2.0 * np.float32(b @ a).T
    config, leaves = load_lora(write(tmp_path / "lora", tensors), NEO)
    rank = 3 * len(roles)
    assert (config.rank, config.alpha) == (rank, 2.0 * rank)
    zeros = {
        f"block_{i}": {
            "attention": {"qkv": {"kernel": jnp.zeros((2, 12, 3, 3, 4))}},
            "mlp": {"up": {"kernel": jnp.zeros((2, 12, 48))}},
        }
        for i in range(2)
    }
    merged = peft.merge(config, peft.join({"layers": zeros}, leaves))["layers"]
    for layer in range(4):
        block = merged[f"block_{layer % 2}"]
        np.testing.assert_allclose(block["mlp"]["up"]["kernel"][layer // 2], deltas[layer], atol=1e-4)
        for part in range(3):
            delta_DD = np.asarray(block["attention"]["qkv"]["kernel"][layer // 2, :, part]).reshape(12, 12)
            np.testing.assert_allclose(delta_DD, deltas.get((layer, part), np.zeros((12, 12))), atol=1e-4)


def test_half_precision_and_other_prefixes(tmp_path):
    model = dataclasses.replace(GPT2, param_dtype="bfloat16")
    leaves = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), draw(LORA, model))
    save_lora(tmp_path / "lora", LORA, model, leaves)
    tensors = read(tmp_path / "lora")
    assert {array.dtype for array in tensors.values()} == {jnp.dtype("bfloat16")}
    short = {name.replace("transformer.", ""): array for name, array in tensors.items()}
    config, read_leaves = load_lora(write(tmp_path / "short", short, use_rslora=True), model)
    equal(read_leaves, leaves)
    assert config.alpha / config.rank == pytest.approx(6 / np.sqrt(3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "ADALORA"}, 'peft_type="ADALORA" is not supported'),
        ({"use_dora": True}, "use_dora=true is not supported"),
        ({"rank_pattern": {"c_fc": 4}}, r"c_fc.lora_A.weight has shape \[3, 12\], but r=4"),
        ({"rank_pattern": {"(c_fc)+": 4}}, "rank_pattern=.* is not supported: plain names"),
        ({"alpha_pattern": {"c_fc": 0}}, "alpha_pattern=.* is not supported"),
        ({"target_parameters": "c_fc"}, "target_parameters=.* is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save=.* is not supported"),
        ({"of_tomorrow": 1}, "of_tomorrow=1 is not supported"),
        ({"bias": "all"}, 'bias="all" is not supported'),
        ({"init_lora_weights": "pissa"}, 'init_lora_weights="pissa" is not supported'),
        ({"r": 0}, "r=0, .* are out of range"),
        ({"r": True}, "r=True, .* are out of range"),
        ({"lora_alpha": None}, "lora_alpha=None .* are out of range"),
        ({"r": 4}, r"c_proj.lora_A.weight has shape \[3, 12\], but r=4 and the model require \[4, 12\]"),
    ],
)
def test_configs_that_are_not_plain_lora(changes, message, tmp_path):
    save_lora(tmp_path / "lora", LORA, GPT2, draw(LORA, GPT2))
    refused(write(tmp_path / "bad", read(tmp_path / "lora"), **changes), message)


def refused(directory: Path, message: str, model: GPTConfig = GPT2) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_lora(directory, model)
    assert "\n" not in str(caught.value)


def test_tensors_that_do_not_fit(tmp_path):
    save_lora(tmp_path / "lora", LORA, GPT2, draw(LORA, GPT2))
    tensors = read(tmp_path / "lora")
    name = "base_model.model.transformer.h.1.mlp.c_fc"
    a, b = f"{name}.lora_A.weight", f"{name}.lora_B.weight"

    def without(*names: str) -> dict[str, np.ndarray]:
        return {name: array for name, array in tensors.items() if name not in names}

    cases = {
        r"lacks the tensor h.1.mlp.c_fc.lora_B.weight \[48, 3\]": without(b),
        "has no LoRA for h.1.mlp.c_fc.weight, but for the same kernel of other layers": without(a, b),
        r"c_fc.lora_A.weight has shape \[12, 3\]": tensors | {a: tensors[a].T},
        "has the tensor .*lora_embedding_A, which is not LoRA on a kernel": tensors
        | {"base_model.model.transformer.wte.lora_embedding_A": tensors[a]},
        "h.2.mlp.c_fc.lora_A, but the model has no such kernel": tensors | {a.replace("h.1", "h.2"): tensors[a]},
        "c_fc.lora_A.weight has values that are not finite": tensors | {a: np.full_like(tensors[a], np.nan)},
        "c_fc twice, with and without": tensors | {a.replace("transformer.", ""): tensors[a]},
        "has no tensors": {},
    }
    for i, (message, changed) in enumerate(cases.items()):
        refused(write(tmp_path / str(i), changed), message)


def test_files_that_are_not_there(tmp_path):
    refused(tmp_path, "is not a PEFT directory: it has no adapter_config.json")
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    refused(tmp_path, "has no adapter_model.safetensors, and pickled weights are not read")
    (tmp_path / "adapter_model.bin").write_bytes(b"pickle")
    refused(tmp_path, "adapter_model.bin is not read, as a pickle can run any code")
    (tmp_path / "adapter_config.json").write_text("{")
    refused(tmp_path, "cannot read .*adapter_config.json")


def test_what_cannot_be_written(tmp_path):
    leaves = draw(LORA, GPT2)
    for model, wrong, message in (
        (GPT2, leaves | {"head": {"linear": {"bias": np.zeros(2)}}}, "head/linear/bias is not a LoRA matrix"),
        (GPT2, {}, "the empty tree is not a LoRA matrix"),
        (dataclasses.replace(GPT2, qkv_bias=False), leaves, "no Hugging Face family has"),
    ):
        with pytest.raises(UserError, match=message):
            save_lora(tmp_path / "lora", LORA, model, wrong)
    assert not any(tmp_path.iterdir())
    (tmp_path / "there").write_text("")
    with pytest.raises(UserError, match="exists already"):
        save_lora(tmp_path, LORA, GPT2, leaves)


# --- against PEFT itself ----------------------------------------------------------------------------------------------

# torch's, transformers' and PEFT's own
THEIR_WARNINGS = [pytest.mark.filterwarnings(f"ignore::{name}") for name in ("DeprecationWarning", "FutureWarning")]
SIZES = {"vocab_size": 33, "n_positions": 9, "n_embd": 12, "n_layer": 2, "n_head": 3}
NEO_SIZES = {"vocab_size": 33, "max_position_embeddings": 9, "hidden_size": 12, "num_layers": 4, "num_heads": 3}
MODELS = {
    "gpt2": SIZES,
    "openai-gpt": SIZES,
    "gpt_neo": NEO_SIZES | {"attention_types": [[["global", "local"], 2]], "window_size": 4},
}


def our_logits(model: GPT, config: PeftConfig, params, tokens_BT: np.ndarray) -> np.ndarray:
    def apply(params):
        with peft.applied(config, deterministic=True):
            return model.apply({"params": params}, tokens_BT)

    return np.asarray(jax.jit(apply)(params))


@pytest.fixture
def peft_library():
    pytest.importorskip("torch")
    return pytest.importorskip("peft")


@pytest.mark.parametrize("model_type", MODELS)
class TestAgainstPeft:
    pytestmark = THEIR_WARNINGS

    def test_our_lora_there(self, model_type, peft_library, tmp_path):
        import transformers

        make_model(model_type, MODELS[model_type]).save_pretrained(tmp_path / "theirs")
        model, params = load_pretrained(tmp_path / "theirs")
        leaves = draw(LORA, model.config)
        save_pretrained(model.config, params, tmp_path / "base")
        save_lora(tmp_path / "lora", LORA, model.config, leaves, base=str(tmp_path / "base"))
        base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base").eval()
        tokens_BT = draw_tokens(33, 9)
        expected_BTV = our_logits(model, LORA, peft.join(params, leaves), tokens_BT)
        assert np.abs(their_logits(base, tokens_BT) - expected_BTV).max() > 0.1
        adapted = peft_library.PeftModel.from_pretrained(base, tmp_path / "lora").eval()
        np.testing.assert_allclose(their_logits(adapted, tokens_BT), expected_BTV, atol=1e-4, rtol=0)
        # By the name of the base alone, and merged by them.
        found = peft_library.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "lora").merge_and_unload().eval()
        np.testing.assert_allclose(their_logits(found, tokens_BT), expected_BTV, atol=1e-4, rtol=0)

    @pytest.mark.parametrize("settings", [{}, {"use_rslora": True, "init_lora_weights": "gaussian"}])
    def test_their_lora_here(self, model_type, settings, peft_library, tmp_path):
        import torch

        theirs = make_model(model_type, MODELS[model_type])
        theirs.save_pretrained(tmp_path / "theirs")
        modules = ["q_proj", "v_proj", "c_fc"] if model_type == "gpt_neo" else ["c_attn", "c_proj", "c_fc"]
        config = peft_library.LoraConfig(
            r=2, lora_alpha=5, target_modules=modules, fan_in_fan_out=model_type != "gpt_neo", **settings
        )
        adapted = peft_library.get_peft_model(theirs, config)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.3)
        adapted.save_pretrained(tmp_path / "lora")
        model, params = load_pretrained(tmp_path / "theirs")
        read_config, leaves = load_lora(tmp_path / "lora", model.config)
        assert read_config.rank == (4 if model_type == "gpt_neo" else 2)
        tokens_BT = draw_tokens(33, 9)
        got_BTV = our_logits(model, read_config, peft.join(params, leaves), tokens_BT)
        np.testing.assert_allclose(got_BTV, their_logits(adapted.eval(), tokens_BT), atol=1e-4, rtol=0)
        assert np.abs(got_BTV - our_logits(model, read_config, params, tokens_BT)).max() > 0.1
