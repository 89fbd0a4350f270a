"""GPT-2's sizes with the blocks and the optimizer that have replaced GPT-2's since (2019 to 2025).

python -m gptjax.main --config=configs/gpt_modern.py:size=124m --workdir=runs/gpt_modern
python -m gptjax.main --config=configs/gpt_modern.py:runlocal,without=rotary+muon --workdir=runs/ablation

Arguments: those of configs/gpt2.py (size, data, runlocal); without (ingredients to switch back to GPT-2's, joined by
"+": see INGREDIENTS); experts (a mixture of so many experts, each half as wide as the feed-forward layer, two for each
token, so that as many parameters compute a token as in the dense model; 0: none).
"""

import ml_collections

from gptjax import config as c

# As in configs/gpt2.py: layers, width and heads of Radford et al. 2019, table 2; learning rates are our choice.
SIZES = {
    "124m": ({"num_layers": 12, "embed_dim": 768, "num_heads": 12}, 6e-4),
    "355m": ({"num_layers": 24, "embed_dim": 1024, "num_heads": 16}, 3e-4),
    "774m": ({"num_layers": 36, "embed_dim": 1280, "num_heads": 20}, 2.5e-4),
    "1558m": ({"num_layers": 48, "embed_dim": 1600, "num_heads": 25}, 2e-4),
}

# Name -> the values of the modern model, and GPT-2's. None but `experts` costs a token more than 1 % of the FLOPs.
INGREDIENTS: dict[str, tuple[dict, dict]] = {
    # Su et al. 2021
    "rotary": ({"model": {"positions": "rotary"}}, {"model": {"positions": "learned"}}),
    # RMS norms without gain (Zhang and Sennrich 2019), after the embedding too, as in karpathy/nanochat
    "rms": (
        {"model": {"norm": "rms", "norm_gain": False, "norm_embedding": True}},
        {"model": {"norm": "layer", "norm_gain": True, "norm_embedding": False}},
    ),
    # Henry et al. 2020; nanochat's factor
    "qk_norm": (
        {"model": {"qk_norm": True, "qk_norm_gain": False, "qk_norm_scale": 1.2}},
        {"model": {"qk_norm": False, "qk_norm_gain": True, "qk_norm_scale": 1.0}},
    ),
    # So et al. 2021
    "relu_squared": ({"model": {"activation": "relu_squared"}}, {"model": {"activation": "gelu_tanh"}}),
    "no_biases": (
        {"model": {"qkv_bias": False, "attention_out_bias": False, "ffw_bias": False}},
        {"model": {"qkv_bias": True, "attention_out_bias": True, "ffw_bias": True}},
    ),
    "untied_head": (
        {"model": {"tied_head": False, "head_init_std": 0.001}},
        {"model": {"tied_head": True, "head_init_std": 0.02}},
    ),
    # Gemma 2, section 2; nanochat's cap
    "soft_cap": ({"model": {"logit_soft_cap": 15.0}}, {"model": {"logit_soft_cap": None}}),
    # Zhou et al. 2024, as in nanochat
    "value_embeddings": (
        {"model": {"value_embeddings": "alternate", "attention_pattern": ("dense", "dense")}},
        {"model": {"value_embeddings": "none", "attention_pattern": ("dense",)}},
    ),
    "zero_init": ({"model": {"zero_residual_init": True}}, {"model": {"zero_residual_init": False}}),
    "residual_scalars": ({"model": {"residual_scalars": True}}, {"model": {"residual_scalars": False}}),
    # Jordan et al. 2024
    "muon": ({"optimizer": {"name": "muon"}}, {"optimizer": {"name": "adamw"}}),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, size="124m", data="sotu", runlocal=False, without="", experts=0)
    size, peak_lr = c.choose(SIZES, args["size"], "size")
    config = c.Config(
        model=c.GPTConfig(context_length=1024, **size),
        data=c.DataConfig(source=args["data"], tokenizer="gpt2"),
        # GPT-2's batch; 10B tokens, warm-up and peak learning rate are our choice, as in configs/gpt2.py.
        batch=c.BatchConfig(total_tokens=10_000_000_000, tokens_per_batch=512 * 1024, microbatch_size=32),
        optimizer=c.OptimizerConfig(peak_lr=peak_lr, warmup_tokens=375_000_000),
        evaluation=c.EvaluationConfig(every_tokens=250_000_000),
        checkpoint=c.CheckpointConfig(every_tokens=250_000_000),
    )
    if args["runlocal"]:
        config = runlocal(config)
    without = [name for name in args["without"].split("+") if name]
    for name in without:
        c.choose(INGREDIENTS, name, "without")
    for name, (modern, plain) in INGREDIENTS.items():
        config = c.replace(config, plain if name in without else modern)
    if args["experts"]:
        half = config.model.feed_forward_dim // 2
        experts = {"num_experts": args["experts"], "experts_per_token": 2, "ffw_dim": half, "router_balance_loss": 0.01}
        config = c.replace(config, {"model": experts})
    return c.config_dict(config)


def runlocal(config: c.Config) -> c.Config:
    """Scales the config down to two CPU cores, as configs/gpt2.py does, so that both can be compared."""
    return c.replace(
        config,
        {
            "model": {"context_length": 128, "num_layers": 4, "embed_dim": 192, "num_heads": 6, "dtype": "float32"},
            "data": {"tokenizer": "bpe:4096"},
            "batch": {"total_tokens": 700_000, "tokens_per_batch": 8 * 128, "microbatch_size": None},
            "optimizer": {"peak_lr": 3e-3, "warmup_tokens": 50_000},
            "evaluation": {"every_tokens": 150_000, "max_tokens": 40_000},
            "checkpoint": {"every_tokens": 150_000},
        },
    )
