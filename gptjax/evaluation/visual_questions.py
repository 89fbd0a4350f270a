"""Evaluation on questions about images: the model's answers, greedily decoded, against reference answers.

A record of --source has its images (`image`, `images` or `file_name`), `question`, and `answer` or a list of `answers`;
or `choices` as well, which are written below the question by letters, as MMMU does (Yue et al. 2023). It may also be a
conversation, whose first question counts. Metrics are means over the questions:
  exact_match        equal to a reference, up to case, punctuation, articles and number words
  vqa_accuracy       of VQAv2, from several references
  anls               similarity by edit distance, of DocVQA and InfographicVQA
  relaxed_accuracy   within 5 % for numbers, of ChartQA
  bleu               corpus BLEU with all references of each question, for captions
  choice_accuracy    of the questions with choices
  exact_match_1, ..._2, ...
                     exact_match of the questions with one image, two images, ..., where their numbers differ
  ended              share of answers that ended within max_new_tokens
"""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gptjax.config import UserError
from gptjax.data import records
from gptjax.data.conversations import check_spec, read_conversations
from gptjax.data.images.image_references import ImageReference, record_images
from gptjax.data.templates import EncodedConversation
from gptjax.evaluation.example_records import complete_resumably, file_name, key
from gptjax.evaluation.scoring import Scorer, ScoringRequest
from gptjax.evaluation.tasks import identity
from gptjax.inference.engine import Engine
from gptjax.inference.sampling import Sampling
from gptjax.metrics import visual_answers
from gptjax.metrics.measurement import Measurement, mean
from gptjax.metrics.resampling import Sample
from gptjax.metrics.text import bleu_of_sums, bleu_terms
from gptjax.stages.image_prompts import ImagePrompts
from gptjax.stages.trained_model import TrainedModel

DEFAULT_NEW_TOKENS = 32
_METRICS = {
    "exact_match": visual_answers.exact_match,
    "vqa_accuracy": visual_answers.vqa_accuracy,
    "anls": visual_answers.anls,
    "relaxed_accuracy": visual_answers.relaxed_accuracy,
}


@dataclasses.dataclass(frozen=True)
class VisualQuestion:
    """A question about images.

    Attributes:
      references: acceptable answers, at least one.
      choices: options of a multiple-choice question; empty: it is not one.
    """

    text: str
    images: tuple[ImageReference, ...]
    references: tuple[str, ...]
    choices: tuple[str, ...]
    place: str


class Answer(NamedTuple):
    """The model's answer, and whether it ended within max_new_tokens."""

    text: str
    ended: bool


def read_questions(spec: str, limit: int | None) -> list[VisualQuestion]:
    """Reads the questions of a source; raises UserError if a record is malformed, with its line."""
    check_spec(spec)
    found: list[VisualQuestion] = []
    if spec.partition(":")[0] in ("digits", "chatterbot"):
        for item in read_conversations(spec)[:limit]:
            question, answer = item.prompt[-1], item.messages[len(item.prompt)]
            found.append(VisualQuestion(question.content, question.images, (answer.content,), (), item.place))
        return found
    for record, place in records.read_records(spec, "error"):
        if len(found) == limit:
            break
        found.append(_question(record, place))
    if not found:
        raise UserError(f"{spec} has no questions")
    return found


def _question(record: Mapping[str, Any], place: str) -> VisualQuestion:
    text, choices = record.get("question"), record.get("choices") or ()
    answers = record.get("answers") if record.get("answers") is not None else record.get("answer")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{place} has no question: write it as a text")
    if not isinstance(choices, list | tuple) or not all(isinstance(choice, str) for choice in choices):
        raise UserError(f"{place}: choices is not a list of texts but {str(choices)[:40]!r}")
    if choices and isinstance(answers, int) and 0 <= answers < len(choices):
        answers = choices[answers]
    if choices and isinstance(answers, str) and len(answers) == 1 and answers not in choices:
        number = ord(answers) - ord("A")
        answers = choices[number] if 0 <= number < len(choices) else answers
    found = [answers] if isinstance(answers, str | int | float) else answers
    if not isinstance(found, list) or not found or not all(isinstance(each, str | int | float) for each in found):
        raise UserError(f"{place} has no answer: write `answer`, a text, or `answers`, a list of texts")
    if choices and str(found[0]) not in choices:
        raise UserError(f"{place}: the answer {str(found[0])[:40]!r} is none of the choices")
    if choices:
        lines = (f"{chr(ord('A') + i)}. {choice}" for i, choice in enumerate(choices))
        text = "\n".join([text, *lines])
    images = tuple(record_images(record, place) or ())
    return VisualQuestion(text, images, tuple(map(str, found)), tuple(choices), place)


