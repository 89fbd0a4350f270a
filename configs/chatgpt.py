"""From a language model to a chat model: InstructGPT's three steps, the published recipe behind ChatGPT (Ouyang et al.
2022, "Training language models to follow instructions with human feedback"), and later alternatives, DPO and GRPO.

    python -m gptjax.main --config=configs/chatgpt.py:stage=sft,init_from=runs/demo,runlocal --workdir=runs/sft
    python -m gptjax.main --config=configs/chatgpt.py:stage=reward,init_from=runs/sft,runlocal --workdir=runs/reward
    python -m gptjax.main --config=configs/chatgpt.py:stage=ppo,init_from=runs/sft,reward=model:runs/reward,runlocal \
        --workdir=runs/chatgpt
    python -m gptjax.main --config=configs/chatgpt.py:stage=dpo,init_from=runs/sft,runlocal --workdir=runs/dpo
    python -m gptjax.main --config=configs/chatgpt.py:stage=grpo,init_from=runs/sft,reward=bleu,runlocal \
        --workdir=runs/grpo
    python -m gptjax.main --config=configs/chatgpt.py:stage=sft,data=jsonl:chats.jsonl,init_from=runs/gpt3_1.3b \
        --workdir=runs/sft

Arguments: stage (sft, reward, ppo, dpo, grpo), data (a source of gptjax/data/conversations.py; default: the dialogues
of chatterbot-corpus, whose completions reward and dpo rank above random ones of other dialogues), init_from (the
workdir of the initial weights; default: train from scratch), template (chat.template, such as harmony for gpt-oss;
default: that of init_from, else chatml), reward (ppo and grpo: model:WORKDIR, bleu, rouge or python:MODULE.FUNCTION),
text (ppo: pretraining text for PPO-ptx, a source of gptjax/data/sources.py), runlocal (for two CPU cores; without
init_from a small model).
"""

import dataclasses
from typing import Any

import ml_collections

from gptjax import config as c
from gptjax.files import expand

NO_DROPOUT = {"embedding_dropout": 0.0, "attention_dropout": 0.0, "residual_dropout": 0.0}
# Fields of `chat` that decide how a conversation is written, and that stages after the first one share with it.
FORMAT = (
    *("template", "system_format", "user_format", "assistant_format"),
    *("reasoning_effort", "model_identity", "knowledge_cutoff", "current_date"),
)
AS_REFERENCE = {"matmul_dtype": "model"}  # policy and reference are computed in the same precision


def get_config(arg: str | None = None) -> ml_collections.ConfigDict:
    args = c.parse_arg(arg, stage="sft", data="", init_from="", template="", reward="", text="", runlocal=False)
    stages = {"sft": sft, "reward": reward, "ppo": ppo, "dpo": dpo, "grpo": grpo}
    stage = c.choose(stages, args["stage"], "stage")
    model, chat = c.GPTConfig(context_length=2048), c.ChatConfig()
    if args["init_from"]:
        given = c.read_config(expand(args["init_from"]))
        model = given.model
        if given.stage in LOCAL and args["template"] in ("", given.chat.template):
            chat = dataclasses.replace(chat, **{name: getattr(given.chat, name) for name in FORMAT})
    elif args["runlocal"]:
        model = c.GPTConfig(context_length=128, num_layers=4, embed_dim=192, num_heads=6, dtype="float32")
    config = c.Config(
        stage=args["stage"],
        init_from=args["init_from"] or None,
        model=model,
        data=c.DataConfig(source=args["data"] or "chatterbot", tokenizer="gpt2", validation_fraction=0.05),
        chat=dataclasses.replace(
            chat,
            template=args["template"] or chat.template,
            # The package's dialogues come without rankings.
            random_answers=3 if stage in (reward, dpo) and not args["data"] else 0,
            pretraining_source=args["text"] or None,
        ),
        rl=c.RLConfig(reward=args["reward"]),
        # Appendix C: Adam with 0.9 and 0.95, cosine to 10 % of the peak, no warm-up.
        optimizer=c.OptimizerConfig(beta2=0.95, weight_decay=0.0, floor_lr_fraction=0.1),
    )
    # The workdir of init_from may have bfloat16 parameters, which are too coarse for small updates.
    config = c.replace(config, {"model": NO_DROPOUT | {"param_dtype": "float32"}})
    config = stage(config)
    return c.config_dict(runlocal(config) if args["runlocal"] else config)


def sft(config: c.Config) -> c.Config:
    """Appendix C.1: 16 epochs, batches of 32, residual dropout 0.2, the learning rate of the 1.3B and 6B models."""
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
    """Appendix C.2: one epoch, batches of 64 prompts, or of more where short ones share an element (chat.pack)."""
    return c.replace(
        config,
        {
            "batch": {"epochs": 1.0, "tokens_per_batch": 64 * config.model.context_length},
            "optimizer": {"peak_lr": 9e-6},
            "evaluation": {"metric": "accuracy", "every_epochs": 0.25},
            "checkpoint": {"every_epochs": 0.25},
        },
    )


def response_tokens(config: c.Config) -> int:
    return config.model.context_length // 4


