"""The stages in which a policy learns from rewards of its own answers, "ppo" and "grpo", but for what is their own."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.data.conversations import Prompt
from gptjax.data.pipeline import ExampleArrays
from gptjax.data.tokenizers import Tokenizer
from gptjax.stages.chat_data import ChatData, fitting, open_chat, prompts_of
from gptjax.stages.rl.completions import Answers, AnswerWriter, Arrays, EncodedPrompt
from gptjax.stages.rl.reward_functions import open_reward
from gptjax.stages.rl.rollouts import Rollouts
from gptjax.training.intervals import in_tokens
from gptjax.training.objective import Objective
from gptjax.training.plots import plot_reward
from gptjax.training.stage import Stage

SHOWN_METRICS = ("reward", "kl", "entropy", "response_tokens", "ended")  # of held-out prompts


def build_rl(
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer | None,
    define: Callable[[Config], Objective],
    learn: Callable[[Config, Answers], tuple[Arrays, dict[str, float]]],
    text: Callable[[ChatData[Prompt]], Callable[[int, int], ExampleArrays] | None] | None = None,
) -> Stage:
    """The stage on `mesh`.

    Args:
      tokenizer: of the run that resumes; None: that of the weights to start from.
      define: complete config -> parameters and loss.
      learn: the complete config, and answers -> as of `Rollouts`.
      text: as of `Rollouts`, once the data is known.

    Raises:
      UserError: as of `open_chat` and `open_reward`; a prompt that leaves no room for an answer.
    """
    data = open_chat(config, mesh, tokenizer, prompts_of)
    reward = open_reward(data.config.rl.reward, mesh, [*data.train, *data.validation])
    train, validation = (_encode(data, prompts) for prompts in (data.train, data.validation))
    writer = AnswerWriter(
        data.config, mesh, data.tokenizer, reward, [*train, *validation], data.chat_format.end_of_turn
    )
    rollouts = Rollouts(
        data.config,
        mesh,
        writer,
        train,
        lambda answers: learn(data.config, answers),
        None if text is None else text(data),
    )
    config = in_tokens(data.config, len(train) * config.rl.inner_epochs * rollouts.tokens_per_prompt)
    return Stage(
        objective=define(config),
        tokenizer=data.tokenizer,
        total_tokens=_total_tokens(config, len(train), rollouts.tokens_per_prompt),
        batches=rollouts.batches,
        evaluate=_evaluate(config, writer, validation),
        sample=None,
        conclude=_conclude,
    )


def held_out_prompts(config: Config) -> list[Prompt]:
    """The held-out prompts that have a reference."""
    return [prompt for prompt in prompts_of(config)[1] if prompt.reference is not None]


def _encode(data: ChatData[Prompt], prompts: list[Prompt]) -> list[EncodedPrompt]:
    rl = data.config.rl
    room = rl.prompt_tokens or data.config.model.context_length - rl.response_tokens

    def encode(prompt: Prompt) -> EncodedPrompt:
        tokens = data.chat_format.encode_prompt(prompt.messages, room, place=prompt.place)
        return EncodedPrompt(prompt, tokens)

    return fitting(data.config, prompts, encode)


def _total_tokens(config: Config, num_prompts: int, tokens_per_prompt: int) -> int:
    """To train on: whole iterations."""
    rl, batch = config.rl, config.batch
    iteration = rl.prompts_per_iteration * rl.inner_epochs * tokens_per_prompt
    wanted = batch.total_tokens or (batch.epochs or 0) * num_prompts * rl.inner_epochs * tokens_per_prompt
    return math.ceil(wanted / iteration) * iteration


def _evaluate(
    config: Config, writer: AnswerWriter, prompts: Sequence[EncodedPrompt]
) -> Callable[[Any], dict[str, float]]:
    """All parameters -> what is told of an answer to each held-out prompt, always drawn by the same seeds."""
    if config.evaluation.max_tokens is not None:
        prompts = prompts[: max(1, config.evaluation.max_tokens // writer.row_length)]
    seeds = np.random.default_rng([config.seed % 2**64, 1]).integers(2**32, size=len(prompts)).tolist()

    def evaluate(params: Any) -> dict[str, float]:
        summary = writer.write(params, prompts, 1, seeds).summary()
        return {name: summary[name] for name in SHOWN_METRICS}

    return evaluate


def _conclude(params: Any, step: int, workdir: Path) -> str:
    return f"reward against KL: {plot_reward(workdir)}" if jax.process_index() == 0 else ""
