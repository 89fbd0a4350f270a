"""The recipes of all generations at one size, one compute budget and one corpus, with three seeds each.

    python -m gptjax.sweep --config=experiments/evolution/sweep.py --workdir=runs/evolution

Arguments: generation (a name of GENERATIONS), scale (a name of SCALES), share (of the compute budget of the scale),
data (`DataConfig.source` in gptjax/config/sections.py).

A recipe is the `runlocal` form of the generation's config file. Its block, initialisation, dropout, optimizer, schedule
and batch ramp stay; `sized` replaces its sizes, tokenizer and number of tokens. Sweep `rates`: the learning rates that
RATES were chosen from.
"""

import dataclasses
import runpy
from collections.abc import Iterable
from pathlib import Path

import ml_collections

from gptjax import config as c
from gptjax.launch import grid
from gptjax.scaling.flops import flops_per_token

FILE = "experiments/evolution/sweep.py"
CONFIGS = Path(__file__).parents[2] / "configs"
GENERATIONS = {"gpt1": "gpt1", "gpt2": "gpt2", "gpt3": "gpt3", "gpt_oss": "gpt_oss", "modern": "gpt_modern"}
SEEDS, TUNING_SEED = range(3), 100
LOWEST = {"gpt1": 5e-4, "gpt2": 1.5e-3, "gpt3": 1.5e-3, "gpt_oss": 1.5e-3, "modern": 7e-3}  # of `sweep_rates`
# Peak learning rates of the scale cpu: the best of those tried. Larger scales have those of configs/gpt1.py and GPT-3.
RATES = {"gpt1": 1e-3, "gpt2": 3e-3, "gpt3": 3e-3, "gpt_oss": 3e-3, "modern": 2.8e-2}
PUBLISHED_RATES = dict.fromkeys(RATES, 6e-4) | {"gpt1": 2.5e-4}


@dataclasses.dataclass(frozen=True)
class Scale:
    """The size of all models, and their compute budget.

    Attributes:
      vocabulary: of the tokenizer.
      batch: tokens of a batch, as a multiple of those of the recipe.
      rows: sequences of a microbatch.
      flops: of training, by `flops_per_token`.
      devices: over which parameters and optimizer state are sharded.
    """

    layers: int
    width: int
    head: int
    context: int
    tokenizer: str
    vocabulary: int
    batch: float
    rows: int
    flops: float
    rates: dict[str, float]
    dtype: str
    devices: int


LARGE = Scale(12, 768, 64, 1024, "gpt2", 50_257, 128, 128, 2e18, PUBLISHED_RATES, "bfloat16", 4)
SCALES = {
    "cpu": Scale(4, 64, 32, 64, "bpe:1024", 1024, 0.5, 8, 4e11, RATES, "float32", 1),
    "tpu_v5e_4": LARGE,
    "gpu_h100_8": dataclasses.replace(LARGE, devices=8),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, generation="gpt2", scale="cpu", share=1.0, data="sotu")
    file = c.choose(GENERATIONS, args["generation"], "generation")
    scale = c.choose(SCALES, args["scale"], "scale")
    config = sized(recipe(file, f"data={args['data']}"), scale)
    tokens = args["share"] * scale.flops / flops_per_token(config.model.with_vocabulary(scale.vocabulary))
    return c.config_dict(timed(config, round(tokens), scale.rates[args["generation"]]))


def recipe(file: str, argument: str) -> c.Config:
    return c.resolve(runpy.run_path(str(CONFIGS / f"{file}.py"))["get_config"](f"runlocal,{argument}"))


def sized(config: c.Config, scale: Scale) -> c.Config:
    """The recipe with the sizes of a scale; other sizes of the model change in proportion."""
    model = config.model
    wider, longer = scale.width / model.embed_dim, scale.context / model.context_length
    heads = round(model.num_heads * wider * model.head_dim / scale.head)
    sizes = {"num_layers": scale.layers, "embed_dim": scale.width, "context_length": scale.context} | {
        "num_heads": heads,
        "num_kv_heads": model.num_kv_heads and max(1, heads * model.num_kv_heads // model.num_heads),
        "head_width": model.head_width and scale.head,
        "ffw_dim": model.ffw_dim and round(model.ffw_dim * wider),
        "band_width": round(model.band_width * longer),
        "yarn_original_context": round(model.yarn_original_context * longer),
        "dtype": scale.dtype,
    }
    ramp = config.batch.ramp_start_tokens
    batch = {
        "tokens_per_batch": round(config.batch.tokens_per_batch * scale.batch),
        "ramp_start_tokens": ramp and round(ramp * scale.batch),
        "microbatch_size": scale.rows,
    }
    mesh = {"data": 1, "fsdp": -1} if scale.devices > 1 else {}
    data = {"tokenizer": scale.tokenizer}
    return c.replace(config, {"model": sizes, "batch": batch, "data": data, "mesh": mesh})


def timed(config: c.Config, tokens: int, peak_lr: float) -> c.Config:
    """The config for a number of tokens, with which warm-up, decay and ramp change in proportion."""
    longer = tokens / (config.batch.total_tokens or tokens)
    decay, ramp = config.optimizer.decay_tokens, config.batch.ramp_tokens
    return c.replace(
        config,
        {
            "batch": {"total_tokens": tokens, "ramp_tokens": ramp and round(ramp * longer)},
            "optimizer": {
                "peak_lr": peak_lr,
                "warmup_tokens": round(config.optimizer.warmup_tokens * longer),
                "decay_tokens": decay and round(decay * longer),
            },
            "evaluation": {"every_tokens": tokens // 12, "max_tokens": 16_384, "sample_tokens": 0},
            "checkpoint": {"every_tokens": tokens},
            "logging": {"tensorboard": False},
        },
    )


def sweep() -> list[grid.Overrides]:
    """All generations at the scale cpu. Seeds come first: later ones find the programs of the first compiled."""
    return members(FILE, "generation", GENERATIONS, "cpu")


def sweep_tpu_v5e_4() -> list[grid.Overrides]:
    """The same on a slice of 4 TPU chips."""
    return members(FILE, "generation", GENERATIONS, "tpu_v5e_4")


def sweep_gpu_h100_8() -> list[grid.Overrides]:
    """The same on a machine with 8 GPUs."""
    return members(FILE, "generation", GENERATIONS, "gpu_h100_8")


def members(file: str, argument: str, names: Iterable[str], scale: str) -> list[grid.Overrides]:
    """A config file with each of the values of an argument, at a scale, with all seeds."""
    suffix = "" if scale == "cpu" else f",scale={scale}"
    configs = grid.values("config", [f"{file}:{argument}={name}{suffix}" for name in names])
    return grid.product(grid.values("seed", SEEDS), configs)


def sweep_rates() -> list[grid.Overrides]:
    """Three learning rates, on three quarters of the compute and with a seed that the study does not have."""
    return [
        {"config": f"{FILE}:generation={name},share=0.75", "optimizer.peak_lr": rate * factor, "seed": TUNING_SEED}
        for name, rate in LOWEST.items()
        for factor in (1, 2, 4)
    ]
