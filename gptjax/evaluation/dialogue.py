"""What a model's answers to conversations are worth beside the answers that are there.

The numbers: bleu (of the corpus), rouge1, rouge2, rougeL (F1, mean over the answers), distinct1 and distinct2 of the
answers, perplexity and nats_per_token of the reference answers given what comes before them (the end of the turn is
one of their tokens), answer_tokens and reference_tokens (mean lengths without it), ended (the share of answers that
came to an end within max_new_tokens) and, with a reward model, win_rate: the share of prompts whose answer scores above
the reference, ties half.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from gptjax.config import Config, UserError
from gptjax.data import conversations
from gptjax.data.conversations import Message, Prompt
from gptjax.data.templates import ChatFormat, TooLongError
from gptjax.evaluation.example_records import file_name, key, resumably, score_resumably
from gptjax.evaluation.scoring import Request, Score, Scorer
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.metrics.measurement import Measurement, exponential, mean, ratio
from gptjax.metrics.text import ROUGES, corpus_bleu, distinct, rouge
from gptjax.stages.trained_model import TrainedModel

# Conversations up to a user's message, each with an answer -> how good each answer is, float (N,).
RewardScore = Callable[[Sequence[tuple[Sequence[Message], str]]], npt.NDArray[Any]]


class Answer(NamedTuple):
    """What the model says: its text, how many tokens, and whether it came to an end by itself."""

    text: str
    num_tokens: int
    ended: bool


@dataclasses.dataclass(frozen=True)
class DialogueTask:
    """Prompts to answer, ready for the model.

    Attributes:
      prompts: those that fit; each has a reference.
      inputs: int32 [N] of each, up to where the answer begins, with room for max_new_tokens.
      requests: of each, that score the reference.
      max_new_tokens: of an answer.
      end_of_turn: the token that ends an answer.
      settings: what the numbers depend on besides the model, for the report.
    """

    prompts: list[Prompt]
    inputs: list[npt.NDArray[np.int32]]
    requests: list[Request]
    max_new_tokens: int
    end_of_turn: int
    settings: dict[str, Any]

    def batches(self, size: int) -> list[list[int]]:
        """The prompts by number, the longest first, so that a lack of memory shows at once."""
        order = sorted(range(len(self.inputs)), key=lambda i: -len(self.inputs[i]))
        return [order[i : i + size] for i in range(0, len(order), size)]

    def answers(self, engine: Engine, indices: Sequence[int]) -> list[Answer]:
        """The likeliest answers, token by token, to some of the prompts."""
        completions = engine.generate(
            [self.inputs[i] for i in indices],
            self.max_new_tokens,
            Sampling(temperature=0),
            end_tokens=(self.end_of_turn,),
            separate_text=True,
        )
        return [Answer(c.text, len(c.tokens), c.finish_reason != "length") for c in completions]

    def metrics(
        self, scores: Sequence[Score], answers: Sequence[Answer], rewards: "Rewards | None" = None
    ) -> tuple[dict[str, Measurement], str]:
        """The numbers above, with standard errors over prompts, and sacrebleu's signature of its own.

        Args:
          scores: of the requests.
        """
        n, texts = len(self.prompts), [answer.text for answer in answers]
        rouges = [rouge(text, reference) for text, reference in zip(texts, self.references, strict=True)]
        per_token = ratio([-score.logprob for score in scores], [score.num_tokens for score in scores])
        bleu, signature = corpus_bleu(texts, self.references)
        found = {
            "bleu": Measurement(bleu, None, n),
            **{name: mean([of_pair[name] for of_pair in rouges]) for name in ROUGES},
            "distinct1": Measurement(distinct(texts, 1), None, n),
            "distinct2": Measurement(distinct(texts, 2), None, n),
            "perplexity": exponential(per_token),
            "nats_per_token": per_token,
            "answer_tokens": mean([answer.num_tokens for answer in answers]),
            "reference_tokens": mean([request.scored - 1 for request in self.requests]),
            "ended": mean([float(answer.ended) for answer in answers]),
        }
        if rewards is not None:
            found["win_rate"] = mean(rewards.wins.tolist())
        return found, signature

    @property
    def references(self) -> list[str]:
        return [prompt.reference or "" for prompt in self.prompts]


class Rewards(NamedTuple):
    """What a reward model says of the answers and of the references, float64 (N,) each."""

    answers: npt.NDArray[np.float64]
    references: npt.NDArray[np.float64]

    @property
    def wins(self) -> npt.NDArray[np.float64]:
        """1 where the answer scores above the reference, 0 below, half for the same, as for the very same text."""
        return (np.sign(self.answers - self.references) + 1) / 2


def reward(score: RewardScore, prompts: Sequence[Prompt], answers: Sequence[Answer]) -> Rewards:
    """Both of each prompt, scored together: how they are put into batches cannot favour one."""
    pairs = [(prompt.messages, answer.text) for prompt, answer in zip(prompts, answers, strict=True)]
    pairs += [(prompt.messages, prompt.reference or "") for prompt in prompts]
    scores = np.asarray(score(pairs), np.float64)
    return Rewards(*np.split(scores, 2))


def read_prompts(source: str | None, config: Config) -> list[Prompt]:
    """The prompts of a source, each with its reference answer.

    Args:
      source: a form of `conversations.read_conversations`. None: what the run held out of the sources that `config`
        names, so callers must have the user's consent to read the files of a config that may be a stranger's.
      config: that of a run of a chat stage.

    Raises:
      UserError: as of `read_conversations`.
    """
    if source is not None:
        return conversations.prompts(conversations.read_conversations(source))
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
    """Prepares prompts with references; what is too long loses its oldest turns.

    Args:
      limit: only the first so many prompts; None: all.
      max_new_tokens: None: a fourth of the context, as in chat.

    Raises:
      UserError: no prompt fits, or an answer would leave no room for any.
    """
    max_new_tokens = max(1, context_length // 4) if max_new_tokens is None else max_new_tokens
    if max_new_tokens >= context_length:
        raise UserError(f"max_new_tokens={max_new_tokens} leaves no room in a context of {context_length}: lower it")
    kept, inputs, requests, left_out = [], [], [], []
    for prompt in prompts[:limit]:
        assert prompt.reference is not None
        answer = chat_format.encode_answer(prompt.reference)
        try:
            before, asked = (
                chat_format.encode_prompt(prompt.messages, room, place=prompt.place)
                for room in (context_length + 1 - len(answer), context_length - max_new_tokens)
            )
        except TooLongError as error:
            left_out.append(error)
            continue
        kept.append(prompt)
        inputs.append(asked)
        requests.append(Request(np.concatenate([before, answer]).astype(np.int32), len(answer)))
    if not kept:
        raise UserError(f"no prompt has room beside its answer: {left_out[0]}")
    settings = {
        "prompts": len(kept),
        "prompts_available": len(prompts),
        "left_out": len(left_out),
        "max_new_tokens": max_new_tokens,
    }
    return DialogueTask(kept, inputs, requests, max_new_tokens, chat_format.end_of_turn, settings)


def evaluate_dialogue(
    task: DialogueTask,
    trained: TrainedModel,
    scorer: Scorer,
    directory: Path,
    name: str,
    batch_size: int,
    score: RewardScore | None = None,
) -> tuple[dict[str, Measurement], dict[str, Any], list[dict[str, Any]]]:
    """Answers and scores prompts, going on where it was stopped.

    Args:
      scorer: of the model in `trained`.
      directory: for what is computed.
      name: for files and progress bars.
      batch_size: prompts answered at once.
      score: of a reward model; None: no win rate.

    Returns:
      The metrics; what else there is to report; a record of each prompt and its answer.
    """
    scores = score_resumably(directory, name, scorer, trained.step, task.requests)
    engine: Engine | None = None  # a second copy of the weights, made if something is left to answer

    def answer(indices: Sequence[int]) -> list[Answer]:
        nonlocal engine
        if engine is None:
            engine = Engine(trained.model, trained.params, trained.tokenizer, trained.mesh)
        return task.answers(engine, indices)

    asked = [Request(tokens, task.max_new_tokens) for tokens in task.inputs]
    path = directory / f"{file_name(name)}-answers-{key(scorer, trained.step, asked)}.jsonl"
    answers = resumably(path, f"{name} answers", task.batches(batch_size), answer, Answer)
    rewards = None if score is None else reward(score, task.prompts, answers)
    metrics, signature = task.metrics(scores, answers, rewards)
    records = []
    for number, (prompt, said) in enumerate(zip(task.prompts, answers, strict=True)):
        record = {
            "place": prompt.place,
            "messages": [vars(message) for message in prompt.messages],
            "reference": prompt.reference,
            "answer": said.text,
            "ended": said.ended,
        }
        if rewards is not None:
            record |= {"reward": rewards.answers[number], "reference_reward": rewards.references[number]}
        records.append(record)
    return metrics, {"bleu_signature": signature}, records
