"""From a language model to one that answers: InstructGPT's steps, the published recipe behind ChatGPT (Ouyang et al.
2022, "Training language models to follow instructions with human feedback"), and direct preference optimization.

    python -m gptjax.main --config=configs/chatgpt.py:stage=sft,init_from=runs/demo,runlocal --workdir=runs/sft
    python -m gptjax.main --config=configs/chatgpt.py:stage=reward,init_from=runs/sft,runlocal --workdir=runs/reward
    python -m gptjax.main --config=configs/chatgpt.py:stage=dpo,init_from=runs/sft,runlocal --workdir=runs/dpo
    python -m gptjax.main --config=configs/chatgpt.py:stage=sft,data=jsonl:chats.jsonl,init_from=runs/gpt3_1.3b \
        --workdir=runs/sft

Arguments: stage (sft, reward, dpo), data (a source of gptjax/data/conversations.py; without it the dialogues of
chatterbot-corpus, whose answers the later stages rank above answers to other questions), init_from (the workdir of the
weights to start from; without it, from scratch), runlocal (for two CPU cores; without init_from a small model).
"""

from pathlib import Path

import ml_collections

from gptjax import config as c

DROPOUT = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, stage="sft", data="", init_from="", runlocal=False)
    stage = c.choose({"sft": sft, "reward": reward, "dpo": dpo}, args["stage"], "stage")
    model = c.GPTConfig(context_length=2048)
    if args["init_from"]:
        model = c.read_config(Path(args["init_from"]).expanduser()).model
    elif args["runlocal"]:
        model = c.GPTConfig(context_length=128, num_layers=4, embed_dim=192, num_heads=6, dtype="float32")
    config = c.Config(
        stage=args["stage"],
        init_from=args["init_from"] or None,
        model=model,
        data=c.DataConfig(source=args["data"] or "chatterbot", tokenizer="gpt2", validation_fraction=0.05),
        # Of the package's dialogues nobody has ranked the answers.
        chat=c.ChatConfig(random_answers=0 if args["data"] or args["stage"] == "sft" else 3),
        # Appendix C: Adam with 0.9 and 0.95, cosine to 10 % of the peak, no warm-up.
        optimizer=c.OptimizerConfig(beta2=0.95, weight_decay=0.0, floor_lr_fraction=0.1),
    )
    config = stage(c.replace(config, {"model": DROPOUT}))
    return c.config_dict(runlocal(config) if args["runlocal"] else config)


def sft(config: c.Config) -> c.Config:
    """Appendix C.1: 16 epochs, batches of 32, residual dropout 0.2, the step size of the 1.3B and 6B models."""
    return c.replace(
        config,
        {
            "model": {"residual_dropout": 0.2},
            "batch": {"epochs": 16.0, "tokens_per_batch": 32 * config.model.context_length},
            "optimizer": {"peak_lr": 9.65e-6},
            "evaluation": {"every_epochs": 1.0},
            "checkpoint": {"every_epochs": 1.0},
        },
    )


def reward(config: c.Config) -> c.Config:
    """Appendix C.2: one epoch, batches of 64 prompts; of more, where short ones share an element (chat.pack)."""
    return c.replace(
        config,
        {
            "batch": {"epochs": 1.0, "tokens_per_batch": 64 * config.model.context_length},
            "optimizer": {"peak_lr": 9e-6},
            "evaluation": {"metric": "accuracy", "every_epochs": 0.25},
            "checkpoint": {"every_epochs": 0.25},
        },
    )


def dpo(config: c.Config) -> c.Config:
    """Rafailov et al. 2023, appendix B: beta 0.1, batches of 64, warm-up over 150 steps, then constant.

    These are 6 % of an epoch of the 161,000 dialogues of helpfulness and harmlessness.
    """
    return c.replace(
        config,
        {
            "batch": {"epochs": 1.0, "tokens_per_batch": 64 * config.model.context_length},
            "optimizer": {"peak_lr": 1e-6, "schedule": "constant", "warmup_fraction": 0.06},
            "evaluation": {"metric": "margin", "every_epochs": 0.25},
            "checkpoint": {"every_epochs": 0.25},
        },
    )


def runlocal(config: c.Config) -> c.Config:
    """The same program for a small model on a laptop, with larger steps and, from scratch, a vocabulary of the texts.

    Its step sizes are choices. All stages hold the same fifth of the dialogues out: of few it takes many for a number
    that means something.
    """
    peak_lr, size, residual_dropout, draws = {  # size: rows of a batch, or elements, of which each has several rows
        "sft": (1e-3, 16, 0.2, 1),
        "reward": (1e-3, 4, 0.1, 3),
        "dpo": (3e-4, 4, 0.1, 1),
    }[config.stage]
    batch = {"tokens_per_batch": size * config.model.context_length}
    if config.stage == "sft":
        batch["epochs"] = 8.0
    return c.replace(
        config,
        {
            "model": {"embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": residual_dropout},
            "data": {"tokenizer": "bpe:4096", "validation_fraction": 0.2},
            "chat": {"on_too_long": "skip", "random_draws": draws if config.chat.random_answers else 1},
            "batch": batch,
            "optimizer": {"peak_lr": peak_lr, "schedule": "cosine", "warmup_fraction": None},
            "evaluation": {"sample_prompt": "Who are you?", "sample_tokens": 32},
        },
    )
