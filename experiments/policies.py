"""Policies of one start: their completions, judged by a program, and their loss on plain text.

A program that judges a completion, the gold reward, takes the place of people: it ranks the completions from which a
reward model learns (the proxy reward), and measures the policies, which have never seen it (Gao et al. 2022,
section 2).
"""

import dataclasses
import hashlib
import inspect
import json
import math
import statistics
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
from gptjax.files import write_whole
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
      golds: the gold reward of the completion of each held-out prompt, N of them.
      proxy: mean reward by the reward model that the policy was trained with.
      root_kl: square root of the KL divergence from the start, in nats of a completion.
      text: loss on held-out text, in nats per byte.
    """

    golds: list[float]
    proxy: float
    root_kl: float
    text: float

    @property
    def gold(self) -> float:
        return statistics.mean(self.golds)


Trace = list[Point]  # of a run: the start, then its checkpoints


class Judge:
    """Measures checkpoints on the same held-out prompts, sampling seeds and text.

    Measures are kept in evaluation/policy-STEP.json of a workdir, so that a stopped command resumes; another judge does
    not read them.

    Args:
      start: workdir of the model that the policies start from.
      text: source of plain text.
      longest: most tokens of a completion.
    """

    def __init__(self, start: Path, gold: Gold, prompts: Sequence[Prompt], text: str, longest: int) -> None:
        self._start, self._gold, self._prompts, self._longest = load_model(start), gold, prompts, longest
        model, documents = self._start.model, open_source(text).documents()
        context = model.config.context_length
        self._text = perplexity_task(documents, self._start.tokenizer, context, stride=context)
        parts = [inspect.getsource(inspect.getmodule(gold) or gold), prompts, self._text.identities, longest]
        self._identity = hashlib.sha256(repr(parts).encode()).hexdigest()

    def traces(self, sweep: Path, runs: Mapping[int, Run], rewards: str, every: int | None) -> dict[int, Trace]:
        """Measures the runs of a method, by seed.

        Args:
          rewards: workdir of the reward model of each, with {seed}.
          every: measures one of so many checkpoints that a run has kept, the last one included; None: the last one.
        """
        found = {}
        for seed, run in sorted(runs.items()):
            workdir = sweep / run.name
            steps = sorted(int(directory.name) for directory in step_directories(workdir / "checkpoints"))
            chosen = [0, *steps[-1 :: -(every or len(steps))][::-1]]
            found[seed] = [self._kept(workdir, step, Path(rewards.format(seed=seed))) for step in chosen]
        return found

    def _kept(self, workdir: Path, step: int, rewards: Path) -> Point:
        """The measures of a checkpoint; step 0: of the start."""
        path = workdir / "evaluation" / f"policy-{step}.json"
        if path.exists() and (content := json.loads(path.read_text()))["judge"] == self._identity:
            return Point(**content["point"])
        reward_model = load_reward_model(rewards, self._start.mesh, BATCH)
        point = self._point(load_model(workdir, step=step) if step else self._start, reward_model)
        path.parent.mkdir(exist_ok=True)
        write_whole(path, json.dumps({"judge": self._identity, "point": dataclasses.asdict(point)}))
        return point

    def _point(self, policy: TrainedModel, reward_model: RewardScorer) -> Point:
        completed = complete(policy, self._prompts, self._longest)
        kl = float(np.mean(completed.logprobs(policy) - completed.logprobs(self._start)))
        scores = Scorer(policy.model, policy.params, policy.mesh, BATCH).scores(self._text.requests)
        return Point(
            golds=completed.golds(self._gold).tolist(),
            proxy=float(completed.proxies(reward_model).mean()),
            root_kl=math.sqrt(max(0.0, kl)),
            text=self._text.metrics(scores)["bits_per_byte"].value * math.log(2),
        )


def curve(traces: Mapping[int, Trace], x: str, y: str) -> list[tuple[float, list[float]]]:
    """y of each checkpoint by seed, at the mean of x over the seeds; both are names of measures of `Point`."""
    checkpoints = zip(*traces.values(), strict=True)
    return [(statistics.mean(getattr(p, x) for p in each), [getattr(p, y) for p in each]) for each in checkpoints]


def win_rate(trace: Trace) -> float:
    """Share of the prompts where the last checkpoint has a higher gold reward than the start; ties count 1/2."""
    return float(np.mean((np.sign(np.subtract(trace[-1].golds, trace[0].golds)) + 1) / 2))


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

    Half of the prompts choose the checkpoint with the highest gold reward, and the others measure what is lost, so that
    the loss is not biased upwards by the choice.

    Returns:
      The square root of the KL divergence at that checkpoint; what the gold reward loses from there to the last one,
      and what the proxy reward gains.
    """
    best, last = max(trace, key=lambda point: statistics.mean(point.golds[::2])), trace[-1]
    return best.root_kl, float(np.mean(np.subtract(best.golds, last.golds)[1::2])), last.proxy - best.proxy
