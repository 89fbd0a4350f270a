"""gpt-oss: attention with sinks, alternately in windows, and a mixture of gated and clipped experts (OpenAI 2025)."""

from typing import Any

from gptjax.config import GPTConfig
from gptjax.interop.family import Family, Interleaved, Json, Key, Names
from gptjax.interop.llama_families import COMMON_NAMES, ROTARY_BLOCK
from gptjax.interop.rotary_keys import (
    ROTARY_FIELDS,
    read_layer_types,
    read_rotary,
    write_layer_types,
    write_rotary,
)

_NAMES: Names = {
    **COMMON_NAMES,
    "layers/attention/sinks/bias": ("layers.{i}.self_attn.sinks",),
    "layers/mlp/router/kernel": ("layers.{i}.mlp.router.weight",),
    "layers/mlp/router/bias": ("layers.{i}.mlp.router.bias",),
    # Stacked over experts and (inputs, outputs); columns of the gate and of the other projection alternate.
    "layers/mlp/experts/gate/kernel": (Interleaved("layers.{i}.mlp.experts.gate_up_proj", 0),),
    "layers/mlp/experts/gate/bias": (Interleaved("layers.{i}.mlp.experts.gate_up_proj_bias", 0),),
    "layers/mlp/experts/up/kernel": (Interleaved("layers.{i}.mlp.experts.gate_up_proj", 1),),
    "layers/mlp/experts/up/bias": (Interleaved("layers.{i}.mlp.experts.gate_up_proj_bias", 1),),
    "layers/mlp/experts/down/kernel": ("layers.{i}.mlp.experts.down_proj",),
    "layers/mlp/experts/down/bias": ("layers.{i}.mlp.experts.down_proj_bias",),
}

_KEYS = {
    "vocab_size": Key("vocab_size", 201088),
    "context_length": Key("max_position_embeddings", 131072),
    "num_layers": Key("num_hidden_layers", 36),
    "num_heads": Key("num_attention_heads", 64),
    "num_kv_heads": Key("num_key_value_heads", 8, nullable=True),
    "head_width": Key("head_dim", 64, nullable=True),
    "embed_dim": Key("hidden_size", 2880),
    "ffw_dim": Key("intermediate_size", 2880),
    "norm_eps": Key("rms_norm_eps", 1e-5),
    "activation": Key("hidden_act", "silu"),
    "tied_head": Key("tie_word_embeddings", False),
    "qkv_bias": Key("attention_bias", True),
    "attention_out_bias": Key("attention_bias", True),
    "num_experts": Key("num_local_experts", 128, "num_experts"),
    "experts_per_token": Key("num_experts_per_tok", 4),
    "swish_beta": Key("swiglu_alpha", 1.702),
    "gate_limit": Key("swiglu_limit", 7.0),
    "attention_dropout": Key("attention_dropout", 0.0),
}
_DEFAULT_ROTARY: Json = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(theirs: Json, fields: dict[str, Any]) -> dict[str, Any]:
    window = theirs.get("sliding_window", 128)
    pattern = read_layer_types(theirs, fields["num_layers"], lambda layer: layer % 2 == 0, window)
    return pattern | read_rotary(theirs, fields["context_length"], 150_000.0, _DEFAULT_ROTARY)


def _write(model: GPTConfig) -> Json:
    return {
        "layer_types": write_layer_types(model),
        "sliding_window": model.band_width,
        "experts_per_token": model.experts_per_token,  # as in the published files; transformers reads the other key
    } | write_rotary(model)


GPT_OSS = Family(
    "gpt_oss",
    "GptOssForCausalLM",
    _NAMES,
    _KEYS,
    {"silu": "silu"},
    {**ROTARY_BLOCK, "attention_sinks": True, "router_bias": True, "up_offset": 1.0},
    read=_read,
    write=_write,
    derived=ROTARY_FIELDS | {"attention_pattern", "band_width"},
    prefix="model.",
    transposed=True,
    quantisations=("mxfp4",),
)
