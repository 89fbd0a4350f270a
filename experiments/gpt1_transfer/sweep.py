"""GPT-1's recipe on tweets: pretraining on their texts, then fine-tuning on few labelled rows.

    python -m gptjax.main --config=experiments/gpt1_transfer/sweep.py --workdir=runs/gpt1_pretrained
    python -m gptjax.sweep --config=experiments/gpt1_transfer/sweep.py:stage=finetune --workdir=runs/gpt1_transfer

Arguments: stage (pretrain, finetune), scale (a name of SCALES), rows (labelled rows of finetune), start (pretrained;
scratch: random weights with the same tokenizer), data (directory of `rows.py`), pretrained (workdir of the first
command).

Sweep, with three seeds of fine-tuning each: transfer against scratch by number of rows; for the most rows also the
number of transferred layers, and the auxiliary language-model loss off.
"""

import dataclasses
from typing import Any

import ml_collections

from gptjax import config as c
from gptjax.launch import grid

FILE = "experiments/gpt1_transfer/sweep.py"
LARGE: dict[str, Any] = {
    "num_layers": 12,
    "embed_dim": 768,
    "num_heads": 12,
    "context_length": 512,
    "dtype": "bfloat16",
}
SCALES: dict[str, tuple[dict[str, Any], int, int, float]] = {
    "cpu": (
        {"num_layers": 2, "embed_dim": 64, "num_heads": 4, "context_length": 40, "dtype": "float32"},
        500_000,
        16 * 40,
        4.0,
    ),
    "tpu_v5e_4": (LARGE, 10**9, 64 * 512, 3.0),
    "gpu_h100_8": (LARGE, 10**9, 64 * 512, 3.0),
}
ROWS = (90, 360)
PATHS = {"data": "runs/gpt1_rows", "pretrained": "runs/gpt1_pretrained"}
AUXILIARY = 0.5  # section 4.1


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, stage="pretrain", scale="cpu", rows=ROWS[-1], start="pretrained", **PATHS)
    model, tokens, batch, epochs = c.choose(SCALES, args["scale"], "scale")
    starts = {"pretrained": args["pretrained"], "scratch": None}
    small = args["scale"] == "cpu"
    config = c.Config(
        model=c.GPTConfig(norm_position="post", position_init_std=0.02, scale_residual_init=False, **model),
        data=c.DataConfig(source=f"jsonl:{args['data']}/texts.jsonl", tokenizer="bpe:2048" if small else "bpe:40000"),
        batch=c.BatchConfig(total_tokens=tokens, tokens_per_batch=batch),
        optimizer=c.OptimizerConfig(
            peak_lr=2e-3 if small else 2.5e-4, warmup_fraction=0.05, floor_lr_fraction=0.0, beta2=0.999
        ),
        evaluation=c.EvaluationConfig(every_tokens=tokens // 4, max_tokens=20_000, sample_tokens=0),
        logging=c.LoggingConfig(tensorboard=False),
    )
    if c.choose({"pretrain": False, "finetune": True}, args["stage"], "stage"):
        config = c.replace(config, finetuning(args, epochs, small))
        config = dataclasses.replace(config, stage="finetune", init_from=c.choose(starts, args["start"], "start"))
    return c.config_dict(config)


def finetuning(args: dict[str, Any], epochs: float, small: bool) -> dict[str, dict[str, Any]]:
    """The sections of fine-tuning that differ from pretraining; section 4.1 where it is not small."""
    context = SCALES[args["scale"]][0]["context_length"]
    rows = {"source": f"jsonl:{args['data']}/train_{args['rows']}.jsonl"}
    if args["start"] == "scratch":
        rows["tokenizer"] = f"json:{args['pretrained']}/tokenizer/tokenizer.json"
    return {
        "data": rows | {"validation_source": f"jsonl:{args['data']}/test.jsonl"},
        "task": {"lm_weight": AUXILIARY},
        "model": dict.fromkeys(("embedding_dropout", "attention_dropout", "residual_dropout"), 0.1),
        "batch": {"total_tokens": None, "epochs": epochs, "tokens_per_batch": (8 if small else 32) * context},
        "optimizer": {"peak_lr": 1e-3 if small else 6.25e-5, "schedule": "linear", "warmup_fraction": 0.1},
        "evaluation": {"every_tokens": None, "metric": "accuracy"},
    }


def sweep() -> list[grid.Overrides]:
    """Transfer against scratch by rows, transferred layers, and no auxiliary loss."""
    layers = SCALES["cpu"][0]["num_layers"]
    members: list[grid.Overrides] = [
        {"config": member(rows, start)} for rows in ROWS for start in ("scratch", "pretrained")
    ]
    members += [{"config": member(ROWS[-1], "pretrained"), "init_layers": count} for count in range(layers)]
    members.append({"config": member(ROWS[-1], "pretrained"), "task.lm_weight": 0.0})
    return grid.product(grid.values("seed", range(3)), members)


def member(rows: int, start: str) -> str:
    return f"{FILE}:stage=finetune,rows={rows},start={start}"
