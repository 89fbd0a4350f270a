"""gpt-oss, Llama, Mistral and Qwen without torch: logits of transformers, both directions, and what is refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as c
from gptjax.config import GPTConfig, PeftConfig, UserError
from gptjax.interop import families, safetensors_files, task_heads
from gptjax.interop.huggingface import export_workdir, import_workdir, load_pretrained, save_pretrained
from gptjax.interop.peft_files import load_lora, save_lora
from gptjax.models import peft
from gptjax.models.gpt import GPT, abstract_params
from gptjax.parallel.mesh import make_mesh
from tests.interop.rotary_models import MODELS, llama3, tensors, write, yarn
from tests.interop.write_fixtures import FIXTURES


@pytest.fixture(params=MODELS)
def name(request) -> str:
    return request.param


def contents(directory: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    headers = safetensors_files.read_headers(directory)
    return {name: (t.dtype, t.shape, safetensors_files.read(t).tobytes()) for name, t in headers.items()}


def read(directory: Path, config: dict[str, Any]) -> GPTConfig:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    return families.read_config(directory)[1]


def test_the_logits_are_those_of_transformers_and_the_bytes_go_back(name, tmp_path):
    config = MODELS[name]
    assert json.loads((FIXTURES / name / "config.json").read_text()) == config
    source = write(tmp_path / "source", config, tensors(config), max_file_bytes=9000)
    gpt, params = load_pretrained(source)
    expected = np.load(FIXTURES / name / "logits.npz")
    tokens_BT = expected["tokens_BT"].astype(np.int32)
    got_BTV = np.asarray(jax.jit(lambda p, t: gpt.apply({"params": p}, t))(params, tokens_BT))
    np.testing.assert_allclose(got_BTV, expected["logits_BTV"], atol=1e-4, rtol=0)
    save_pretrained(gpt.config, params, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)
    family, back = families.read_config(tmp_path / "out")
    assert (family.model_type, back) == (config["model_type"], gpt.config)
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    ignored = {"rope_theta", "rope_scaling", "rope_parameters", "max_window_layers"}  # have several equal forms
    for key, value in config.items():
        assert key in ignored or written.get(key) == value or value is None, key


def test_a_workdir_goes_there_and_back(tmp_path):
    config = MODELS["gpt_oss"] | {"vocab_size": 260}
    source = write(tmp_path / "source", config, {n: a.astype(jnp.bfloat16) for n, a in tensors(config).items()})
    import_workdir(str(source), tmp_path / "run", tokenizer="bytes", param_dtype="bfloat16")
    assert c.read_config(tmp_path / "run").model == dataclasses.replace(
        families.read_config(source)[1], param_dtype="bfloat16"
    )
    export_workdir(tmp_path / "run", tmp_path / "out")
    assert contents(tmp_path / "out") == contents(source)


# --- config.json ------------------------------------------------------------------------------------------------------


def test_the_published_gpt_oss(tmp_path):
    """The keys of openai/gpt-oss-20b that matter, in transformers 4's form."""
    published = {
        "model_type": "gpt_oss",
        "num_hidden_layers": 24,
        "num_local_experts": 32,
        "experts_per_token": 4,
        "initial_context_length": 4096,
        "layer_types": ["sliding_attention", "full_attention"] * 12,
        "rope_theta": 150000,
        "rope_scaling": yarn(32.0, 4096, beta_fast=32.0, beta_slow=1.0, truncate=False),
        "swiglu_limit": 7.0,
        "quantization_config": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    }
    got = read(tmp_path, published)
    assert got == GPTConfig(
        vocab_size=201088,
        context_length=131072,
        num_layers=24,
        embed_dim=2880,
        positions="rotary",
        rope_theta=150_000.0,
        yarn_factor=32.0,
        yarn_original_context=4096,
        yarn_truncate=False,
        norm="rms",
        num_heads=64,
        num_kv_heads=8,
        head_width=64,
        attention_sinks=True,
        attention_pattern=("banded", "dense"),
        band_width=128,
        ffw_dim=2880,
        activation="silu",
        gated=True,
        swish_beta=1.702,
        gate_limit=7.0,
        up_offset=1.0,
        num_experts=32,
        experts_per_token=4,
        router_bias=True,
        tied_head=False,
        dtype="float32",
    )
    # transformers' defaults are the larger model, with the same positions.
    assert read(tmp_path, {"model_type": "gpt_oss"}) == dataclasses.replace(got, num_layers=36, num_experts=128)
    assert families.family_of(got).model_type == "gpt_oss"


