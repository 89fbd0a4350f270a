"""GPT-2's sizes with the blocks and the optimizer that have replaced GPT-2's since (2019 to 2025).

python -m gptjax.main --config=configs/gpt_modern.py:size=124m --workdir=runs/gpt_modern
python -m gptjax.main --config=configs/gpt_modern.py:runlocal,without=rotary+muon --workdir=runs/ablation

Arguments: those of configs/gpt2.py (size, data, runlocal); without (ingredients to switch back to GPT-2's, joined by
"+": see INGREDIENTS); experts (a mixture of so many experts, each half as wide as the feed-forward layer, two for each
token, so that as many parameters compute a token as in the dense model; 0: none).
"""

import runpy
from pathlib import Path

import ml_collections

from gptjax import config as c

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
    # Zhou et al. 2024, as in nanochat
    "value_embeddings": {"model": {"value_embeddings": "alternate", "attention_pattern": ("dense", "dense")}},
    "zero_init": {"model": {"zero_residual_init": True}},
    "residual_scalars": {"model": {"residual_scalars": True}},
    "muon": {"optimizer": {"name": "muon"}},  # Jordan et al. 2024
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, size="124m", data="sotu", runlocal=False, without="", experts=0)
    gpt2 = GPT2["get_config"](f"size={args['size']},data={args['data']},runlocal={args['runlocal']}")
    config = c.resolve(gpt2)
    without = [name for name in args["without"].split("+") if name]
    for name in without:
        c.choose(INGREDIENTS, name, "without")
    for name, changes in INGREDIENTS.items():
        if name not in without:
            config = c.replace(config, changes)
    if args["experts"]:
        half = config.model.feed_forward_dim // 2
        experts = {"num_experts": args["experts"], "experts_per_token": 2, "ffw_dim": half, "router_balance_loss": 0.01}
        config = c.replace(config, {"model": experts})
    return c.config_dict(config)