@dataclasses.dataclass(frozen=True)
class VisualQuestionTask:
    """Encoded questions about images.

    Attributes:
      inputs: of each question, up to where the answer begins.
      settings: what the metrics depend on other than the model, for the report.
    """

    questions: list[VisualQuestion]
    inputs: list[EncodedConversation]
    prompts: ImagePrompts
    max_new_tokens: int
    settings: dict[str, Any]

    @property
    def identities(self) -> list[str]:
        """A hash of each question, its references, and the names of its images."""
        return [
            identity((question.text, [image.source for image in question.images], question.references))
            for question in self.questions
        ]

    @property
    def requests(self) -> list[ScoringRequest]:
        """There are no likelihoods to score."""
        return []


def visual_question_task(
    questions: list[VisualQuestion], trained: TrainedModel, max_new_tokens: int | None
) -> VisualQuestionTask:
    """Encodes questions; raises UserError if one is too long, or an image does not exist."""
    prompts, context = ImagePrompts(trained.config, trained.tokenizer), trained.model.config.context_length
    new = min(DEFAULT_NEW_TOKENS, context // 4) if max_new_tokens is None else max_new_tokens
    inputs = []
    for question in questions:
        prompts.check(question.images)
        encoded = prompts.encode(question.text, question.images, question.place)
        if len(encoded) + new > context:
            raise UserError(
                f"{question.place}: the question has {len(encoded)} tokens, with {new} for the answer more than the "
                f"context of {context}: shorten it, or lower --max_new_tokens"
            )
        inputs.append(encoded)
    return VisualQuestionTask(questions, inputs, prompts, new, {"questions": len(questions), "max_new_tokens": new})


def evaluate_visual_questions(
    task: VisualQuestionTask, trained: TrainedModel, scorer: Scorer, directory: Path, name: str, batch_size: int
) -> tuple[dict[str, Measurement], list[dict[str, Any]]]:
    """Answers the questions; a stopped evaluation resumes from its records.

    Args:
      scorer: of the model in `trained`, for the names of the records.

    Returns:
      The metrics, and a record of each question and its answer.
    """

    def answer(engine: Engine, indices: Sequence[int]) -> list[Answer]:
        completions = engine.generate(
            [task.inputs[i].tokens for i in indices],
            task.max_new_tokens,
            Sampling(temperature=0),
            end_tokens=task.prompts.end_tokens,
            separate_text=True,
            images=[task.prompts.read(task.inputs[i].images) for i in indices],
        )
        return [Answer(c.text.strip(), c.finish_reason != "length") for c in completions]

    asked = [ScoringRequest(encoded.tokens, task.max_new_tokens) for encoded in task.inputs]
    images = [task.prompts.fingerprint(image) for encoded in task.inputs for image in encoded.images]
    path = directory / f"{file_name(name)}-answers-{key(scorer, trained.step, asked, images)}.jsonl"
    order = sorted(range(len(task.inputs)), key=lambda i: -len(task.inputs[i]))
    batches = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    answers = complete_resumably(path, f"{name} answers", batches, trained, answer, Answer)
    return _measured(task.questions, answers)


def _measured(
    questions: Sequence[VisualQuestion], answers: Sequence[Answer]
) -> tuple[dict[str, Measurement], list[dict[str, Any]]]:
    scores: dict[str, list[float]] = {name: [] for name in _METRICS}
    chosen: list[float] = []
    found = []
    for question, answer in zip(questions, answers, strict=True):
        text = answer.text
        if question.choices:
            choice = visual_answers.choice_of(text, question.choices)
            chosen.append(float(choice is not None and question.choices[choice] in question.references))
            text = text if choice is None else question.choices[choice]
        for name, metric in _METRICS.items():
            scores[name].append(metric(text, question.references))
        found.append(
            {
                "place": question.place,
                "images": [image.source for image in question.images],
                "question": question.text,
                "references": list(question.references),
                "answer": answer.text,
                "ended": answer.ended,
                "exact_match": scores["exact_match"][-1],
            }
        )
    metrics = {name: mean(values) for name, values in scores.items()}
    terms = bleu_terms([answer.text for answer in answers], [question.references for question in questions])
    bleu = float(bleu_of_sums(terms.sum(axis=0, keepdims=True))[0])
    metrics["bleu"] = Measurement(bleu, None, len(answers), Sample((terms,), form="bleu"))
    counts = [len(question.images) for question in questions]
    if len(set(counts)) > 1:
        for number in sorted(set(counts)):
            of_number = [score for score, count in zip(scores["exact_match"], counts, strict=True) if count == number]
            metrics[f"exact_match_{number}"] = mean(of_number)
    if chosen:
        metrics["choice_accuracy"] = mean(chosen)
    return metrics | {"ended": mean([float(answer.ended) for answer in answers])}, found
