"""Writes tests/fixtures/huggingface/: tiny models that transformers saved, and the logits it computes with them.

    python -m tests.interop.write_fixtures

Needs `pip install torch transformers`; the tests that read them do not.
"""

from pathlib import Path
from typing import Any

import numpy as np

FIXTURES = Path(__file__).parents[1] / "fixtures" / "huggingface"

# Name: model type, and the fields of its config in which it is not transformers' default. Odd sizes on purpose.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "openai_gpt": ("openai-gpt", {"vocab_size": 263, "n_positions": 13, "n_embd": 12, "n_layer": 3, "n_head": 3}),
    "openai_gpt_relu": (
        "openai-gpt",
        {"vocab_size": 61, "n_positions": 7, "n_embd": 20, "n_layer": 1, "n_head": 2, "afn": "relu"},
    ),
    "gpt2": ("gpt2", {"vocab_size": 263, "n_positions": 13, "n_embd": 12, "n_layer": 3, "n_head": 3}),
    "gpt2_variant": (
        "gpt2",
        {
            "vocab_size": 61,
            "n_positions": 7,
            "n_embd": 20,
            "n_layer": 2,
            "n_head": 5,
            "n_inner": 28,
            "activation_function": "gelu",
            "scale_attn_weights": False,
            "layer_norm_epsilon": 1e-3,
        },
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": 263,
            "max_position_embeddings": 13,
            "hidden_size": 12,
            "num_layers": 4,
            "num_heads": 3,
            "attention_types": [[["global", "local"], 2]],
            "window_size": 5,
        },
    ),
    "gpt_neo_aperiodic": (
        "gpt_neo",
        {
            "vocab_size": 61,
            "max_position_embeddings": 11,
            "hidden_size": 20,
            "num_layers": 3,
            "num_heads": 5,
            "attention_types": [[["global"], 1], [["local"], 2]],
            "window_size": 3,
            "intermediate_size": 36,
        },
    ),
}


def make_model(model_type: str, fields: dict[str, Any]) -> Any:
    """transformers' model with every weight drawn at random, so that none can be mistaken for another."""
    import torch
    import transformers

    torch.manual_seed(0)
    no_tokens = {"bos_token_id": None, "eos_token_id": None}
    config = transformers.AutoConfig.for_model(model_type, **fields, **no_tokens)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = ".ln_" in name and name.endswith(".weight")
            parameter.copy_(torch.randn_like(parameter) * 0.3 + scale)
    return model


def logits(model: Any, tokens_BT: np.ndarray) -> np.ndarray:
    """float32 (B, T, V)."""
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens_BT, dtype=torch.int64)).logits.numpy()


def draw_tokens(vocab_size: int, context_length: int) -> np.ndarray:
    """Two rows as long as the context."""
    return np.random.default_rng(0).integers(0, vocab_size, (2, context_length))


def main() -> None:
    for name, (model_type, fields) in MODELS.items():
        model = make_model(model_type, fields)
        model.save_pretrained(FIXTURES / name)
        (FIXTURES / name / "generation_config.json").unlink(missing_ok=True)
        tokens_BT = draw_tokens(model.config.vocab_size, model.config.max_position_embeddings)
        np.savez_compressed(FIXTURES / name / "logits.npz", tokens_BT=tokens_BT, logits_BTV=logits(model, tokens_BT))


if __name__ == "__main__":
    main()
