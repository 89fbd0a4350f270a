"""Small models that cover the fields of `GPTConfig`, for tests of formulas."""

from dataclasses import replace

from gptjax.config import GPTConfig

SMALL = GPTConfig(vocab_size=512, context_length=64, num_layers=4, num_heads=4, embed_dim=128, dtype="float32")
MIXTURE = replace(SMALL, num_experts=8, experts_per_token=2, ffw_dim=96, gated=True)
# gpt-oss and nanochat at once, and an adapter.
EVERYTHING = replace(
    MIXTURE,
    positions="rotary",
    norm="rms",
    qk_norm=True,
    num_kv_heads=2,
    head_width=48,
    attention_sinks=True,
    attention_pattern=("banded", "dense"),
    band_width=16,
    value_embeddings="alternate",
    router_bias=True,
    balance_bias=True,
    tied_head=False,
    residual_scalars=True,
    adapter_dim=8,
)
COMBINATIONS = {
    "plain": SMALL,
    "post-norm": replace(SMALL, norm_position="post"),
    "banded": replace(SMALL, ffw_dim=320, attention_pattern=("dense", "banded"), band_width=8),
    "rotary": replace(SMALL, positions="rotary"),
    "rms": replace(SMALL, norm="rms"),
    "no gains": replace(SMALL, norm_gain=False, qk_norm=True, qk_norm_gain=False),
    "qk norm": replace(SMALL, qk_norm=True),
    "grouped": replace(SMALL, num_kv_heads=2),
    "one kv head": replace(SMALL, num_kv_heads=1, qkv_bias=False),
    "wide heads": replace(SMALL, head_width=48),
    "sinks": replace(SMALL, attention_sinks=True),
    "no biases": replace(SMALL, qkv_bias=False, attention_out_bias=False, ffw_bias=False),
    "gated": replace(SMALL, gated=True, activation="silu"),
    "adapters": replace(SMALL, adapter_dim=8),
    "mixture": MIXTURE,
    "mixture with biases": replace(MIXTURE, gated=False, router_bias=True, balance_bias=True),
    "mixture without biases": replace(MIXTURE, ffw_bias=False),
    "value embeddings": replace(SMALL, value_embeddings="all", num_kv_heads=2),
    "alternate value embeddings": replace(
        SMALL, value_embeddings="alternate", attention_pattern=("dense", "banded"), norm_embedding=True
    ),
    "untied": replace(SMALL, tied_head=False, logit_soft_cap=15.0),
    "residual scalars": replace(SMALL, residual_scalars=True),
    "everything": EVERYTHING,
}


def gpt2(num_layers: int, embed_dim: int, num_heads: int, context_length: int = 1024) -> GPTConfig:
    return GPTConfig(50257, context_length, num_layers, embed_dim, num_heads=num_heads)
