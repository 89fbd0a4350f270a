"""GPT-2 (Radford et al. 2019, "Language Models are Unsupervised Multitask Learners").

    python -m gptjax.main --config=configs/gpt2.py:runlocal --workdir=runs/demo
    python -m gptjax.main --config=configs/gpt2.py:size=124m,data=tfds:lm1b --workdir=runs/gpt2

Arguments: size (124m, 355m, 774m, 1558m), data (`DataConfig.source` in gptjax/config/sections.py), runlocal (a small
model for two CPU cores).

Sweeps: lr, seed, optimizer; `python -m gptjax.sweep --config=configs/gpt2.py:runlocal --sweep=lr,seed --workdir=DIR`.
"""

import ml_collections

from gptjax import config as c
from gptjax.launch import grid

# Section 2.3, table 2 (labelled 117M, 345M, 762M and 1542M there), and peak learning rates. The paper tuned learning
# rates by hand and published none; these are our choice, after GPT-3's for similar sizes.
SIZES = {
    "124m": ({"num_layers": 12, "embed_dim": 768, "num_heads": 12}, 6e-4),
    "355m": ({"num_layers": 24, "embed_dim": 1024, "num_heads": 16}, 3e-4),
    "774m": ({"num_layers": 36, "embed_dim": 1280, "num_heads": 20}, 2.5e-4),
    "1558m": ({"num_layers": 48, "embed_dim": 1600, "num_heads": 25}, 2e-4),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, size="124m", data="sotu", runlocal=False)
    size, peak_lr = c.choose(SIZES, args["size"], "size")
    config = c.Config(
        model=c.GPTConfig(context_length=1024, **size),
        data=c.DataConfig(source=args["data"], tokenizer="gpt2"),
        # Batch size 512 (section 2.3). Not published, our choice: 10B tokens, and GPT-3's optimizer settings.
        batch=c.BatchConfig(total_tokens=10_000_000_000, tokens_per_batch=512 * 1024, microbatch_size=32),
        optimizer=c.OptimizerConfig(peak_lr=peak_lr, warmup_tokens=375_000_000),
        evaluation=c.EvaluationConfig(every_tokens=250_000_000),
        checkpoint=c.CheckpointConfig(every_tokens=250_000_000),
    )
    return c.config_dict(runlocal(config) if args["runlocal"] else config)


def runlocal(config: c.Config) -> c.Config:
    """Scales the config down to two CPU cores, with a vocabulary trained on the corpus."""
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


def sweep_lr() -> list[grid.Overrides]:
    """Peak learning rates in steps of a factor of 2."""
    return grid.values("optimizer.peak_lr", [7.5e-4, 1.5e-3, 3e-3, 6e-3])


def sweep_seed() -> list[grid.Overrides]:
    """Three seeds."""
    return grid.values("seed", range(3))


def sweep_optimizer() -> list[grid.Overrides]:
    """The optimizers, at the same learning rate."""
    return grid.values("optimizer.name", ["adamw", "muon", "adafactor"])


def search() -> dict[str, grid.Distribution]:
    """Space of a search by Optuna."""
    return {"optimizer.peak_lr": grid.LogUniform(3e-4, 3e-2), "optimizer.weight_decay": grid.LogUniform(0.01, 1.0)}
