"""gpt-oss (OpenAI 2025, "gpt-oss-120b & gpt-oss-20b Model Card", arXiv 2508.10925).

    python -m gptjax.main --config=configs/gpt_oss.py:runlocal --workdir=runs/gpt_oss_small
    python -m gptjax.plan --config=configs/gpt_oss.py:size=120b

Arguments: size (20b, 120b), data (`DataConfig.source` in gptjax/config/sections.py), runlocal (a small model of the
same form for two CPU cores).

The model is the published one (model card, section 2; config.json of openai/gpt-oss-20b and openai/gpt-oss-120b). The
data, the number of tokens and the hyperparameters of its training are not published: all sections but `model` are our
choice.
"""

import ml_collections

from gptjax import config as c

# Model card, table 1: layers, experts. Then our choice: tokens, about 20 for each parameter (Hoffmann et al. 2022), and
# peak learning rates, after GPT-3's for similar numbers of active parameters.
SIZES = {
    "20b": (24, 32, 420_000_000_000, 1.6e-4),  # 20.9B parameters, 3.6B active
    "120b": (36, 128, 2_340_000_000_000, 1.2e-4),  # 116.8B, 5.1B active
}
CONTEXT = 131_072


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, size="20b", data="sotu", runlocal=False)
    num_layers, num_experts, tokens, peak_lr = c.choose(SIZES, args["size"], "size")
    config = c.Config(
        model=c.GPTConfig(
            vocab_size=201_088,
            context_length=CONTEXT,
            num_layers=num_layers,
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
            num_experts=num_experts,
            experts_per_token=4,
            router_bias=True,
            tied_head=False,
            router_balance_loss=0.01,  # our choice, as in Switch (Fedus et al. 2021, section 2.2)
            router_z_loss=1e-3,  # our choice, as in ST-MoE (Zoph et al. 2022, section 3.2)
            remat="full",
        ),
        data=c.DataConfig(source=args["data"], tokenizer="o200k_harmony"),
        # Not published, our choice: batches of 4M tokens, and GPT-3's optimizer settings.
        batch=c.BatchConfig(total_tokens=tokens, tokens_per_batch=32 * CONTEXT, microbatch_size=32),
        optimizer=c.OptimizerConfig(peak_lr=peak_lr, warmup_tokens=4_000_000_000),
        mesh=c.MeshConfig(data=1, fsdp=-1),
        evaluation=c.EvaluationConfig(every_tokens=1_000_000_000),
        checkpoint=c.CheckpointConfig(every_tokens=1_000_000_000),
    )
    return c.config_dict(runlocal(config) if args["runlocal"] else config)


def runlocal(config: c.Config) -> c.Config:
    """Scales the config down to two CPU cores: every field of the form stays, YaRN's extension by a factor of 4."""
    return c.replace(
        config,
        {
            "model": {
                "vocab_size": None,
                "context_length": 256,  # room for the system message of the harmony format, about 80 tokens
                "num_layers": 4,
                "embed_dim": 128,
                "yarn_factor": 4.0,
                "yarn_original_context": 64,
                "num_heads": 8,
                "num_kv_heads": 2,
                "head_width": 32,
                "band_width": 32,
                "ffw_dim": 128,
                "num_experts": 8,
                "experts_per_token": 2,
                "remat": "none",
                "dtype": "float32",
            },
            "data": {"tokenizer": "bpe:4096"},
            "batch": {"total_tokens": 700_000, "tokens_per_batch": 4 * 256, "microbatch_size": None},
            "optimizer": {"peak_lr": 3e-3, "warmup_tokens": 50_000},
            "mesh": {"data": -1, "fsdp": 1},
            "evaluation": {"every_tokens": 150_000, "max_tokens": 40_000},
            "checkpoint": {"every_tokens": 150_000},
        },
    )
