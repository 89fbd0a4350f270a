"""Measures policies: completions of held-out prompts, their KL divergence from the start, and the loss on plain text."""

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from gptjax.checkpoint.stored_checkpoint import step_directories
from gptjax.data.conversations import Prompt
from gptjax.data.sources import open_source
from gptjax.data.templates import chat_format
from gptjax.evaluation.perplexity import perplexity_task
from gptjax.evaluation.scoring import Scorer, ScoringRequest
from gptjax.inference.engine import Engine
from gptjax.stages.preference.reward_scorer import RewardScorer
from gptjax.stages.trained_model import TrainedModel, load_model

BATCH = 128  # completions that are sampled or scored at once


@dataclasses.dataclass(frozen=True)
class Completed:
    """A completion of each of N prompts.

    Attributes:
      ended: whether each ended by itself, bool (N,).
      kl: log-probability under the policy less that under the reference, nats of a completion, float64 (N,).
    """

    prompts: Sequence[Prompt]
    texts: list[str]
    ended: npt.NDArray[np.bool_]
    kl: npt.NDArray[np.float64]

    def rewards(self, scorer: RewardScorer) -> npt.NDArray[np.float64]:
        """Rewards by a reward model, float64 (N,)."""
        messages = [prompt.messages for prompt in self.prompts]
        return scorer(list(zip(messages, self.texts, strict=True)), self.ended.tolist())


def checkpoints(workdir: Path) -> list[int]:
    """The steps of the checkpoints that a run kept, in order."""
    return sorted(int(directory.name) for directory in step_directories(workdir / "checkpoints"))


def policy_of(workdir: Path, step: int | None = None) -> TrainedModel:
    """The model of a chat stage; step: None is the newest checkpoint."""
    return load_model(workdir, step=step)


def complete(policy: TrainedModel, reference: TrainedModel, prompts: Sequence[Prompt], longest: int) -> Completed:
    """Samples a completion of each prompt at temperature 1, with sampling seeds 0, 1, ...

    Args:
      longest: most tokens of a completion.
    """
    form = chat_format(policy.config.chat, policy.tokenizer, policy.config.model.vision)
    room = policy.model.config.context_length - longest
    given = [form.encode_prompt(prompt.messages, room) for prompt in prompts]
    engine = Engine(policy.model, policy.params, policy.tokenizer, policy.mesh)
    found = []
    for first in range(0, len(given), BATCH):
        chunk = given[first : first + BATCH]
        found += engine.generate(chunk, longest, seeds=first, end_tokens=form.end_tokens, separate_text=True)
    written = [[*c.tokens, *([] if c.end is None else [c.end])] for c in found]
    requests = [
        ScoringRequest(np.concatenate([tokens, np.array(new, np.int32)]), len(new))
        for tokens, new in zip(given, written, strict=True)
    ]
    of_policy, of_reference = (_logprobs(model, requests) for model in (policy, reference))
    ended = np.array([c.finish_reason != "length" for c in found])
    return Completed(prompts, [form.decode(c.tokens) for c in found], ended, of_policy - of_reference)


def _logprobs(model: TrainedModel, requests: Sequence[ScoringRequest]) -> npt.NDArray[np.float64]:
    scorer = Scorer(model.model, model.params, model.mesh, BATCH)
    return np.array([score.logprob for score in scorer.scores(requests)])


def text_loss(model: TrainedModel, source: str) -> float:
    """The loss on the text of a source, in nats per byte."""
    task = perplexity_task(open_source(source).documents(), model.tokenizer, model.model.config.context_length)
    scores = Scorer(model.model, model.params, model.mesh, BATCH).scores(task.requests)
    return task.metrics(scores)["bits_per_byte"].value * math.log(2)
