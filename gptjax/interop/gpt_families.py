"""GPT-1, GPT-2 and GPT-Neo: tables of their keys of config.json and of their tensors."""

from typing import Any

from gptjax.config import GPTConfig, UserError
from gptjax.interop.family import HEAD, Family, Json, Key, Names, shortest_period

_CONV1D_LAYER: Names = {
    "layers/attention_norm/scale": ("h.{i}.ln_1.weight",),
    "layers/attention_norm/bias": ("h.{i}.ln_1.bias",),
    "layers/attention/qkv/kernel": ("h.{i}.attn.c_attn.weight",),
    "layers/attention/qkv/bias": ("h.{i}.attn.c_attn.bias",),
    "layers/attention/out/kernel": ("h.{i}.attn.c_proj.weight",),
    "layers/attention/out/bias": ("h.{i}.attn.c_proj.bias",),
    "layers/mlp_norm/scale": ("h.{i}.ln_2.weight",),
    "layers/mlp_norm/bias": ("h.{i}.ln_2.bias",),
    "layers/mlp/up/kernel": ("h.{i}.mlp.c_fc.weight",),
    "layers/mlp/up/bias": ("h.{i}.mlp.c_fc.bias",),
    "layers/mlp/down/kernel": ("h.{i}.mlp.c_proj.weight",),
    "layers/mlp/down/bias": ("h.{i}.mlp.c_proj.bias",),
}
_OPENAI_GPT_NAMES: Names = {
    "token_embedding/embedding": ("tokens_embed.weight",),
    "position_embedding/embedding": ("positions_embed.weight",),
    "head_embedding/embedding": (HEAD,),
    **_CONV1D_LAYER,
}
_GPT2_NAMES: Names = {
    "token_embedding/embedding": ("wte.weight",),
    "position_embedding/embedding": ("wpe.weight",),
    "head_embedding/embedding": (HEAD,),
    **_CONV1D_LAYER,
    "final_norm/scale": ("ln_f.weight",),
    "final_norm/bias": ("ln_f.bias",),
}
_GPT_NEO_NAMES: Names = {
    **{path: names for path, names in _GPT2_NAMES.items() if "/attention/" not in path},
    "layers/attention/qkv/kernel": tuple(f"h.{{i}}.attn.attention.{role}_proj.weight" for role in "qkv"),
    "layers/attention/out/kernel": ("h.{i}.attn.attention.out_proj.weight",),
    "layers/attention/out/bias": ("h.{i}.attn.attention.out_proj.bias",),
}

_GPT2_KEYS = {
    "vocab_size": Key("vocab_size", 50257),
    "context_length": Key("n_positions", 1024, "max_position_embeddings"),
    "num_layers": Key("n_layer", 12, "num_hidden_layers"),
    "num_heads": Key("n_head", 12, "num_attention_heads"),
    "embed_dim": Key("n_embd", 768, "hidden_size"),
    "ffw_dim": Key("n_inner", None),
    "norm_eps": Key("layer_norm_epsilon", 1e-5),
    "activation": Key("activation_function", "gelu_new"),
    "scale_attention": Key("scale_attn_weights", True),
    "tied_head": Key("tie_word_embeddings", True),
    "embedding_dropout": Key("embd_pdrop", 0.1),
    "attention_dropout": Key("attn_pdrop", 0.1),
    "residual_dropout": Key("resid_pdrop", 0.1),
}
_OPENAI_GPT_KEYS = {
    **{field: key for field, key in _GPT2_KEYS.items() if field not in ("ffw_dim", "scale_attention")},
    "vocab_size": Key("vocab_size", 40478),
    "context_length": Key("n_positions", 512, "max_position_embeddings"),
    "activation": Key("afn", "gelu"),
}
_GPT_NEO_KEYS = {
    "vocab_size": Key("vocab_size", 50257),
    "context_length": Key("max_position_embeddings", 2048),
    "num_layers": Key("num_layers", 24, "num_hidden_layers"),
    "num_heads": Key("num_heads", 16, "num_attention_heads"),
    "embed_dim": Key("hidden_size", 2048),
    "ffw_dim": Key("intermediate_size", None),
    "norm_eps": Key("layer_norm_epsilon", 1e-5),
    "activation": Key("activation_function", "gelu_new"),
    "band_width": Key("window_size", 256),
    "tied_head": Key("tie_word_embeddings", True),
    "embedding_dropout": Key("embed_dropout", 0.0),
    "attention_dropout": Key("attention_dropout", 0.0),
    "residual_dropout": Key("resid_dropout", 0.0),
}

ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu": "gelu_exact",
    "relu": "relu",
    "relu2": "relu_squared",
    "silu": "silu",
    "swish": "silu",
}
_OPENAI_GPT_ACTIVATIONS = {"gelu": "gelu_tanh", "relu": "relu", "silu": "silu", "swish": "silu"}

_ATTENTION = {"global": "dense", "local": "banded"}  # GPT-Neo's names of the kinds of layers


def _read_pattern(theirs: Json, fields: dict[str, Any]) -> dict[str, Any]:
    """Converts GPT-Neo's attention_types, [[kinds], repetitions] pairs, or attention_layers to a repeated pattern."""
    layers, num_layers = theirs.get("attention_layers"), fields["num_layers"]
    try:
        if (types := theirs.get("attention_types")) is not None:
            expanded = [kind for kinds, repeats in types for _ in range(repeats) for kind in kinds]
            if layers not in (None, expanded):
                raise UserError("attention_layers and attention_types contradict each other")
            layers = expanded
        elif layers is None:
            layers = ["global", "local"] * 12  # transformers' default
        pattern = tuple(_ATTENTION[kind] for kind in layers)
    except (TypeError, ValueError, KeyError) as error:
        raise UserError(f"attention_types or attention_layers is not a list of global and local: {error!r}") from None
    if len(pattern) != num_layers:
        raise UserError(f"attention_types is for {len(pattern)} layers, but num_layers={num_layers}")
    return {"attention_pattern": shortest_period(pattern)}


def _write_pattern(model: GPTConfig) -> Json:
    kinds = {ours: name for name, ours in _ATTENTION.items()}
    pattern = [kinds[kind] for kind in model.attention_pattern]
    repeats = model.num_layers // len(pattern)
    return {"attention_types": [[pattern, repeats]], "attention_layers": pattern * repeats}


OPENAI_GPT = Family(
    "openai-gpt",
    "OpenAIGPTLMHeadModel",
    _OPENAI_GPT_NAMES,
    _OPENAI_GPT_KEYS,
    _OPENAI_GPT_ACTIVATIONS,
    {"norm_position": "post", "attention_pattern": ("dense",), "scale_attention": True, "qkv_bias": True},
)
GPT2 = Family(
    "gpt2",
    "GPT2LMHeadModel",
    _GPT2_NAMES,
    _GPT2_KEYS,
    ACTIVATIONS,
    {"norm_position": "pre", "attention_pattern": ("dense",), "qkv_bias": True},
)
GPT_NEO = Family(
    "gpt_neo",
    "GPTNeoForCausalLM",
    _GPT_NEO_NAMES,
    _GPT_NEO_KEYS,
    ACTIVATIONS,
    {"norm_position": "pre", "scale_attention": False, "qkv_bias": False},
    read=_read_pattern,
    write=_write_pattern,
    derived=frozenset({"attention_pattern"}),
    transposed=True,
)
