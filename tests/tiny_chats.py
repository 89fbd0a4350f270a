"""A few conversations and rankings, and configs of short runs of the chat stages."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from gptjax import config as c
from tests.tiny_tasks import CONTEXT, MODEL, save_pretrained

STAGES_OF_CHAT = ("sft", "reward", "dpo")
BATCH = 4
# The byte tokenizer's 257 tokens and 2 special tokens, rounded up to divide over a tensor axis. One layer: decoding
# unrolls the layers, and several devices compile for long.
DIVISIBLE = {"vocab_size": 260, "num_layers": 1}


def write_conversations(path: Path, count: int) -> str:
    lines = []
    for i in range(count):
        turns = [{"role": "user", "content": f"q{i}"}, {"role": "assistant", "content": "ab"[i % 2] * (1 + i % 3)}]
        lines.append(json.dumps({"messages": turns}))
    path.write_text("\n".join(lines) + "\n")
    return f"jsonl:{path}"


def write_rankings(path: Path, count: int) -> str:
    """Rankings of two or three completions: the more a's, the better."""
    lines = [json.dumps({"prompt": f"q{i}", "ranking": ["aa", "a", "b"][: 2 + i % 2]}) for i in range(count)]
    path.write_text("\n".join(lines) + "\n")
    return f"jsonl:{path}"


def save_divisible(workdir: Path) -> Path:
    """Saves weights to start from that divide over a tensor axis, here and with `DIVISIBLE`; returns the workdir."""
    return save_pretrained(workdir, settings=dataclasses.replace(MODEL, vocab_size=258, num_layers=1))


def save_sft(workdir: Path, directory: Path) -> Path:
    """Saves random weights as those of a run of stage sft, with its conversations in `directory`; returns the workdir.

    No run is needed for a test that only reads such a model.
    """
    config = config_of("sft", directory, None)
    save_pretrained(workdir, settings=dataclasses.replace(config.model, vocab_size=259))
    (workdir / "config.json").write_text(c.to_json(config))
    return workdir


def low_characters(messages: list[dict], completion: str, reference: str | None) -> float:
    """A reward that can be learned in a few steps: an untrained model writes a third of such characters."""
    return float(sum(character < "a" for character in completion))


def rl_config(stage: str, directory: Path, sft: Path, reward: Path | None = None) -> c.Config:
    """The config of a run of stage ppo or grpo: 3 iterations of 8 prompts, 2 steps in each.

    Args:
      reward: the workdir of a run of stage reward; None: the reward is `low_characters`.
    """
    config = config_of(stage, directory, sft)
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, source=write_conversations(directory / f"{stage}_prompts.jsonl", 24)),
        rl=c.RLConfig(
            reward="python:tests.tiny_chats.low_characters" if reward is None else f"model:{reward}",
            prompts_per_iteration=2 * BATCH,
            responses_per_prompt=2 if stage == "grpo" else 1,
            response_tokens=4,
            generate_batch=8,
            batching="static",  # compiles fewer programs
        ),
        ppo=c.PPOConfig(value_init="policy" if reward is None else "reward", value_lr=1e-2)
        if stage == "ppo"
        else c.PPOConfig(),
        batch=c.BatchConfig(epochs=1.0, tokens_per_batch=BATCH * CONTEXT),
        optimizer=c.OptimizerConfig(peak_lr=1e-2, schedule="constant", weight_decay=0.0),
        evaluation=c.EvaluationConfig(metric="reward"),
    )


def config_of(stage: Any, directory: Path, pretrained: Path | None) -> c.Config:
    write = write_conversations if stage == "sft" else write_rankings
    return c.Config(
        stage=stage,
        init_from=None if pretrained is None else str(pretrained),
        model=MODEL,
        data=c.DataConfig(
            source=write(directory / f"{stage}.jsonl", 24),
            validation_source=write(directory / f"{stage}_validation.jsonl", 5),
            tokenizer="bytes",
            cache_dir=str(directory / "cache"),
        ),
        chat=c.ChatConfig(
            template="custom",
            system_format="{content}",
            user_format="{content}<|a|>",
            assistant_format="{content}<|end|>",
        ),
        batch=c.BatchConfig(epochs=1.0, tokens_per_batch=BATCH * CONTEXT),
        optimizer=c.OptimizerConfig(peak_lr=1e-2, schedule="constant"),
        evaluation=c.EvaluationConfig(metric="loss", sample_prompt="q1", sample_tokens=4),
        logging=c.LoggingConfig(every_steps=1, tensorboard=False),
    )
