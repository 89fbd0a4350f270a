"""Questions with one or several answers, from JSON lines or the catalogue, and how they are put to a model.

A task file has one JSON object a line, of one of these forms:

  {"text": "... the last word"}                      the last word is to be predicted (LAMBADA; OpenAI's own file of it)
  {"context": "...", "continuation": "..."}          the continuation is to be predicted
  {"context": "...", "choices": ["..."], "answer": 0}
                                                     which choice goes on from the context; `answer` is its place, from
                                                     0, or the choice itself
  {"context": "...", "question": "... XXXXX ...", "choices": ["..."], "answer": 0}
                                                     which choice stands for XXXXX (the Children's Book Test); each is
                                                     scored with the rest of the question (Radford et al. 2019,
                                                     section 3.2)

`context` may be left out or empty where there are choices or a continuation. It is joined to what follows by a blank,
unless there is white space already. Lines with "split": "fewshot" are not asked, but shown as examples; a file without
such lines shows its other lines.
"""

import dataclasses
import hashlib
import random
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.data.text_files import json_objects, read_lines
from gptjax.data.tokenizers import Tokenizer
from gptjax.evaluation.scoring import Request, Score, encode_pair
from gptjax.metrics.measurement import Measurement, exponential, mean

SEPARATOR = "\n\n"  # between the examples of a prompt
BLANK = "XXXXX"
ANSWER_PROMPT = "Answer:"


@dataclasses.dataclass(frozen=True)
class Example:
    """A question.

    Attributes:
      options: (context, continuation) pairs. One: is its continuation what the model would say? Several: which of them
        is the likeliest?
      answer: the place of the right option.
      by_answer_prompt: whether likelihoods are also to be normalised by P(continuation | "Answer:"), which makes sense
        only of answers (Brown et al. 2020, section 2.4).
    """

    options: tuple[tuple[str, str], ...]
    answer: int = 0
    by_answer_prompt: bool = False

    @property
    def shown(self) -> str:
        """The example as one that is shown, answered."""
        return "".join(self.options[self.answer])


@dataclasses.dataclass(frozen=True)
class Examples:
    """A task as it was read.

    Attributes:
      asked: the examples to evaluate.
      shots: those to show before them; where that is `asked` itself, never the one asked.
    """

    asked: list[Example]
    shots: list[Example]


def joined(context: str, continuation: str) -> tuple[str, str]:
    """The pair, with white space between the two."""
    bare = context and not context[-1].isspace() and not continuation[:1].isspace()
    return context, f" {continuation}" if bare else continuation


def last_word(text: str) -> Example:
    """The last word after what comes before it.

    Raises:
      ValueError: fewer than two words.
    """
    match = re.fullmatch(r"(.*\S)(\s+\S+)\s*", text, re.DOTALL)
    if match is None:
        raise ValueError('"text" needs at least two words')
    return Example(((match[1], match[2]),))


def as_blank(example: Example) -> Example:
    """A last word as the cloze that GPT-3 is shown with examples: "... her friend ____. -> Bob" (section 3.1.2)."""
    ((context, word),) = example.options
    return Example(((f"{context} ____. ->", word),))


def choices(context: str, options: Sequence[str], answer: int) -> Example:
    """Several continuations of one context."""
    return Example(tuple(joined(context, option) for option in options), answer, by_answer_prompt=True)


def blank_filled(context: str, question: str, options: Sequence[str], answer: int, blank: str = BLANK) -> Example:
    """Choices for a blank in a question: each is scored with what follows it."""
    before, _, after = question.partition(blank)
    start = "".join(joined(context, before))
    return Example(tuple(joined(start, option + after) for option in options), answer)


def both_contexts(sentence: str, options: Sequence[str], answer: int, blank: str) -> Example:
    """Choices for a blank, by what follows it: P(rest | start with the choice), the "partial evaluation" of Trinh and
    Le 2018, section 3, which GPT-2 and GPT-3 use for Winograd schemas."""
    before, _, after = sentence.partition(blank)
    return Example(tuple((before + option, after) for option in options), answer)


# --- JSON lines -------------------------------------------------------------------------------------------------------


def read_examples(path: Path) -> Examples:
    """The task of a file of the forms above.

    Raises:
      UserError: the file cannot be read, has nothing to ask, or a line of it is of no such form; FILE:LINE says where.
    """
    asked: list[Example] = []
    shots: list[Example] = []
    for record, place in json_objects(read_lines(path)):
        try:
            example = _example(record)
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        (shots if record.get("split") == "fewshot" else asked).append(example)
    if not asked:
        raise UserError(f"{path} has no example to ask")
    return Examples(asked, shots or asked)


