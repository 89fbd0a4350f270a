"""Evaluation of a chat model's completions of conversations against reference completions.

Metrics:
  bleu                      corpus BLEU of the completions
  rouge1, rouge2, rougeL    F1, mean over the completions
  distinct1, distinct2      of the completions
  perplexity, nats_per_token
                            of the reference completions given their prompts; the end-of-turn token counts
  answer_tokens, reference_tokens
                            mean lengths of completions and references, without the end-of-turn token
  ended                     share of completions that ended within max_new_tokens
  win_rate                  with a reward model: share of prompts whose completion has a higher reward than the
                            reference; ties count 1/2, and a truncated completion counts as a loss

A truncated completion, cut off at max_new_tokens, counts as a loss whatever its reward; its reward is read at its last
token, without an end-of-turn token, which the model did not write. This corresponds to the missing-EOS penalty of RLHF
implementations (`missing_eos_penalty` in TRL's PPO). As in AlpacaEval, all prompts count:
excluding truncated completions would favour models that fail on the prompts with long completions. `ended` gives the
share that is not truncated; where it is low, increase max_new_tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptjax.config import Config, UserError
from gptjax.data import conversations, harmony_forms
from gptjax.data.conversations import Message, Prompt
from gptjax.data.templates import ChatFormat, TooLongError
from gptjax.evaluation.example_records import complete_resumably, file_name, key, score_resumably
from gptjax.evaluation.scoring import Scorer, ScoringRequest, ScoringResult
from gptjax.evaluation.tasks import identity
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.metrics.measurement import Measurement, exponential, mean, ratio
from gptjax.metrics.resampling import Sample
from gptjax.metrics.text import ROUGES, bleu_terms, corpus_bleu, distinct, rouge
from gptjax.stages.trained_model import TrainedModel

# (pairs of a conversation that ends with a user's message and a completion, whether each completion ended) -> rewards
# of the completions, float (N,).
RewardScore = Callable[[Sequence[tuple[Sequence[Message], str]], Sequence[bool]], npt.NDArray[Any]]


class DialogueCompletion(NamedTuple):
    """A completion: its text, its number of tokens, and whether it ended (False: truncated at max_new_tokens)."""

    text: str
    num_tokens: int
    ended: bool


@dataclasses.dataclass(frozen=True)
class DialogueTask:
    """Encoded prompts with reference completions.

    Attributes:
      prompts: the prompts that fit into the context; each has a reference.
      inputs: int32 (T,) of each prompt, up to the start of the completion, with room for max_new_tokens.
      requests: requests that score the references.
      max_new_tokens: maximum length of a completion in tokens.
      chat_format: format of the prompts and completions.
      settings: what the metrics depend on other than the model, for the report.
    """

    prompts: list[Prompt]
    inputs: list[npt.NDArray[np.int32]]
    requests: list[ScoringRequest]
    max_new_tokens: int
    chat_format: ChatFormat
    settings: dict[str, Any]

    @property
    def identities(self) -> list[str]:
        """A hash of each prompt and its reference."""
        return [identity((prompt.messages, prompt.reference)) for prompt in self.prompts]

    def batches(self, size: int) -> list[list[int]]:
        """Returns batches of prompt indices, the longest prompts first, so that out-of-memory errors occur at once."""
        order = sorted(range(len(self.inputs)), key=lambda i: -len(self.inputs[i]))
        return [order[i : i + size] for i in range(0, len(order), size)]

    def complete(self, engine: Engine, indices: Sequence[int]) -> list[DialogueCompletion]:
        """Generates greedy completions of the prompts with these indices."""
        completions = engine.generate(
            [self.inputs[i] for i in indices],
            self.max_new_tokens,
            Sampling(temperature=0),
            end_tokens=self.chat_format.end_tokens,
            separate_text=True,
        )
        return [
            DialogueCompletion(self.chat_format.decode(c.tokens), len(c.tokens), c.finish_reason != "length")
            for c in completions
        ]

    def metrics(
        self,
        scores: Sequence[ScoringResult],
        completions: Sequence[DialogueCompletion],
        rewards: "Rewards | None" = None,
    ) -> tuple[dict[str, Measurement], str]:
        """Computes the metrics above, with standard errors over prompts, and sacrebleu's signature of BLEU.

        Args:
          scores: scores of `requests`.
          completions: completions of `prompts`.
          rewards: rewards of both; None: no win rate.
        """
        n, texts = len(self.prompts), [completion.text for completion in completions]
        rouges = [rouge(text, reference) for text, reference in zip(texts, self.references, strict=True)]
        per_token = ratio([-score.logprob for score in scores], [score.num_tokens for score in scores])
        bleu, signature = corpus_bleu(texts, self.references)
        found = {
            "bleu": Measurement(bleu, None, n, Sample((bleu_terms(texts, self.references),), form="bleu")),
            **{name: mean([of_pair[name] for of_pair in rouges]) for name in ROUGES},
            "distinct1": Measurement(distinct(texts, 1), None, n),
            "distinct2": Measurement(distinct(texts, 2), None, n),
            "perplexity": exponential(per_token),
            "nats_per_token": per_token,
            "answer_tokens": mean([completion.num_tokens for completion in completions]),
            "reference_tokens": mean([request.scored - 1 for request in self.requests]),
            "ended": mean([float(completion.ended) for completion in completions]),
        }
        if rewards is not None:
            found["win_rate"] = mean(rewards.wins([completion.ended for completion in completions]).tolist())
        return found, signature

    @property
    def references(self) -> list[str]:
        return [prompt.reference or "" for prompt in self.prompts]


class Rewards(NamedTuple):
    """Rewards of the completions and of the references, float64 (N,) each."""

    completions: npt.NDArray[np.float64]
    references: npt.NDArray[np.float64]

    def wins(self, ended: Sequence[bool]) -> npt.NDArray[np.float64]:
        """Returns 1 for a win, 1/2 for a tie and 0 for a loss of each completion, float64 (N,).

        Args:
          ended: whether each completion ended; one that was truncated loses whatever its reward.
        """
        return np.where(ended, (np.sign(self.completions - self.references) + 1) / 2, 0.0)


def reward(score: RewardScore, prompts: Sequence[Prompt], completions: Sequence[DialogueCompletion]) -> Rewards:
    """Scores the completions and the references in one call, so that rounding in batches favours neither."""
    pairs = [(prompt.messages, completion.text) for prompt, completion in zip(prompts, completions, strict=True)]
    pairs += [(prompt.messages, prompt.reference or "") for prompt in prompts]
    ended = [completion.ended for completion in completions] + [True] * len(prompts)
    scores = np.asarray(score(pairs, ended), np.float64)
    return Rewards(*np.split(scores, 2))


def read_prompts(source: str | None, config: Config) -> list[Prompt]:
    """Reads the prompts of a source, each with its reference completion.

    Args:
      source: a source as in `conversations.read_conversations`. None: the held-out prompts of the sources named by
        `config`; as a config may be untrusted, callers need the user's consent to read the files it names.
      config: config of a run of a chat stage.

    Raises:
      UserError: as in `read_conversations`.
    """
    if source is not None:
        harmony = config.chat.template == "harmony"
        return conversations.prompts(conversations.read_conversations(source, harmony=harmony))
    from gptjax.stages.builders import HELD_OUT_PROMPTS

    return HELD_OUT_PROMPTS[config.stage](config)


def dialogue_task(
    prompts: Sequence[Prompt],
    chat_format: ChatFormat,
    context_length: int,
    *,
    limit: int | None = None,
    max_new_tokens: int | None = None,
) -> DialogueTask:
    """Encodes prompts with references; the oldest turns of prompts that are too long are dropped.

    Args:
      limit: number of prompts to use, from the first; None: all.
      max_new_tokens: maximum length of a completion; None: a fourth of the context, as in chat.

    Raises:
      UserError: no prompt fits, or `max_new_tokens` leaves no room for a prompt.
    """
    max_new_tokens = max(1, context_length // 4) if max_new_tokens is None else max_new_tokens
    if max_new_tokens >= context_length:
        raise UserError(f"max_new_tokens={max_new_tokens} leaves no room in a context of {context_length}: lower it")
    kept, inputs, requests, left_out = [], [], [], []
    for prompt in prompts[:limit]:
        assert prompt.reference is not None
        if any(message.images for message in prompt.messages):
            raise UserError(f"{prompt.place} has images, which --tasks=dialogue does not read: use --tasks=vqa")
        reference = chat_format.encode_completion(prompt.reference)
        try:
            before, asked = (
                chat_format.encode_prompt(prompt.messages, room, place=prompt.place)
                for room in (context_length + 1 - len(reference), context_length - max_new_tokens)
            )
        except TooLongError as error:
            left_out.append(error)
            continue
        kept.append(prompt)
        inputs.append(asked)
        requests.append(ScoringRequest(np.concatenate([before, reference]).astype(np.int32), len(reference)))
    if not kept:
        raise UserError(f"no prompt fits into the context together with its completion: {left_out[0]}")
    settings = {
        "prompts": len(kept),
        "prompts_available": len(prompts),
        "left_out": len(left_out),
        "max_new_tokens": max_new_tokens,
    }
    return DialogueTask(kept, inputs, requests, max_new_tokens, chat_format, settings)


def complete_prompts(
    task: DialogueTask, trained: TrainedModel, scorer: Scorer, directory: Path, name: str, batch_size: int
) -> list[DialogueCompletion]:
    """Completes prompts; a stopped evaluation resumes from its records. Arguments as of `evaluate_dialogue`."""
    asked = [ScoringRequest(tokens, task.max_new_tokens) for tokens in task.inputs]
    path = directory / f"{file_name(name)}-answers-{key(scorer, trained.step, asked)}.jsonl"
    batches = task.batches(batch_size)
    return complete_resumably(path, f"{name} completions", batches, trained, task.complete, DialogueCompletion)


def evaluate_dialogue(
    task: DialogueTask,
    trained: TrainedModel,
    scorer: Scorer,
    directory: Path,
    name: str,
    batch_size: int,
    score: RewardScore | None = None,
) -> tuple[dict[str, Measurement], dict[str, Any], list[dict[str, Any]]]:
    """Completes prompts and scores references; a stopped evaluation resumes from its records.

    Args:
      scorer: scorer of the model in `trained`.
      directory: directory of the records.
      name: name of the task, for files and progress bars.
      batch_size: prompts completed together.
      score: reward function; None: no win rate.

    Returns:
      The metrics; further entries of the report; a record of each prompt and its completion.
    """
    scores = score_resumably(directory, name, scorer, trained.step, task.requests)
    completions = complete_prompts(task, trained, scorer, directory, name, batch_size)
    rewards = None if score is None else reward(score, task.prompts, completions)
    metrics, signature = task.metrics(scores, completions, rewards)
    records = []
    for number, (prompt, completion) in enumerate(zip(task.prompts, completions, strict=True)):
        record = {
            "place": prompt.place,
            **harmony_forms.written(prompt.messages),
            "reference": prompt.reference,
            "answer": completion.text,
            "ended": completion.ended,
        }
        if rewards is not None:
            record |= {"reward": rewards.completions[number], "reference_reward": rewards.references[number]}
        records.append(record)
    return metrics, {"bleu_signature": signature}, records
