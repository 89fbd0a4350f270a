"""Compares the held-out loss of 8-bit matrix products: the same run with each `model.matmul_dtype`.

    python -m benchmarks.low_precision [--config=configs/gpt2.py:runlocal] [--tokens=200000] [--seeds=2]
        [--matmul_dtype=model --matmul_dtype=int8 ...] [--output=low_precision.json]

Prints the held-out loss at the end of each run; runs of one seed see the same batches and start from the same weights.
A CPU emulates 8-bit products by rounding, which says nothing about their speed: `benchmarks/train_step.py` measures it.
"""

import dataclasses
from typing import Any

from absl import flags

from benchmarks.checkpoint import loaded_config
from benchmarks.measuring import measured_on, write_json
from benchmarks.optimizers import held_out_loss, short_run
from gptjax import cli
from gptjax import config as c
from gptjax.models import low_precision
from gptjax.parallel.platforms import override_defaults


def main() -> None:
    config = short_run(loaded_config(), TOKENS.value, TOKENS.value // 10)
    result: dict[str, Any] = {**measured_on(), "tokens": TOKENS.value, "losses": {}}
    for matmul_dtype in MATMUL_DTYPE.value:
        losses = result["losses"][matmul_dtype] = []
        for seed in range(SEEDS.value):
            run = dataclasses.replace(c.replace(config, {"model": {"matmul_dtype": matmul_dtype}}), seed=seed)
            c.check(run)
            with override_defaults("cpu", emulate_low_precision=True):
                losses.append(held_out_loss(run))
            write_json(OUTPUT.value, result)
        print(f"{matmul_dtype:10} held-out loss {' '.join(f'{loss:.4f}' for loss in losses)}", flush=True)


if __name__ == "__main__":
    TOKENS = flags.DEFINE_integer("tokens", 200_000, "Training tokens of each run.", lower_bound=1)
    SEEDS = flags.DEFINE_integer("seeds", 2, "Runs with each dtype.", lower_bound=1)
    EVERY = ["model", *low_precision.DOT_GENERAL]
    MATMUL_DTYPE = flags.DEFINE_multi_enum("matmul_dtype", EVERY, EVERY, "Values to compare.")
    OUTPUT = flags.DEFINE_string("output", None, "Write the measurements to this JSON file.")
    cli.run(main)
