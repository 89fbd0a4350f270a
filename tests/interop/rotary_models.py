"""Small models of the families with rotary positions: config.json, and weights from a seed, without torch.

`python -m tests.interop.rotary_models` writes the fixtures, tests/fixtures/huggingface/NAME/{config.json,logits.npz}:
the logits that transformers computes with these weights. It needs `pip install torch transformers`.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.interop import safetensors_files
from gptjax.interop.safetensors_files import DTYPES, Declared
from tests.interop.write_fixtures import FIXTURES

Json = dict[str, Any]
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}


def model(model_type: str, width: int, layers: int, heads: int, kv_heads: int, head_dim: int, **keys: Any) -> Json:
    """A config.json; the widths of all parts differ."""
    return {
        "model_type": model_type,
        "vocab_size": 29,
        "max_position_embeddings": 48,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "intermediate_size": 21,
        **NO_TOKENS,
        **keys,
    }


def yarn(factor: float, original: int, **keys: Any) -> Json:
    return {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **keys}


def llama3(factor: float, original: int, **keys: Any) -> Json:
    """Of the 8 frequencies of 16 channels with theta=100, some are kept, some divided and some between."""
    scaling = {"low_freq_factor": 0.25, "high_freq_factor": 1.0, **keys}
    return {"rope_type": "llama3", "factor": factor, "original_max_position_embeddings": original, **scaling}


OSS = {"num_local_experts": 5, "num_experts_per_tok": 2}
WINDOWED = ["full_attention", "sliding_attention", "sliding_attention"]
# Heads times head_dim is not the width, windows are shorter than the context, YaRN's original context too. Keys are
# those of transformers 4 or of transformers 5.
MODELS: dict[str, Json] = {
    "gpt_oss": model(
        *("gpt_oss", 24, 4, 4, 2, 8),
        **OSS,
        sliding_window=5,
        rope_theta=150.0,
        rope_scaling=yarn(4.0, 12, truncate=False, beta_fast=3.0, beta_slow=0.5),
    ),
    "gpt_oss_variant": model(
        *("gpt_oss", 20, 3, 5, 5, 6),
        num_local_experts=3,
        num_experts_per_tok=3,
        layer_types=WINDOWED,
        sliding_window=1,
        swiglu_limit=0.7,
        swiglu_alpha=1.3,
        attention_bias=False,
        tie_word_embeddings=True,
        rms_norm_eps=1e-2,
        rope_parameters=yarn(8.0, 8, rope_theta=1000.0, attention_factor=1.7),
    ),
    "llama": model("llama", 24, 2, 6, 2, 10, attention_bias=True, mlp_bias=True, rope_theta=500.0),
    "llama_yarn": model(
        *("llama", 24, 3, 4, 4, 6),
        hidden_act="gelu",
        tie_word_embeddings=True,
        rope_parameters=yarn(6.0, 8, rope_theta=100.0, mscale=0.7, mscale_all_dim=1.4),
    ),
    "llama3": model("llama", 24, 2, 4, 2, 16, rope_parameters=llama3(8.0, 12, rope_theta=100.0)),
    "mistral": model("mistral", 20, 2, 5, 1, 6, sliding_window=7),
    "qwen2": model("qwen2", 24, 3, 4, 2, 10, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": model(
        *("qwen3", 20, 3, 6, 3, 8),
        attention_bias=True,
        use_sliding_window=True,
        sliding_window=9,
        layer_types=WINDOWED,
        rope_parameters=yarn(2.5, 16, rope_theta=10_000.0),
        tie_word_embeddings=True,
    ),
}


def shapes(config: Json) -> dict[str, tuple[int, ...]]:
    """The shapes of all tensors of a model, by name."""
    kind, width, ffw = config["model_type"], config["hidden_size"], config["intermediate_size"]
    queries, keys = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
    attention_bias = kind == "qwen2" or config.get("attention_bias", kind == "gpt_oss")
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], width),
        "model.norm.weight": (width,),
    }
    if not config.get("tie_word_embeddings", False):
        found["lm_head.weight"] = (config["vocab_size"], width)

    def linear(name: str, outputs: int, inputs: int, bias: bool) -> None:
        found[f"{name}.weight"] = (outputs, inputs)
        if bias:
            found[f"{name}.bias"] = (outputs,)

    for i in range(config["num_hidden_layers"]):
        attention, mlp = f"model.layers.{i}.self_attn", f"model.layers.{i}.mlp"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found[f"model.layers.{i}.{norm}.weight"] = (width,)
        linear(f"{attention}.q_proj", queries, width, attention_bias)
        linear(f"{attention}.k_proj", keys, width, attention_bias)
        linear(f"{attention}.v_proj", keys, width, attention_bias)
        linear(f"{attention}.o_proj", width, queries, attention_bias and kind != "qwen2")
        if kind == "qwen3":
            found[f"{attention}.q_norm.weight"] = found[f"{attention}.k_norm.weight"] = (config["head_dim"],)
        if kind == "gpt_oss":
            experts = config["num_local_experts"]
            found[f"{attention}.sinks"] = (config["num_attention_heads"],)
            linear(f"{mlp}.router", experts, width, True)
            found[f"{mlp}.experts.gate_up_proj"] = (experts, width, 2 * ffw)
            found[f"{mlp}.experts.gate_up_proj_bias"] = (experts, 2 * ffw)
            found[f"{mlp}.experts.down_proj"] = (experts, ffw, width)
            found[f"{mlp}.experts.down_proj_bias"] = (experts, width)
        else:
            for name, outputs, inputs in (("gate", ffw, width), ("up", ffw, width), ("down", width, ffw)):
                linear(f"{mlp}.{name}_proj", outputs, inputs, config.get("mlp_bias", False))
    return found


def tensors(config: Json) -> dict[str, np.ndarray]:
    """Weights from a seed, float32: none is 0, and experts are chosen with different frequencies."""
    rng = np.random.default_rng(0)
    std = {"embed_tokens.weight": 1.0, "sinks": 1.0, "router.bias": 0.6}

    def draw(name: str, shape: tuple[int, ...]) -> np.ndarray:
        scale = next((value for end, value in std.items() if name.endswith(end)), 0.25)
        return (rng.normal(0, scale, shape) + name.endswith("norm.weight")).astype(np.float32)

    return {name: draw(name, shape) for name, shape in shapes(config).items()}


def write(directory: Path, config: Json, arrays: dict[str, np.ndarray], **settings: int) -> Path:
    """A Hugging Face directory with these tensors."""
    names = {dtype: name for name, dtype in DTYPES.items()} | {np.dtype(np.uint8): "U8"}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    declared = [Declared(name, names[array.dtype], array.shape) for name, array in arrays.items()]
    safetensors_files.write(directory, declared, iter(arrays.values()), **settings)
    return directory


def text_tokens(config: Json) -> np.ndarray:
    """Two rows as long as the context."""
    shape = (2, config["max_position_embeddings"])
    return np.random.default_rng(1).integers(0, config["vocab_size"], shape)


def load_theirs(directory: Path) -> Any:
    """transformers' model in `directory`, float32, which must have all its tensors, and no others."""
    import transformers

    # Their grouped products need widths that are multiples of 4.
    settings = {"experts_implementation": "eager", "attn_implementation": "eager", "dtype": "float32"}
    model, info = transformers.AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True, **settings)
    assert not any(info.values()), info
    return model.eval()


def main() -> None:
    import tempfile

    from tests.interop.write_fixtures import logits

    for name, config in MODELS.items():
        directory = FIXTURES / name
        directory.mkdir(exist_ok=True)
        (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        with tempfile.TemporaryDirectory() as parent:
            source = write(Path(parent) / "model", config, tensors(config))
            theirs = load_theirs(source)
        tokens_BT = text_tokens(config)
        np.savez_compressed(
            directory / "logits.npz",
            tokens_BT=tokens_BT.astype(np.int8),
            logits_BTV=logits(theirs, tokens_BT),
        )


if __name__ == "__main__":
    main()