def _example(record: dict[str, Any]) -> Example:
    """Raises ValueError, saying what is wrong with the record."""
    if "text" in record:
        return last_word(_string(record, "text"))
    context = _string(record, "context") if "context" in record else ""
    if "continuation" in record:
        return Example((joined(context, _string(record, "continuation")),))
    if "choices" not in record:
        raise ValueError('has none of the fields "text", "continuation" and "choices"')
    options = record["choices"]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
        raise ValueError('"choices" must be a list of at least two strings that are not empty')
    answer = record.get("answer")
    if isinstance(answer, str) and answer in options:
        answer = options.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        raise ValueError(f'"answer" must be one of the choices or its place, 0 to {len(options) - 1}, not {answer!r}')
    if "question" not in record:
        return choices(context, options, answer)
    question = _string(record, "question")
    if question.count(BLANK) != 1:
        raise ValueError(f'"question" must have {BLANK} in it, once')
    return blank_filled(context, question, options, answer)


def _string(record: dict[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, str) or (field != "context" and not value.strip()):
        raise ValueError(f'"{field}" must be a string that is not empty')
    return value


# --- as requests ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ExampleTask:
    """Examples to score, ready for the model.

    Attributes:
      requests: of each example its options and then, where it has them, its options after "Answer:".
      settings: what the numbers depend on besides the model, for the report.
    """

    examples: list[Example]
    requests: list[Request]
    settings: dict[str, Any]

    def metrics(self, scores: Sequence[Score]) -> dict[str, Measurement]:
        """Of continuations: accuracy (every token the likeliest) and perplexity (exp of the mean nats a continuation,
        so a word's where that is a word). Of choices: the accuracy of the choice with the most log-probability
        (accuracy), the most per token, the most per character (lm-evaluation-harness' acc_norm) and, where that was
        asked, the most over that after "Answer:". Of a file that has both, `accuracy` is over both."""
        values: dict[str, list[float]] = {}
        rest = iter(scores)
        for example in self.examples:
            n = len(example.options)
            options = [next(rest) for _ in range(n)]
            if n == 1:
                values.setdefault("accuracy", []).append(float(options[0].is_greedy))
                values.setdefault("nats", []).append(-options[0].logprob)
                continue
            totals = {
                "accuracy": [score.logprob for score in options],
                "accuracy_per_token": [score.logprob / score.num_tokens for score in options],
                "accuracy_per_character": [
                    score.logprob / len(text.strip()) for score, (_, text) in zip(options, example.options, strict=True)
                ],
            }
            if example.by_answer_prompt:
                totals["accuracy_by_answer_prompt"] = [score.logprob - next(rest).logprob for score in options]
            for name, total in totals.items():
                values.setdefault(name, []).append(float(total.index(max(total)) == example.answer))
        metrics = {name: mean(numbers) for name, numbers in values.items() if name != "nats"}
        if "nats" in values:
            metrics["perplexity"] = exponential(mean(values["nats"]))
        return metrics


def example_task(
    examples: Examples,
    tokenizer: Tokenizer,
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
    seed: int = 0,
    few_shot_form: Callable[[Example], Example] | None = None,
) -> ExampleTask:
    """Prepares the examples, each after `num_fewshot` others drawn for it (Brown et al. 2020, section 2.4).

    Args:
      limit: ask the first so many only; None: all.
      seed: of the draws, which depend on nothing else but the example's place.
      few_shot_form: what becomes of every example when others are shown before it.

    Raises:
      UserError: not enough examples to show, or one that cannot be encoded (see `encode_pair`).
    """
    asked, shots = examples.asked[:limit], examples.shots
    if num_fewshot > 0 and few_shot_form is not None:
        asked, shots = list(map(few_shot_form, asked)), list(map(few_shot_form, shots))
    spare = examples.shots is examples.asked  # one is drawn in place of the example itself
    if num_fewshot > len(shots) - spare:
        raise UserError(f"--num_fewshot={num_fewshot}, but there are only {len(shots) - spare} examples to show")
    requests: list[Request] = []
    for index, example in enumerate(asked):
        drawn = random.Random(f"{seed} {index}").sample(range(len(shots)), min(num_fewshot + spare, len(shots)))
        shown = [shots[i] for i in drawn if not (spare and i == index)][:num_fewshot]
        prompt = "".join(shot.shown.strip() + SEPARATOR for shot in shown)
        requests += [encode_pair(tokenizer, prompt + context, text) for context, text in example.options]
        if example.by_answer_prompt:
            requests += [encode_pair(tokenizer, *joined(ANSWER_PROMPT, text)) for _, text in example.options]
    settings = {
        "examples": len(asked),
        "examples_available": len(examples.asked),
        "num_fewshot": num_fewshot,
        "fewshot_seed": seed if num_fewshot else None,
        "examples_sha256": hashlib.sha256(repr(asked).encode()).hexdigest()[:16],
    }
    return ExampleTask(asked, requests, settings)