def test_both_forms_of_rotary_keys_are_the_same(tmp_path):
    base = MODELS["llama"] | {"rope_theta": 10_000.0}
    for scaling in (None, yarn(4.0, 16, beta_fast=9.0)):
        of_4 = base | {"rope_theta": 77, "rope_scaling": scaling}
        of_5 = base | {"rope_parameters": (scaling or {"rope_type": "default"}) | {"rope_theta": 77.0}}
        expected = read(tmp_path, of_4)
        assert (expected.rope_theta, expected.yarn_factor) == (77.0, None if scaling is None else 4.0)
        assert read(tmp_path, of_5) == read(tmp_path, of_5 | of_4) == expected
        assert read(tmp_path, of_4 | {"rope_scaling": scaling and {"type": "yarn", **scaling}}) == expected
    assert expected.yarn_truncate  # unless it is false
    with pytest.raises(UserError, match="rope_scaling and rope_parameters contradict each other"):
        read(tmp_path, of_5 | {"rope_scaling": yarn(5.0, 16)})


LLAMA, OSS, QWEN, MISTRAL = (MODELS[key] for key in ("llama", "gpt_oss", "qwen2", "mistral"))


@pytest.mark.parametrize(
    ("base", "changes", "match"),
    [
        *(
            (LLAMA, {form: {"rope_type": kind, "factor": 2.0}}, rf'{form}: rope_type="{kind}" is not supported: one of')
            for form in ("rope_scaling", "rope_parameters")
            for kind in ("dynamic", "linear", "longrope")
        ),
        (LLAMA, {"rope_scaling": {"type": "linear", "factor": 2.0}}, 'rope_type="linear" is not supported'),
        (LLAMA, {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "rope_parameters: full_attention="),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "default", "factor": 2.0}},
            "factor=2.0 is not supported with rope_t",
        ),
        (LLAMA, {"rope_scaling": yarn(4.0, 16, low_freq_factor=1.0)}, "rope_scaling: low_freq_factor=1.0 is not supp"),
        (LLAMA, {"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "rope_scaling has no low_freq_factor, which"),
        (LLAMA, {"rope_scaling": llama3(2.0, 16, truncate=True)}, "truncate=true is not supported with rope_type="),
        (LLAMA, {"rope_scaling": llama3(2.0, 16, low_freq_factor=4)}, "llama3_high_rotations=1.0 must be above"),
        (LLAMA, {"rope_scaling": yarn(4.0, 16.5)}, r"original_max_position_embeddings=16\.5 is not of type int"),
        (LLAMA, {"rope_scaling": yarn(4.0, 16, truncate="no")}, 'truncate="no" is not of type bool'),
        (LLAMA, {"rope_scaling": yarn(0.5, 16)}, "factor=0.5 is less than 1"),
        (LLAMA, {"rope_scaling": yarn("4", 16)}, 'rope_scaling: factor="4" is not a finite number'),
        (LLAMA, {"rope_scaling": "yarn"}, 'rope_scaling="yarn" is not an object'),
        (LLAMA, {"rope_theta": "big"}, 'rope_theta="big" is not a finite number'),
        (LLAMA, {"rope_theta": 1.0}, "rope_theta=1.0 is not above 1"),
        (LLAMA, {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not supported: only 1.0"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.25}}, "rope_parameters: partial_rotary_factor=0.25"),
        (LLAMA, {"hidden_act": "mish"}, "hidden_act='mish' is not supported: one of gelu_new"),
        (
            LLAMA,
            {"quantization_config": {"quant_method": "mxfp4"}},
            r"quantization_config=.* not supported: only null$",
        ),
        (LLAMA, {"is_causal": False}, "is_causal=false is not supported: only true"),
        (LLAMA, {"attention_dropout": None}, "attention_dropout=null is not of type float"),
        (LLAMA, {"num_key_value_heads": 4}, "num_kv_heads=4 does not divide"),
        (LLAMA, {"head_dim": 5}, "rotates pairs of channels"),
        (LLAMA, {"layer_types": ["sliding_attention"] * 2}, "layer_types has other kinds than full_attention"),
        (MISTRAL, {"layer_types": ["full_attention"] * 2}, "layer_types has other kinds than sliding_attention"),
        (MISTRAL, {"sliding_window": 0}, "sliding_window=0 is not a positive integer"),
        (OSS, {"hidden_act": "gelu"}, "hidden_act='gelu' is not supported: one of silu"),
        (OSS, {"quantization_config": {"quant_method": "gptq", "bits": 4}}, 'gptq.* only null or quant_method="mxfp4"'),
        (OSS, {"sliding_window": None}, "sliding_window=null is not a positive integer, but layers have a window"),
        (OSS, {"layer_types": ["full_attention"] * 3}, "layer_types is for 3 layers, but num_hidden_layers=4"),
        (OSS, {"layer_types": ["chunked_attention"] * 4}, "is not a list of full_attention, sliding_attention"),
        (OSS, {"num_experts_per_tok": 6}, "experts_per_token=6 is above model.num_experts=5"),
        (OSS, {"rope_scaling": None}, "rope_scaling=null is read as no scaling by transformers 4, but as the default"),
        (OSS, {"swiglu_limit": None}, "swiglu_limit=null is not of type float"),
        (QWEN, {"use_sliding_window": 1}, "use_sliding_window=1 is not of type bool"),
        (QWEN, {"use_sliding_window": False, "layer_types": ["sliding_attention"] * 3}, "use_sliding_window is false"),
        (QWEN, {"layer_types": None, "num_hidden_layers": 10**9}, "num_hidden_layers=1000000000 is more than"),
    ],
)
def test_configs_that_are_refused(base, changes, match, tmp_path):
    with pytest.raises(UserError, match=match) as caught:
        read(tmp_path, base | changes)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda t: t.pop("model.layers.1.self_attn.sinks"), r"lacks the tensor layers\.1\.self_attn\.sinks \[4\]"),
        (lambda t: t.pop("lm_head.weight"), r"lacks the tensor lm_head\.weight \[29, 24\]"),
        (lambda t: t.update({"model.extra": t["lm_head.weight"]}), r"has the tensor extra \[29, 24\], which has no"),
        (
            lambda t: t.update({"model.layers.0.mlp.experts.gate_up_proj": np.zeros((5, 42, 24), np.float32)}),
            r"gate_up_proj has shape \[5, 42, 24\], but config\.json requires \[5, 24, 42\]",
        ),
        (
            lambda t: t["model.layers.2.mlp.experts.gate_up_proj"].__setitem__((4, 0, 0), np.inf),
            r"layers\.2\.mlp\.experts\.gate_up_proj has values that are not finite",
        ),
    ],
)
def test_tensors_that_are_refused(edit, match, tmp_path):
    arrays = tensors(OSS)
    edit(arrays)
    with pytest.raises(UserError, match=match):
        load_pretrained(write(tmp_path / "source", OSS, arrays))


