"""GPT-3 (Brown et al. 2020, "Language Models are Few-Shot Learners").

    python -m gptjax.main --config=configs/gpt3.py:runlocal --workdir=runs/gpt3_small
    python -m gptjax.main --config=configs/gpt3.py:size=xl,data=tfds:lm1b --workdir=runs/gpt3_xl
    python -m gptjax.main --config=configs/gpt3.py:size=xl,data=mixture,folder=/data/gpt3 --workdir=runs/gpt3_mixture

Arguments: size (small, medium, large, xl, 2.7b, 6.7b, 13b, 175b), data (`DataConfig.source` in
gptjax/config/sections.py, or mixture: the five sources of the paper's table 2.2), folder (of mixture: the directory of
JSON lines with a field "text", in one file or more of each source, optionally compressed: common_crawl*.jsonl*,
webtext2*.jsonl*, books1*.jsonl*, books2*.jsonl* and wikipedia*.jsonl*), runlocal (a small model for two CPU cores).
"""

import ml_collections

from gptjax import config as c

# Table 2.1: layers, model width, heads, sequences of 2,048 tokens per batch, peak learning rate. Two rows of the table
# are inconsistent: XL has 16 heads (2048 / 128), not 24, and 13B has width 5120 (40 heads of 128), not 5140.
SIZES = {
    "small": (12, 768, 12, 256, 6e-4),  # 0.5M tokens per batch
    "medium": (24, 1024, 16, 256, 3e-4),
    "large": (24, 1536, 16, 256, 2.5e-4),
    "xl": (24, 2048, 16, 512, 2e-4),  # 1M
    "2.7b": (32, 2560, 32, 512, 1.6e-4),
    "6.7b": (32, 4096, 32, 1024, 1.2e-4),  # 2M
    "13b": (40, 5120, 40, 1024, 1e-4),
    "175b": (96, 12288, 96, 1600, 6e-5),  # 3.2M
}
# Table 2.2: weight in the training mix, in percent; rounded, they sum to 101. The table's epochs in 300B tokens are
# 0.44, 2.9, 1.9, 0.43 and 3.4, where its weights and quantities (410B, 19B, 12B, 55B and 3B tokens) give 0.43, 3.4,
# 2.0, 0.43 and 3.0.
MIXTURE = {"common_crawl": 60, "webtext2": 22, "books1": 8, "books2": 8, "wikipedia": 3}
SPREAD_SIZES = ("xl", "2.7b", "6.7b", "13b")


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, size="small", data="sotu", folder="", runlocal=False)
    num_layers, embed_dim, num_heads, sequences, peak_lr = c.choose(SIZES, args["size"], "size")
    config = c.Config(
        model=c.GPTConfig(
            context_length=2048,
            num_layers=num_layers,
            embed_dim=embed_dim,
            num_heads=num_heads,
            attention_pattern=("dense", "banded"),  # section 2.1
            band_width=256,  # not published; as in GPT-Neo, an open model with the same alternation
        ),
        data=sources(args["data"], args["folder"]),
        # Appendix B. The ramp starts at 32k tokens, a microbatch of 16 sequences, and ends between 4B and 12B tokens
        # "depending on the model size"; the values per size are not published, these are our choice.
        batch=c.BatchConfig(
            total_tokens=300_000_000_000,
            tokens_per_batch=sequences * 2048,
            microbatch_size=16,
            ramp_start_tokens=16 * 2048,
            ramp_tokens=12_000_000_000 if args["size"] == "175b" else 4_000_000_000,
        ),
        optimizer=c.OptimizerConfig(
            peak_lr=peak_lr,
            schedule="cosine",
            warmup_tokens=375_000_000,
            decay_tokens=260_000_000_000,
            floor_lr_fraction=0.1,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=0.1,
            clip_norm=1.0,
        ),
        evaluation=c.EvaluationConfig(every_tokens=1_000_000_000),
        checkpoint=c.CheckpointConfig(every_tokens=1_000_000_000),
    )
    if args["runlocal"]:
        config = runlocal(config)
    elif args["size"] == "175b":
        config = for_a_pod(config)
    elif args["size"] in SPREAD_SIZES:
        config = spread(config)
    return c.config_dict(config)


def sources(data: str, folder: str) -> c.DataConfig:
    """Returns the data section: one source, or those of table 2.2 in `folder`."""
    c.require((data == "mixture") == (folder != ""), "data=mixture and folder=DIRECTORY need each other: give both")
    if data != "mixture":
        return c.DataConfig(source=data, tokenizer="gpt2")
    mixture = tuple((f"jsonl:{folder}/{name}*.jsonl*", float(weight)) for name, weight in MIXTURE.items())
    return c.DataConfig(mixture=mixture, tokenizer="gpt2")


def spread(config: c.Config) -> c.Config:
    """Shards parameters and optimizer state over all devices, with full rematerialisation of activations."""
    return c.replace(config, {"mesh": {"data": 1, "fsdp": -1}, "model": {"remat": "full"}})


def for_a_pod(config: c.Config) -> c.Config:
    """Like `spread`, with 16-way tensor parallelism and microbatches of 64 sequences; see docs/scaling.md.

    Therefore the vocabulary is padded by 47 unused rows to a multiple of 16, and the batch ramp starts at 131k tokens
    (64 sequences).
    """
    return c.replace(
        spread(config),
        {
            "model": {"vocab_size": 50_304},
            "mesh": {"tensor": 16},
            "batch": {"microbatch_size": 64, "ramp_start_tokens": 64 * 2048},
        },
    )


def runlocal(config: c.Config) -> c.Config:
    """Scales the config down to two CPU cores, including attention pattern, ramp and schedule."""
    return c.replace(
        config,
        {
            "model": {
                "context_length": 128,
                "num_layers": 4,
                "embed_dim": 192,
                "num_heads": 6,
                "band_width": 32,
                "dtype": "float32",
            },
            "data": {"tokenizer": "bpe:4096"},
            "batch": {
                "total_tokens": 700_000,
                "tokens_per_batch": 32 * 128,
                "microbatch_size": 8,
                "ramp_start_tokens": 8 * 128,
                "ramp_tokens": 100_000,
            },
            "optimizer": {"peak_lr": 3e-3, "warmup_tokens": 50_000, "decay_tokens": 600_000},
            "evaluation": {"every_tokens": 150_000, "max_tokens": 40_000},
            "checkpoint": {"every_tokens": 150_000},
        },
    )
