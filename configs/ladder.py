"""Small models of GPT-2's kind, whose losses predict that of a larger one: the runs that scaling laws are fitted to.

    python -m gptjax.main --config=configs/ladder.py:rung=3x48 --workdir=runs/rung

Arguments: rung (LAYERSxWIDTH), tokens (0: TOKENS_PER_PARAMETER for each parameter without embeddings), data
(`DataConfig.source` in gptjax/config/sections.py). The vocabulary is bytes: with 257 entries, embeddings are few of the
parameters of even the smallest model.

Sweeps: `sweep_ladder`, models of increasing size with the same number of tokens per parameter; `sweep_isoflop`, models
of several sizes for each of several amounts of compute; `sweep_target`, the large run to predict, with 100 times the
compute of the largest rung.
"""

import math
from typing import Any

import ml_collections

from gptjax import config as c
from gptjax.scaling.flops import flops_per_token
from gptjax.scaling.hyperparameters import step_law
from gptjax.scaling.parameters import non_embedding_parameter_count

HEAD_WIDTH, CONTEXT = 16, 128
VOCABULARY = 257  # bytes, and the end of text
# 36 bytes are about 9 tokens of a usual vocabulary: the target then reads the 12 MB of the default corpus three times.
TOKENS_PER_PARAMETER = 36
RUNGS = ("1x32", "2x32", "2x48", "3x48")
TARGET = "5x128"
ISOFLOP_BUDGETS = (1e11, 3e11, 1e12)  # FLOPs
ISOFLOP_SIZES = ("1x16", "1x32", "2x32", "2x48", "3x64", "4x80")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, rung=RUNGS[0], tokens=0, data="sotu")
    config = c.Config(
        model=model(args["rung"]),
        data=c.DataConfig(source=args["data"], tokenizer="bytes", validation_fraction=0.05),
        batch=c.BatchConfig(total_tokens=1),
        optimizer=c.OptimizerConfig(warmup_fraction=0.05, weight_decay=0.1),
        evaluation=c.EvaluationConfig(max_tokens=131_072, sample_tokens=0),
        logging=c.LoggingConfig(tensorboard=False),
    )
    keys = member(args["rung"], args["tokens"] or tokens(args["rung"]))
    return c.config_dict(c.resolve(c.overridden(c.config_dict(config).to_dict(), keys)))


def sweep_ladder() -> list[dict[str, Any]]:
    """The rungs, with two seeds each."""
    return [member(rung, tokens(rung)) | {"seed": seed} for rung in RUNGS for seed in range(2)]


def sweep_target() -> list[dict[str, Any]]:
    """The run that the rungs predict."""
    return [member(TARGET, tokens(TARGET))]


def sweep_isoflop() -> list[dict[str, Any]]:
    """All sizes for each budget, trained for as many tokens as the budget allows."""
    return [
        member(size, round(budget / flops_per_token(model(size))))
        for budget in ISOFLOP_BUDGETS
        for size in ISOFLOP_SIZES
    ]


def model(size: str) -> c.GPTConfig:
    """The model of a size LAYERSxWIDTH."""
    layers, _, width = size.partition("x")
    if not (layers.isdigit() and width.isdigit() and int(layers) and int(width) and int(width) % HEAD_WIDTH == 0):
        raise c.UserError(f"rung={size} is not LAYERSxWIDTH with a multiple of {HEAD_WIDTH} as width, such as 3x48")
    return c.GPTConfig(
        vocab_size=VOCABULARY,
        context_length=CONTEXT,
        num_layers=int(layers),
        embed_dim=int(width),
        num_heads=int(width) // HEAD_WIDTH,
        dtype="float32",
    )


def tokens(size: str) -> int:
    return TOKENS_PER_PARAMETER * non_embedding_parameter_count(model(size))


def member(size: str, total: int) -> dict[str, Any]:
    """The overrides of one run of `total` tokens.

    The batch size follows Step Law. The learning rate falls slowly with the size; it is our choice, and not tuned: what
    a prediction needs is that it follows one rule at all sizes.
    """
    chosen = model(size)
    count = non_embedding_parameter_count(chosen)
    batch = CONTEXT * max(4, round(step_law(count, total, 0.0).tokens_per_batch / CONTEXT))
    every = max(batch, math.ceil(total / 10))
    return {
        "model.num_layers": chosen.num_layers,
        "model.embed_dim": chosen.embed_dim,
        "model.num_heads": chosen.num_heads,
        "batch.total_tokens": total,
        "batch.tokens_per_batch": batch,
        "optimizer.peak_lr": float(f"{1e-2 * (12_000 / count) ** 0.15:.3g}"),
        "evaluation.every_tokens": every,
        "checkpoint.every_tokens": total,
    }