def test_frequencies_of_old_checkpoints_are_no_weights(tmp_path):
    buffers = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(5, np.float32)}
    load_pretrained(write(tmp_path / "source", LLAMA, tensors(LLAMA) | buffers))


# --- our models -------------------------------------------------------------------------------------------------------


def small(**fields: object) -> GPTConfig:
    sizes = {"vocab_size": 17, "context_length": 5, "num_layers": 2, "num_heads": 4, "embed_dim": 16}
    modern = {"positions": "rotary", "norm": "rms", "gated": True, "activation": "silu", "dtype": "float32"}
    return GPTConfig(**(sizes | modern | fields))


NO_BIAS = {"qkv_bias": False, "attention_out_bias": False, "ffw_bias": False}
EXPERTS = {"num_experts": 3, "router_bias": True, "attention_sinks": True, "up_offset": 1.0, "gate_limit": 7.0}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "model_type"),
    [
        ({}, "llama"),
        ({**NO_BIAS, "num_kv_heads": 2, "head_width": 6, "ffw_dim": 9, "tied_head": False}, "llama"),
        ({**NO_BIAS, "ffw_bias": True, "activation": "relu_squared"}, "llama"),
        ({**NO_BIAS, "attention_pattern": ("banded",), "band_width": 3}, "mistral"),
        ({**NO_BIAS, "qkv_bias": True, "attention_pattern": ("banded", "dense"), "band_width": 3}, "qwen2"),
        ({"ffw_bias": False, "qk_norm": True}, "qwen3"),
        ({**EXPERTS}, "gpt_oss"),
        ({**EXPERTS, "attention_pattern": ("banded", "dense"), "band_width": 3, "tied_head": False}, "gpt_oss"),
        ({"positions": "learned", "norm": "layer", "gated": False, "activation": "relu", "tied_head": False}, "gpt2"),
    ],
)
def test_our_models_are_of_the_family_that_can_express_them(fields, model_type, tmp_path):
    gpt = GPT(small(**fields))
    rng = np.random.default_rng(0)
    params = jax.tree.map(
        lambda leaf: rng.standard_normal(leaf.shape, np.float32),
        abstract_params(gpt, make_mesh(c.MeshConfig(), jax.devices()[:1])),
    )
    save_pretrained(gpt.config, params, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["model_type"] == model_type
    loaded, loaded_params = load_pretrained(tmp_path / "out")
    jax.tree.map(np.testing.assert_array_equal, loaded_params, params)
    tokens_BT = np.arange(5)[None]
    np.testing.assert_array_equal(
        loaded.apply({"params": loaded_params}, tokens_BT), gpt.apply({"params": params}, tokens_BT)
    )


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_out_bias": False}, "model.ffw_bias=True"),  # of a qwen2
        ({**NO_BIAS, "attention_out_bias": True}, "model.qkv_bias=False, model.attention_out_bias=True"),
        ({**NO_BIAS, "gated": False}, "model.gated=False"),
        ({**NO_BIAS, "norm": "layer"}, "model.norm='layer'"),
        ({**NO_BIAS, "norm_gain": False}, "model.norm_gain=False"),
        ({**NO_BIAS, "norm_embedding": True}, "model.norm_embedding=True"),
        ({"ffw_bias": False, "qk_norm": True, "qk_norm_scale": 1.2}, "model.qk_norm_scale=1.2"),
        ({**NO_BIAS, "attention_sinks": True}, "model.attention_sinks=True"),
        ({**NO_BIAS, "swish_beta": 1.702}, "model.swish_beta=1.702"),
        ({**NO_BIAS, "logit_soft_cap": 15.0}, "model.logit_soft_cap=15.0"),
        ({**NO_BIAS, "residual_scalars": True}, "model.residual_scalars=True"),
        ({**NO_BIAS, "value_embeddings": "all"}, "model.value_embeddings='all'"),
        ({**NO_BIAS, "scale_attention": False}, "model.scale_attention=False"),
        ({**EXPERTS, "router_weights": "sigmoid"}, "model.router_weights='sigmoid'"),
        ({**EXPERTS, "expert_capacity": 1.5}, "model.expert_capacity=1.5"),
        ({**EXPERTS, "balance_bias": True}, "model.balance_bias=True"),
        ({**EXPERTS, "gate_limit": None}, "model.gate_limit=None"),
        ({**EXPERTS, "ffw_bias": False}, "model.ffw_bias=False"),
        ({"positions": "learned", "gated": False}, "model.norm='rms'"),
        ({"positions": "learned", "norm": "layer", "num_kv_heads": 2}, "model.num_kv_heads=2, model.gated=True"),
    ],
)
def test_models_that_no_family_expresses(fields, words, tmp_path):
    with pytest.raises(UserError, match=f"no Hugging Face family has {words} with positions="):
        save_pretrained(small(**fields), {}, tmp_path / "out")
    assert not list(tmp_path.iterdir())