def ppo(config: c.Config) -> c.Config:
    """Appendix C.4: 256k completions of 31k prompts, 512 an iteration, in batches of 64.

    The learning rate is not published, only its range of search, 2.55e-6 to 2.55e-5. With `text` it is PPO-ptx.
    """
    from_reward = config.rl.reward.startswith("model:")
    return c.replace(
        config,
        {
            "model": AS_REFERENCE,
            "rl": {"response_tokens": response_tokens(config), "prompts_per_iteration": 512, "kl_weight": 0.02},
            "ppo": {
                "value_init": "reward" if from_reward else "policy",
                "pretraining_weight": 27.8 if config.chat.pretraining_source else 0.0,
            },
            "batch": {"epochs": 8.0, "tokens_per_batch": 64 * config.model.context_length},
            "optimizer": {
                "peak_lr": 9e-6,
                "schedule": "constant",
                "warmup_fraction": 0.02,  # 10 of 500 iterations
                "warmup_start_fraction": 0.1,
                "ema_decay": 0.992,
            },
            "evaluation": {"metric": "reward", "every_epochs": 0.5},
            "checkpoint": {"every_epochs": 0.5},
        },
    )


def grpo(config: c.Config) -> c.Config:
    """DeepSeekMath, section 4.2: 64 completions of each of 16 prompts, one step, KL coefficient 0.04."""
    return c.replace(
        config,
        {
            "model": AS_REFERENCE,
            "rl": {
                "response_tokens": response_tokens(config),
                "prompts_per_iteration": 16,
                "responses_per_prompt": 64,
                "kl_weight": 0.04,
            },
            "batch": {"epochs": 1.0, "tokens_per_batch": 16 * config.model.context_length},
            "optimizer": {"peak_lr": 1e-6, "schedule": "constant"},
            "evaluation": {"metric": "reward", "every_epochs": 0.25},
            "checkpoint": {"every_epochs": 0.25},
        },
    )


def dpo(config: c.Config) -> c.Config:
    """Rafailov et al. 2023, appendix B: beta 0.1, batches of 64, warm-up over 150 steps, then constant.

    150 steps are 6 % of an epoch of the 161,000 dialogues of Anthropic HH. The best checkpoint is that of the lowest
    loss: the margin keeps growing when the model overfits.
    """
    return c.replace(
        config,
        {
            "model": AS_REFERENCE,
            "batch": {"epochs": 1.0, "tokens_per_batch": 64 * config.model.context_length},
            "optimizer": {"peak_lr": 1e-6, "schedule": "constant", "warmup_fraction": 0.06},
            "evaluation": {"metric": "loss", "every_epochs": 0.25},
            "checkpoint": {"every_epochs": 0.25},
        },
    )


def runlocal(config: c.Config) -> c.Config:
    """The same stages for a small model on a laptop: larger learning rates and, from scratch, a tokenizer of its own.

    The learning rates are choices. All stages hold out the same fifth of the dialogues, since a smaller share would be
    too few for a meaningful metric.
    """
    shared = {
        "data": {"tokenizer": "bpe:4096", "validation_fraction": 0.2},
        "chat": {"on_too_long": "skip"},
        "optimizer": {"schedule": "cosine", "warmup_fraction": None},
        "evaluation": {"sample_prompt": "Who are you?", "sample_tokens": 32},
    }
    return LOCAL[config.stage](c.replace(config, shared))


def local_sft(config: c.Config) -> c.Config:
    changes = {"batch": _batch(config, 16, epochs=8.0), "optimizer": {"peak_lr": 1e-3}, "model": _dropout(0.2)}
    return c.replace(config, changes)


def local_reward(config: c.Config) -> c.Config:
    changes = {
        "batch": _batch(config, 4),
        "optimizer": {"peak_lr": 1e-3},
        "model": _dropout(0.1),
        "chat": {"random_draws": 6 if config.chat.random_answers else 1},
    }
    return c.replace(config, changes)


def local_dpo(config: c.Config) -> c.Config:
    return c.replace(config, {"batch": _batch(config, 4), "optimizer": {"peak_lr": 3e-4}})


def local_ppo(config: c.Config) -> c.Config:
    config = c.replace(
        _local_policy(config),
        {"ppo": {"value_lr": 3e-4, "pretraining_rows": 1}, "optimizer": {"ema_decay": 0.95}},
    )
    if config.ppo.value_init == "policy":
        return config
    # A small reward model is soon exploited: implausible completions get the highest rewards.
    return c.replace(config, {"rl": {"kl_weight": 0.2}, "optimizer": {"peak_lr": 1e-4}, "batch": {"epochs": 2.0}})


def local_grpo(config: c.Config) -> c.Config:
    return c.replace(_local_policy(config), {"rl": {"prompts_per_iteration": 16, "responses_per_prompt": 8}})


def _local_policy(config: c.Config) -> c.Config:
    """Settings that PPO and GRPO share."""
    context = config.model.context_length
    lengths = {"prompt_tokens": 5 * context // 16, "response_tokens": 3 * context // 16}
    if config.chat.template == "harmony":  # the system message alone has about 80 tokens
        lengths = {"prompt_tokens": 3 * context // 4, "response_tokens": context // 4}
    changes = {
        "batch": _batch(config, 16, epochs=1.0),
        "rl": {
            "prompts_per_iteration": 64,
            **lengths,
        },
        "optimizer": {"peak_lr": 3e-4, "schedule": "constant"},
        "logging": {"every_steps": 4},
    }
    return c.replace(config, changes)


def _batch(config: c.Config, size: int, **lengths: float) -> dict[str, Any]:
    """A batch of `size` rows, or of `size` elements of several rows."""
    return {"tokens_per_batch": size * config.model.context_length, **lengths}


def _dropout(residual: float) -> dict[str, float]:
    """Regularisation against overfitting on few conversations."""
    return {"embedding_dropout": 0.1, "attention_dropout": 0.1, "residual_dropout": residual}


LOCAL = {"sft": local_sft, "reward": local_reward, "dpo": local_dpo, "ppo": local_ppo, "grpo": local_grpo}
