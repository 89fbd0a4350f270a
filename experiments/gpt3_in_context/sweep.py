"""Models of several sizes that read episodes of in-context tasks (`episodes.py`), each with three seeds.

    python -m gptjax.sweep --config=experiments/gpt3_in_context/sweep.py --workdir=runs/gpt3_in_context

Arguments: size (LAYERSxWIDTH), scale (a name of SCALES), data (the training documents).

A letter or digit is one token with the blank before it, so that an example is two tokens and a document fills a row.
With two layers or more, banded and dense attention alternate, as in GPT-3 (section 2.1). Rotary positions, normalised
queries, keys and embeddings, and kernels of unit gain make models copy from the context within few tokens.
"""

import ml_collections

from gptjax import config as c
from gptjax.launch import grid

FILE = "experiments/gpt3_in_context/sweep.py"
CONTEXT = 41  # 20 examples, and the end of text: a row is a document
SEEDS = (3, 4, 5)  # smaller ones were used to choose tokens, batch size and learning rate
# sizes, tokens, rows of a batch, peak learning rate
SCALES = {
    "cpu": (("2x64", "1x32"), 1_500_000, 16, 1e-2),
    "tpu_v5e_4": (("12x768", "4x256", "2x64"), 2_000_000_000, 2048, 1e-3),
    "gpu_h100_8": (("12x768", "4x256", "2x64"), 2_000_000_000, 2048, 1e-3),
}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, size="2x64", scale="cpu", data="jsonl:runs/episodes/train.jsonl#text")
    layers, _, width = args["size"].partition("x")
    if not (layers.isdigit() and width.isdigit() and int(layers) and int(width) and int(width) % 32 == 0):
        raise c.UserError(f"size={args['size']} is not LAYERSxWIDTH with a multiple of 32 as width, such as 2x64")
    _, tokens, rows, peak_lr = c.choose(SCALES, args["scale"], "scale")
    config = c.Config(
        model=c.GPTConfig(
            context_length=CONTEXT,
            num_layers=int(layers),
            embed_dim=int(width),
            num_heads=int(width) // 32,
            attention_pattern=("banded", "dense") if int(layers) % 2 == 0 else ("dense",),
            band_width=2,
            positions="rotary",
            norm_embedding=True,
            qk_norm=True,
            kernel_init_std=int(width) ** -0.5,
            dtype="float32" if args["scale"] == "cpu" else "bfloat16",
        ),
        data=c.DataConfig(source=args["data"], tokenizer="bpe:320", packing="segment"),
        batch=c.BatchConfig(total_tokens=tokens, tokens_per_batch=rows * CONTEXT),
        optimizer=c.OptimizerConfig(name="muon", peak_lr=peak_lr, warmup_fraction=0.07),
        evaluation=c.EvaluationConfig(every_tokens=tokens // 5, max_tokens=16_384, sample_tokens=0),
        logging=c.LoggingConfig(tensorboard=False),
    )
    return c.config_dict(config)


def sweep() -> list[grid.Overrides]:
    """Sizes of the scale cpu, with three seeds each."""
    return _members("cpu")


def sweep_tpu_v5e_4() -> list[grid.Overrides]:
    """The same on a slice of 4 TPU chips."""
    return _members("tpu_v5e_4")


def sweep_gpu_h100_8() -> list[grid.Overrides]:
    """The same on a machine with 8 GPUs."""
    return _members("gpu_h100_8")


def _members(scale: str) -> list[grid.Overrides]:
    suffix = "" if scale == "cpu" else f",scale={scale}"
    sizes = grid.values("config", [f"{FILE}:size={size}{suffix}" for size in SCALES[scale][0]])
    return grid.product(sizes, grid.values("seed", SEEDS))
