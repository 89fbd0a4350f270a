"""Policies of one start: their completions, judged by a program, and their loss on plain text.

A program that judges a completion, the gold reward, takes the place of people: it ranks the completions that a reward model
learns from (the proxy reward), and measures the policies, which have never seen it (Gao et al. 2022, section 2).
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from gptjax.checkpoint.stored_checkpoint import step_directories
from gptjax.comparison.runs import Run
from gptjax.data.conversations import Prompt
from gptjax.data.sources import open_source
from gptjax.data.templates import chat_format
from gptjax.evaluation.perplexity import perplexity_task
from gptjax.evaluation.scoring import Scorer, ScoringRequest
from gptjax.inference.engine import Engine
from gptjax.stages.preference.reward_scorer import RewardScorer, load_reward_model
from gptjax.stages.trained_model import TrainedModel, load_model

BATCH = 128  # completions that are sampled or scored at once

Gold = Callable[[str, str], float]  # (prompt, completion) -> reward


def write_lines(path: Path, records: Iterable[Mapping[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


@dataclasses.dataclass(frozen=True)
class Completed:
    """A completion of each of N prompts.

    Attributes:
      tokens: of the prompts and the completions, each with the number of tokens of the completion.
      ended: whether each ended by itself.
    """

    prompts: Sequence[Prompt]
    texts: list[str]
    tokens: list[ScoringRequest]
    ended: list[bool]

    def golds(self, gold: Gold) -> npt.NDArray[np.float64]:
        """The gold rewards, float64 (N,)."""
        return np.array([gold(p.messages[-1].content, text) for p, text in zip(self.prompts, self.texts, strict=True)])

    def proxies(self, reward_model: RewardScorer) -> npt.NDArray[np.float64]:
        """The rewards by a reward model, float64 (N,)."""
        messages = [prompt.messages for prompt in self.prompts]
        return reward_model(list(zip(messages, self.texts, strict=True)), self.ended)

    def logprobs(self, model: TrainedModel) -> npt.NDArray[np.float64]:
        """The log-probability of each completion, in nats, float64 (N,)."""
        scorer = Scorer(model.model, model.params, model.mesh, BATCH)
        return np.array([score.logprob for score in scorer.scores(self.tokens)])


def complete(policy: TrainedModel, prompts: Sequence[Prompt], longest: int) -> Completed:
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
    written = [np.array([*c.tokens, *([] if c.end is None else [c.end])], np.int32) for c in found]
    tokens = [ScoringRequest(np.concatenate([a, b]), len(b)) for a, b in zip(given, written, strict=True)]
    texts, ended = [form.decode(c.tokens) for c in found], [c.finish_reason != "length" for c in found]
    return Completed(prompts, texts, tokens, ended)


def rankings(policy: TrainedModel, prompts: Sequence[Prompt], gold: Gold, samples: int, longest: int) -> list[Any]:
    """Samples several completions of each prompt and ranks them by the gold reward, as labellers do.

    Returns:
      Records of `conversations.read_rankings`; of completions with the same reward the last one is kept.
    """
    completed = complete(policy, [prompt for prompt in prompts for _ in range(samples)], longest)
    rewards, records = completed.golds(gold), []
    for place, prompt in zip(range(0, len(rewards), samples), prompts, strict=True):
        each = range(place, place + samples)
        best = {rewards[i]: completed.texts[i] for i in each if completed.texts[i]}
        if len(best) > 1:
            ranking = [best[reward] for reward in sorted(best, reverse=True)]
            records.append({"prompt": prompt.messages[-1].content, "ranking": ranking})
    return records


@dataclasses.dataclass(frozen=True)
class Point:
    """Measures of a checkpoint.

    Attributes:
      golds: the gold reward of the completion of each held-out prompt.
      proxy: mean reward by the reward model that the policy was trained with.
      root_kl: square root of the KL divergence from the start, in nats of a completion.
      text: loss on held-out text, in nats per byte.
    """

    golds: npt.NDArray[np.float64]
    proxy: float
    root_kl: float
    text: float

    @property
    def gold(self) -> float:
        return float(self.golds.mean())


Trace = list[Point]  # of a run: the start, then its checkpoints


class Judge:
    """Measures checkpoints on the same held-out prompts, sampling seeds and text.

    Args:
      start: workdir of the model that the policies start from.
      text: source of plain text.
      longest: most tokens of a completion.
    """

    def __init__(self, start: Path, gold: Gold, prompts: Sequence[Prompt], text: str, longest: int) -> None:
        self._start, self._gold, self._prompts, self._longest = load_model(start), gold, prompts, longest
        model, documents = self._start.model, open_source(text).documents()
        self._text = perplexity_task(documents, self._start.tokenizer, model.config.context_length)

    def traces(self, sweep: Path, runs: Mapping[int, Run], rewards: str, *, all_checkpoints: bool) -> dict[int, Trace]:
        """Measures the runs of a method, by seed.

        Args:
          rewards: workdir of the reward model of each, with {seed}.
          all_checkpoints: measures all that a run has kept; otherwise its last one.
        """
        found = {}
        for seed, run in sorted(runs.items()):
            workdir = sweep / run.name
            reward_model = load_reward_model(Path(rewards.format(seed=seed)), self._start.mesh, BATCH)
            steps = sorted(int(directory.name) for directory in step_directories(workdir / "checkpoints"))
            models = [self._start, *(load_model(workdir, step=s) for s in (steps if all_checkpoints else steps[-1:]))]
            found[seed] = [self._point(model, reward_model) for model in models]
        return found

    def _point(self, policy: TrainedModel, reward_model: RewardScorer) -> Point:
        completed = complete(policy, self._prompts, self._longest)
        kl = float(np.mean(completed.logprobs(policy) - completed.logprobs(self._start)))
        scores = Scorer(policy.model, policy.params, policy.mesh, BATCH).scores(self._text.requests)
        return Point(
            golds=completed.golds(self._gold),
            proxy=float(completed.proxies(reward_model).mean()),
            root_kl=math.sqrt(max(0.0, kl)),
            text=self._text.metrics(scores)["bits_per_byte"].value * math.log(2),
        )


def win_rate(trace: Trace) -> float:
    """Share of the prompts where the last checkpoint has a higher gold reward than the start; ties count 1/2."""
    return float(np.mean((np.sign(trace[-1].golds - trace[0].golds) + 1) / 2))


def text_at_equal_proxy(first: Trace, second: Trace) -> float:
    """Loss on text of the first less that of the second, at the highest proxy reward that both have reached.

    Between checkpoints it is linear, where the proxy reward is first reached.
    """
    proxy = min(max(point.proxy for point in trace) for trace in (first, second))

    def text(trace: Trace) -> float:
        reached = np.maximum.accumulate([point.proxy for point in trace])
        return float(np.interp(proxy, reached, [point.text for point in trace]))

    return text(first) - text(second)


def over_optimisation(trace: Trace) -> tuple[float, float, float]:
    """Where over-optimisation begins, and what follows (Gao et al. 2022, figure 1).

    Half of the prompts choose the checkpoint with the highest gold reward, and the others measure what is lost, so that the
    loss is not biased upwards by the choice.

    Returns:
      The square root of the KL divergence at that checkpoint; what the gold reward loses from there to the last one, and
      what the proxy reward gains.
    """
    best, last = max(trace, key=lambda point: point.golds[::2].mean()), trace[-1]
    return best.root_kl, float((best.golds - last.golds)[1::2].mean()), last.proxy - best.proxy
