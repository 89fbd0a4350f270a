"""Training of a policy on the rewards of completions that it sampled: the part that stages "ppo" and "grpo" share."""

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
from gptjax.stages.rl.completions import Arrays, Completions, CompletionSampler, EncodedPrompt
from gptjax.stages.rl.reward_functions import open_reward
from gptjax.stages.rl.rollouts import Rollouts
from gptjax.training.intervals import in_tokens
from gptjax.training.objective import Objective
from gptjax.training.plots import plot_reward
from gptjax.training.stage import Stage, describe_data

SHOWN_METRICS = ("reward", "kl", "entropy", "response_tokens", "ended")  # of held-out prompts


def build_rl(
    config: Config,
    mesh: Mesh,
    tokenizer: Tokenizer | None,
    make_objective: Callable[[Config], Objective],
    loss_arrays: Callable[[Config, Completions], tuple[Arrays, dict[str, float]]],
    text: Callable[[ChatData[Prompt]], Callable[[int, int], ExampleArrays] | None] | None = None,
) -> Stage:
    """Builds the stage on `mesh`.

    Args:
      tokenizer: of the run that resumes; None: that of the weights to start from.
      make_objective: complete config -> parameters and loss.
      loss_arrays: from the complete config and completions to the arrays and metrics that `Rollouts` takes.
      text: from the data to the function that reads rows of pretraining text, see `Rollouts`.

    Raises:
      UserError: as in `open_chat` and `open_reward`; a prompt that leaves no room for a completion.
    """
    data = open_chat(config, mesh, tokenizer, prompts_of)
    train, validation = (encoded_prompts(data, prompts) for prompts in (data.train, data.validation))
    reward = open_reward(
        data.config.rl.reward, mesh, [prompt.prompt for prompt in (*train, *validation)], data.config.data
    )
    sampler = CompletionSampler(
        data.config, mesh, data.tokenizer, reward, [*train, *validation], data.chat_format, data.images
    )
    rollouts = Rollouts(
        data.config,
        mesh,
        sampler,
        train,
        lambda completions: loss_arrays(data.config, completions),
        None if text is None else text(data),
    )
    tokens_per_epoch = len(train) * config.rl.inner_epochs * rollouts.tokens_per_prompt
    config = in_tokens(data.config, tokens_per_epoch)
    total_tokens = _total_tokens(config, len(train), rollouts.tokens_per_prompt)
    return Stage(
        objective=make_objective(config),
        tokenizer=data.tokenizer,
        total_tokens=total_tokens,
        batches=rollouts.batches,
        evaluate=_evaluate(config, sampler, validation),
        sample=None,
        conclude=_conclude,
        description=describe_data("prompts", len(train), len(validation), tokens_per_epoch, total_tokens),
        images_per_token=sum(len(prompt.images) for prompt in train) / (len(train) * sampler.row_length),
    )


def held_out_prompts(config: Config) -> list[Prompt]:
    """Returns the held-out prompts that have a reference completion."""
    return [prompt for prompt in prompts_of(config)[1] if prompt.reference is not None]


def encoded_prompts(data: ChatData[Prompt], prompts: list[Prompt]) -> list[EncodedPrompt]:
    """Encodes prompts, each to leave room for a completion; raises UserError as `fitting`."""
    rl, room = data.config.rl, data.config.rl.prompt_tokens
    if room is None:
        room = data.config.model.context_length - rl.response_tokens

    def encode(prompt: Prompt) -> EncodedPrompt:
        encoded = data.chat_format.encode_prompt_with_images(prompt.messages, room, place=prompt.place)
        return EncodedPrompt(prompt, encoded.tokens, encoded.images)

    return fitting(data.config, prompts, encode)


def _total_tokens(config: Config, num_prompts: int, tokens_per_prompt: int) -> int:
    """Returns the length of training, rounded up to whole iterations."""
    rl, batch = config.rl, config.batch
    iteration = rl.prompts_per_iteration * rl.inner_epochs * tokens_per_prompt
    wanted = (batch.epochs or 0) * num_prompts * rl.inner_epochs * tokens_per_prompt
    if batch.total_tokens is not None:
        wanted = batch.total_tokens
    return math.ceil(wanted / iteration) * iteration


def _evaluate(
    config: Config, sampler: CompletionSampler, prompts: Sequence[EncodedPrompt]
) -> Callable[[Any], dict[str, float]]:
    """Returns (all parameters) -> metrics of one completion of each held-out prompt, with the same sampling seeds."""
    if config.evaluation.max_tokens is not None:
        prompts = prompts[: max(1, config.evaluation.max_tokens // sampler.row_length)]
    seeds = np.random.default_rng([config.seed % 2**64, 1]).integers(2**32, size=len(prompts)).tolist()

    def evaluate(params: Any) -> dict[str, float]:
        summary = sampler.sample(params, prompts, 1, seeds).summary()
        return {name: summary[name] for name in SHOWN_METRICS}

    return evaluate


def _conclude(params: Any, step: int, workdir: Path) -> str:
    """Plots the reward against the KL divergence when training ends; returns the line to print."""
    return f"reward against KL: {plot_reward(workdir)}" if jax.process_index() == 0 else ""
