"""The sources of rewards of stages "ppo" and "grpo": `rl.reward`."""

import dataclasses
import importlib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.config import DataConfig, UserError, read_config
from gptjax.data.conversations import Message, Prompt
from gptjax.files import expand
from gptjax.inference.engine import Completion
from gptjax.metrics.text import bleu, rouge_l
from gptjax.stages.preference.reward_scorer import RewardScorer, check_prompts_fit, load_reward_model

TEXT = DataConfig()  # prompts without images
RewardFunction = Callable[[Sequence[Prompt], Sequence[Completion]], npt.NDArray[np.float64]]


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """A reward function, and where it runs.

    Attributes:
      rewards: prompts and a completion of each -> float64 (N,).
      on_host: it needs no accelerator, so it can run while the policy samples the next completions.
    """

    rewards: RewardFunction
    on_host: bool


def open_reward(spec: str, mesh: Mesh, prompts: Sequence[Prompt], data: DataConfig = TEXT) -> RewardSource:
    """Returns the source of rewards that `spec` names.

    Args:
      spec: one of the following.
        model:WORKDIR — the reward model of a run of stage "reward". The reward of a completion that was cut off at
          rl.response_tokens is read at its last token;
        bleu, rouge — sentence BLEU, or ROUGE-L, against the reference completion (`gptjax/metrics/text.py`);
        python:MODULE.FUNCTION — a function of the messages (a list of {"role": ..., "content": ...}, with "images", a
          list of paths, URLs or data: URLs, where a message has any), the completion, and the reference completion or
          None, which returns a number. If it has a parameter `finish_reason`, it gets this keyword argument:
          "end_of_turn", "end_of_text", or "length" for a completion that was cut off.
      mesh: the devices that a reward model is laid out over.
      prompts: all prompts that completions will be sampled for.
      data: where their images are.

    Raises:
      UserError: there is no such source, prompts lack a reference completion, or exceed the reward model's context.
    """
    form, _, name = spec.partition(":")
    if form == "python":
        return RewardSource(_of_function(spec, _imported(spec, name)), on_host=True)
    if form == "model":
        workdir = expand(name)
        if (stage := read_config(workdir).stage) != "reward":
            raise UserError(f"rl.reward={spec} is a run of stage {stage}: name the workdir of a run of stage reward")
        check_prompts_fit(workdir, prompts)
        return RewardSource(_ModelRewards(workdir, mesh, data), on_host=False)
    if missing := [prompt.place for prompt in prompts if prompt.reference is None]:
        raise UserError(f"{missing[0]} has no reference completion, which rl.reward={spec} needs: add one")
    metric = {"bleu": bleu, "rouge": rouge_l}[spec]

    def rewards(prompts: Sequence[Prompt], completions: Sequence[Completion]) -> npt.NDArray[np.float64]:
        pairs = zip(prompts, completions, strict=True)
        return np.array([metric(completion.text, prompt.reference or "") for prompt, completion in pairs])

    return RewardSource(rewards, on_host=True)


def _imported(spec: str, name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"rl.reward={spec}: {error}; modules are searched from the current directory") from None
    if not callable(found):
        raise UserError(f"rl.reward={spec} is not a function but {type(found).__name__}")
    return found


def _of_function(spec: str, function: Callable[..., Any]) -> RewardFunction:
    takes_finish_reason = _takes_keyword(function, "finish_reason")

    def reward(prompt: Prompt, completion: Completion) -> float:
        messages = [_message(message) for message in prompt.messages]
        keywords = {"finish_reason": completion.finish_reason} if takes_finish_reason else {}
        try:
            value = float(function(messages, completion.text, prompt.reference, **keywords))
        except Exception as error:  # a user's function may raise anything
            raise UserError(f"rl.reward={spec} failed on the completion {completion.text!r}: {error!r}") from error
        if not math.isfinite(value):
            raise UserError(
                f"rl.reward={spec} returned {value} for the completion {completion.text!r}: return a finite number"
            )
        return value

    return lambda prompts, completions: np.array([reward(p, c) for p, c in zip(prompts, completions, strict=True)])


def _message(message: Message) -> dict[str, Any]:
    images = {"images": [image.source for image in message.images]} if message.images else {}
    return {"role": message.role, "content": message.content, **images}


def _takes_keyword(function: Callable[..., Any], name: str) -> bool:
    """Whether a function accepts a keyword argument; False for one without a signature, such as some built-in ones."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False
    by_keyword = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = name in parameters and parameters[name].kind in by_keyword
    return named or any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())


class _ModelRewards:
    """Rewards of a reward model, which is loaded at the first call."""

    def __init__(self, workdir: Path, mesh: Mesh, data: DataConfig) -> None:
        self._workdir, self._mesh, self._data = workdir, mesh, data
        self._scorer: RewardScorer | None = None

    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> npt.NDArray[np.float64]:
        if self._scorer is None:
            self._scorer = load_reward_model(self._workdir, self._mesh, batch_size=32, data=self._data)
        pairs = [(prompt.messages, c.text) for prompt, c in zip(prompts, completions, strict=True)]
        return self._scorer(pairs, [c.finish_reason != "length" for c in completions])
