"""Llama, Mistral, Qwen2 and Qwen3: dense models with rotary positions, RMS norms and gated feed-forward layers."""

import json
from typing import Any

from gptjax.config import GPTConfig, UserError
from gptjax.interop.family import HEAD, Family, Json, Key, Names
from gptjax.interop.gpt_families import ACTIVATIONS
from gptjax.interop.rotary_keys import (
    ROTARY_FIELDS,
    read_layer_types,
    read_rotary,
    read_window,
    write_layer_types,
    write_rotary,
)

# All tensors but those of the feed-forward layers.
COMMON_NAMES: Names = {
    "token_embedding/embedding": ("embed_tokens.weight",),
    "head_embedding/embedding": (HEAD,),
    "final_norm/scale": ("norm.weight",),
    "layers/attention_norm/scale": ("layers.{i}.input_layernorm.weight",),
    "layers/mlp_norm/scale": ("layers.{i}.post_attention_layernorm.weight",),
    # Fused to one parameter: qkv, or with grouped queries kv.
    **{
        f"layers/attention/{layer}/{ours}": tuple(f"layers.{{i}}.self_attn.{role}_proj.{theirs}" for role in roles)
        for layer, roles in {"qkv": "qkv", "q": "q", "kv": "kv", "out": "o"}.items()
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}
_NAMES: Names = {
    **COMMON_NAMES,
    "layers/attention/q_norm/scale": ("layers.{i}.self_attn.q_norm.weight",),
    "layers/attention/k_norm/scale": ("layers.{i}.self_attn.k_norm.weight",),
    **{
        f"layers/mlp/{layer}/{ours}": (f"layers.{{i}}.mlp.{layer}_proj.{theirs}",)
        for layer in ("gate", "up", "down")
        for ours, theirs in (("kernel", "weight"), ("bias", "bias"))
    },
}

_LLAMA_KEYS = {
    "vocab_size": Key("vocab_size", 32000),
    "context_length": Key("max_position_embeddings", 2048),
    "num_layers": Key("num_hidden_layers", 32),
    "num_heads": Key("num_attention_heads", 32),
    "num_kv_heads": Key("num_key_value_heads", None),
    "head_width": Key("head_dim", None),
    "embed_dim": Key("hidden_size", 4096),
    "ffw_dim": Key("intermediate_size", 11008),
    "norm_eps": Key("rms_norm_eps", 1e-6),
    "activation": Key("hidden_act", "silu"),
    "tied_head": Key("tie_word_embeddings", False),
    "qkv_bias": Key("attention_bias", False),
    "attention_out_bias": Key("attention_bias", False),
    "ffw_bias": Key("mlp_bias", False),
    "attention_dropout": Key("attention_dropout", 0.0),
}
_MISTRAL_KEYS = {
    **{field: key for field, key in _LLAMA_KEYS.items() if not field.endswith("_bias")},
    "context_length": Key("max_position_embeddings", 131072),
    "num_kv_heads": Key("num_key_value_heads", 8, nullable=True),
    "ffw_dim": Key("intermediate_size", 14336),
}
_QWEN2_KEYS = {
    **{field: key for field, key in _LLAMA_KEYS.items() if not field.endswith("_bias")},
    "vocab_size": Key("vocab_size", 151936),
    "context_length": Key("max_position_embeddings", 32768),
    "num_kv_heads": Key("num_key_value_heads", 32, nullable=True),
    "ffw_dim": Key("intermediate_size", 22016),
}
_QWEN3_KEYS = {
    **_QWEN2_KEYS,
    "head_width": Key("head_dim", 128),
    "qkv_bias": Key("attention_bias", False),
    "attention_out_bias": Key("attention_bias", False),
}

# What the layers of all four have in common, with gpt-oss too.
ROTARY_BLOCK = {"positions": "rotary", "norm": "rms", "norm_position": "pre", "gated": True}

# --- keys that depend on each other -----------------------------------------------------------------------------------


def _read_llama(theirs: Json, fields: dict[str, Any]) -> dict[str, Any]:
    return _uniform(theirs, "full_attention") | read_rotary(theirs, fields["context_length"], 10_000.0)


def _read_mistral(theirs: Json, fields: dict[str, Any]) -> dict[str, Any]:
    window = theirs.get("sliding_window", 4096)
    rotary = read_rotary(theirs, fields["context_length"], 10_000.0)
    if window is None:
        return _uniform(theirs, "full_attention") | rotary
    return _uniform(theirs, "sliding_attention") | read_window(window) | rotary


def _uniform(theirs: Json, kind: str) -> dict[str, Any]:
    """The attention pattern of layers that are all of one kind; layer_types, which has no effect, must agree."""
    kinds = theirs.get("layer_types")
    if kinds is not None and (not isinstance(kinds, list) or any(other != kind for other in kinds)):
        raise UserError(f"layer_types has other kinds than {kind}, which all layers of this model_type have")
    return {"attention_pattern": ("banded",) if kind == "sliding_attention" else ("dense",)}


def _read_qwen(theirs: Json, fields: dict[str, Any]) -> dict[str, Any]:
    has_windows, first = theirs.get("use_sliding_window", False), theirs.get("max_window_layers", 28)
    for name, value, kind in (("use_sliding_window", has_windows, bool), ("max_window_layers", first, int)):
        if type(value) is not kind:
            raise UserError(f"{name}={json.dumps(value)} is not of type {kind.__name__}")
    window = theirs.get("sliding_window", 4096) if has_windows else None
    pattern = read_layer_types(
        theirs,
        fields["num_layers"],
        lambda layer: window is not None and layer >= first,
        1 if window is None else window,
    )
    if window is None and "banded" in pattern["attention_pattern"]:
        raise UserError("layer_types has sliding_attention, but use_sliding_window is false or sliding_window null")
    return pattern | read_rotary(theirs, fields["context_length"], 10_000.0)


def _write_mistral(model: GPTConfig) -> Json:
    return {"sliding_window": model.band_width} | write_rotary(model)


def _write_qwen(model: GPTConfig) -> Json:
    has_windows = "banded" in model.attention_pattern
    layer_types = write_layer_types(model)
    return {
        "use_sliding_window": has_windows,
        "sliding_window": model.band_width if has_windows else None,
        # Read by transformers 4, which has no other pattern.
        "max_window_layers": layer_types.index("sliding_attention") if has_windows else model.num_layers,
        "layer_types": layer_types,
    } | write_rotary(model)


# --- families ---------------------------------------------------------------------------------------------------------

_NO_BIAS = {"qkv_bias": False, "attention_out_bias": False, "ffw_bias": False}

LLAMA = Family(
    "llama",
    "LlamaForCausalLM",
    _NAMES,
    _LLAMA_KEYS,
    ACTIVATIONS,
    {**ROTARY_BLOCK, "attention_pattern": ("dense",)},
    read=_read_llama,
    write=write_rotary,
    derived=ROTARY_FIELDS,
    prefix="model.",
    transposed=True,
)
MISTRAL = Family(
    "mistral",
    "MistralForCausalLM",
    _NAMES,
    _MISTRAL_KEYS,
    ACTIVATIONS,
    {**ROTARY_BLOCK, **_NO_BIAS, "attention_pattern": ("banded",)},  # without a window it is exported as a llama
    read=_read_mistral,
    write=_write_mistral,
    derived=ROTARY_FIELDS | {"band_width"},
    prefix="model.",
    transposed=True,
)
QWEN2 = Family(
    "qwen2",
    "Qwen2ForCausalLM",
    _NAMES,
    _QWEN2_KEYS,
    ACTIVATIONS,
    {**ROTARY_BLOCK, **_NO_BIAS, "qkv_bias": True},
    read=_read_qwen,
    write=_write_qwen,
    derived=ROTARY_FIELDS | {"attention_pattern", "band_width"},
    prefix="model.",
    transposed=True,
)
QWEN3 = Family(
    "qwen3",
    "Qwen3ForCausalLM",
    _NAMES,
    _QWEN3_KEYS,
    ACTIVATIONS,
    {**ROTARY_BLOCK, "ffw_bias": False, "qk_norm": True},
    read=_read_qwen,
    write=_write_qwen,
    derived=ROTARY_FIELDS | {"attention_pattern", "band_width"},
    prefix="model.",
    transposed=True,
)