# --- adapters and heads -----------------------------------------------------------------------------------------------


def lora_of(config: GPTConfig, target: str) -> tuple[PeftConfig, Any]:
    settings = PeftConfig(method="lora", rank=2, alpha=4.0, targets=(target,))
    abstract = jax.eval_shape(lambda: GPT(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    leaves = jax.eval_shape(lambda: peft.low_rank(settings, abstract, jax.random.key(0)))
    rng = np.random.default_rng(0)
    return settings, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), nn.unbox(leaves))


@pytest.mark.parametrize(("name", "layer"), [("llama_yarn", ""), ("gpt_oss", "attention/")])
def test_lora_goes_there_and_back(name, layer, tmp_path):
    _, config = families.read_config(FIXTURES / name)
    settings, leaves = lora_of(config, f"layers/.*/{layer}.*/kernel")
    save_lora(tmp_path / "out", settings, config, leaves)
    stored = safetensors_files.read_header(tmp_path / "out" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.k_proj.lora_A.weight" in stored
    back, loaded = load_lora(tmp_path / "out", config)
    assert back.rank == 2
    jax.tree.map(np.testing.assert_array_equal, loaded, leaves)


def test_heads_of_tasks_are_refused(tmp_path):
    family, config = families.read_config(FIXTURES / "qwen3")
    task = c.TaskConfig(kind="classification")
    run = c.Config(stage="finetune", model=config, task=task)
    with pytest.raises(UserError, match="the head of a task over a qwen3 cannot be exported, only over gpt2, gpt_neo"):
        task_heads.check(tmp_path, family, run)
