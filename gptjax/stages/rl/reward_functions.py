"""Where the rewards of stages "ppo" and "grpo" come from: `rl.reward`."""

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jax.sharding import Mesh

from gptjax.config import UserError, read_config
from gptjax.data.conversations import Prompt
from gptjax.metrics.text import bleu, rouge_l
from gptjax.stages.preference.reward_scorer import RewardScorer, load_reward_model

Rewards = Callable[[Sequence[Prompt], Sequence[str]], npt.NDArray[np.float64]]


@dataclasses.dataclass(frozen=True)
class RewardSource:
    """Prompts and an answer to each -> their rewards, float64 (N,).

    Attributes:
      on_host: it needs no accelerator, so it may work while the policy writes what comes next.
    """

    rewards: Rewards
    on_host: bool


def open_reward(spec: str, mesh: Mesh, prompts: Sequence[Prompt]) -> RewardSource:
    """The source that `spec` names.

    Args:
      spec: one of the following.
        model:WORKDIR — the reward model of a run of stage "reward";
        bleu, rouge — sentence BLEU, or ROUGE-L, against the answer that is there (`gptjax/metrics/text.py`);
        python:MODULE.FUNCTION — a function of the messages, a list of {"role": ..., "content": ...}, of the answer, and
          of the answer that is there, or None; it returns a number.
      mesh: that a reward model lies on.
      prompts: all that will be answered.

    Raises:
      UserError: there is no such source, or prompts lack what it compares with.
    """
    form, _, name = spec.partition(":")
    if form == "python":
        return RewardSource(_of_function(spec, _imported(spec, name)), on_host=True)
    if form == "model":
        if (stage := read_config(Path(name).expanduser()).stage) != "reward":
            raise UserError(f"rl.reward={spec} is a run of stage {stage}: rewards are what stage reward has learned")
        return RewardSource(_OfModel(Path(name).expanduser(), mesh), on_host=False)
    if missing := [prompt.place for prompt in prompts if prompt.reference is None]:
        raise UserError(f"{missing[0]} has no answer that rl.reward={spec} could compare with: add one, or remove it")
    metric = {"bleu": bleu, "rouge": rouge_l}[spec]

    def rewards(prompts: Sequence[Prompt], answers: Sequence[str]) -> npt.NDArray[np.float64]:
        pairs = zip(prompts, answers, strict=True)
        return np.array([metric(answer, prompt.reference or "") for prompt, answer in pairs])

    return RewardSource(rewards, on_host=True)


def _imported(spec: str, name: str) -> Callable[..., Any]:
    module_name, _, function_name = name.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"rl.reward={spec}: {error}; modules are looked for from the current directory on") from None
    if not callable(found):
        raise UserError(f"rl.reward={spec} is not a function but {type(found).__name__}")
    return found


def _of_function(spec: str, function: Callable[..., Any]) -> Rewards:
    def reward(prompt: Prompt, answer: str) -> float:
        messages = [{"role": message.role, "content": message.content} for message in prompt.messages]
        try:
            value = float(function(messages, answer, prompt.reference))
        except Exception as error:  # whatever the function of a user does
            raise UserError(f"rl.reward={spec} failed on the answer {answer!r}: {error!r}") from error
        if not math.isfinite(value):
            raise UserError(f"rl.reward={spec} says {value} of the answer {answer!r}: rewards are finite numbers")
        return value

    return lambda prompts, answers: np.array([reward(p, a) for p, a in zip(prompts, answers, strict=True)])


class _OfModel:
    """Loads the model when it is first asked."""

    def __init__(self, workdir: Path, mesh: Mesh) -> None:
        self._workdir, self._mesh = workdir, mesh
        self._scorer: RewardScorer | None = None

    def __call__(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> npt.NDArray[np.float64]:
        if self._scorer is None:
            self._scorer = load_reward_model(self._workdir, self._mesh, batch_size=32)
        return self._scorer([(p.messages, a) for p, a in zip(prompts, answers, strict=True)])
