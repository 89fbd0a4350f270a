"""GPT-2 with the ingredients of later work, without each of them, and as a mixture of experts, with three seeds each.

    python -m gptjax.sweep --config=experiments/since_gpt2/sweep.py --workdir=runs/since_gpt2

Arguments: variant (gpt2, modern, experts, or an ingredient of configs/gpt_modern.py to switch back to GPT-2's), scale
(a name of SCALES), data (`DataConfig.source` in gptjax/config/sections.py).

All variants have the modern one's learning rate, except GPT-2 and the one without Muon, which have GPT-2's. The experts
compute a token with as many parameters as the dense layer.
"""

import dataclasses
import runpy
from pathlib import Path

import ml_collections

from gptjax import config as c
from gptjax.launch import grid

FILE = "experiments/since_gpt2/sweep.py"
EVOLUTION = runpy.run_path(str(Path(__file__).parents[1] / "evolution/sweep.py"))
INGREDIENTS = tuple(runpy.run_path(str(EVOLUTION["CONFIGS"] / "gpt_modern.py"))["INGREDIENTS"])
# Variant -> the config file, its argument, and the generation whose learning rate it has.
VARIANTS = {
    "gpt2": ("gpt2", "", "gpt2"),
    "modern": ("gpt_modern", "", "modern"),
    "experts": ("gpt_modern", ",experts=8", "modern"),
} | {name: ("gpt_modern", f",without={name}", "gpt2" if name == "muon" else "modern") for name in INGREDIENTS}
# Sizes and learning rates of the recipes' own `runlocal`, which `make demo` has, and those of experiments/evolution.
RUNLOCAL_RATES = {"gpt2": 3e-3, "modern": 7e-3}
SCALES = {
    "demo": dataclasses.replace(
        EVOLUTION["SCALES"]["cpu"],
        width=192,
        context=128,
        tokenizer="bpe:4096",
        vocabulary=4096,
        batch=1.0,
        rates=RUNLOCAL_RATES,
    )
} | EVOLUTION["SCALES"]
TOKENS = {"demo": 175_000, "cpu": 100_000, "tpu_v5e_4": 1_000_000_000, "gpu_h100_8": 1_000_000_000}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, variant="modern", scale="cpu", data="sotu")
    file, argument, generation = c.choose(VARIANTS, args["variant"], "variant")
    scale = c.choose(SCALES, args["scale"], "scale")
    config = EVOLUTION["sized"](EVOLUTION["recipe"](file, f"data={args['data']}{argument}"), scale)
    config = EVOLUTION["timed"](config, TOKENS[args["scale"]], scale.rates[generation])
    return c.config_dict(config)


def sweep() -> list[grid.Overrides]:
    """All variants at the scale cpu. Seeds come first: later ones find the programs of the first compiled."""
    return EVOLUTION["members"](FILE, "variant", VARIANTS, "cpu")


def sweep_demo() -> list[grid.Overrides]:
    """The same at the size of `make demo`."""
    return EVOLUTION["members"](FILE, "variant", VARIANTS, "demo")


def sweep_tpu_v5e_4() -> list[grid.Overrides]:
    """The same on a slice of 4 TPU chips."""
    return EVOLUTION["members"](FILE, "variant", VARIANTS, "tpu_v5e_4")


def sweep_gpu_h100_8() -> list[grid.Overrides]:
    """The same on a machine with 8 GPUs."""
    return EVOLUTION["members"](FILE, "variant", VARIANTS, "gpu_h100_8")
