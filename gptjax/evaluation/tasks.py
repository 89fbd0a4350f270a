"""Multiple-choice and continuation tasks: reading task files, requests and metrics.

A task file has one JSON object a line, in one of these forms:

  {"text": "... the last word"}                      predict the last word (LAMBADA; OpenAI's file)
  {"context": "...", "continuation": "..."}          predict the continuation
  {"context": "...", "choices": ["..."], "answer": 0}
                                                     choose the continuation of the context; `answer` is its index,
                                                     from 0, or its text
  {"context": "...", "question": "... XXXXX ...", "choices": ["..."], "answer": 0}
                                                     choose the replacement of XXXXX (the Children's Book Test); each
                                                     choice is scored with the rest of the question (Radford et al.
                                                     2019, section 3.2)

`context` is optional where there are choices or a continuation. It is joined to the following text by a blank, unless
there is white space already. Lines with "split": "fewshot" are used as few-shot examples only; without such lines, the
few-shot examples of an example are taken from the others.

A file whose lines have a "prompt" is a generative task; `gptjax/evaluation/generative_examples.py` defines its fields.
"""

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.data.text_files import json_objects, read_lines
from gptjax.data.tokenizers import Tokenizer
from gptjax.evaluation.few_shot import Examples, few_shot_prompts
from gptjax.evaluation.generative_examples import GenerativeExample, generative_example, spaced
from gptjax.evaluation.scoring import ScoringRequest, ScoringResult, encode_pair
from gptjax.metrics.measurement import Measurement, exponential, mean

BLANK = "XXXXX"
ANSWER_PROMPT = "Answer:"


@dataclasses.dataclass(frozen=True)
class TaskExample:
    """An example of a task.

    Attributes:
      options: (context, continuation) pairs. One option: the continuation is to be predicted. Several: the most
        probable one is chosen.
      answer: index of the correct option.
      by_answer_prompt: also normalises likelihoods by P(continuation | "Answer:") (Brown et al. 2020, section 2.4).
      true: whether each option is true, where several are (TruthfulQA's MC2); empty: only the answer is.
      description, group: see `few_shot.Example`.
      question: the part of the context without which the options are scored by --choices_only; empty: what the contexts
        of all options share.
    """

    options: tuple[tuple[str, str], ...]
    answer: int = 0
    by_answer_prompt: bool = False
    true: tuple[bool, ...] = ()
    description: str = ""
    group: str = ""
    question: str = ""

    @property
    def shown(self) -> str:
        """The text of the example as a few-shot example, with the correct option."""
        return "".join(self.options[self.answer])

    @property
    def texts(self) -> list[str]:
        """The text of the example with each option."""
        return list(map("".join, self.options))


def joined(context: str, continuation: str) -> tuple[str, str]:
    """Returns (context, continuation) with a blank between the two unless there is white space already."""
    return context, spaced(context, continuation)


def last_word(text: str) -> TaskExample:
    """Returns an example that predicts the last word of a text.

    Raises:
      ValueError: fewer than two words.
    """
    match = re.fullmatch(r"(.*\S)(\s+\S+)\s*", text, re.DOTALL)
    if match is None:
        raise ValueError('"text" needs at least two words')
    return TaskExample(((match[1], match[2]),))


def as_blank(example: TaskExample) -> TaskExample:
    """Converts a last-word example to GPT-3's few-shot cloze "... her friend ____. -> Bob" (section 3.1.2)."""
    ((context, word),) = example.options
    return TaskExample(((f"{context} ____. ->", word),))


def choices(context: str, options: Sequence[str], answer: int) -> TaskExample:
    """Returns a multiple-choice example of continuations of one context."""
    return TaskExample(tuple(joined(context, option) for option in options), answer, by_answer_prompt=True)


def blank_filled(context: str, question: str, options: Sequence[str], answer: int, blank: str = BLANK) -> TaskExample:
    """Returns an example of choices for a blank in a question, each scored with the text after the blank."""
    before, _, after = question.partition(blank)
    start = "".join(joined(context, before))
    return TaskExample(tuple(joined(start, option + after) for option in options), answer)


def both_contexts(sentence: str, options: Sequence[str], answer: int, blank: str) -> TaskExample:
    """Returns an example of choices for a blank, scored by P(text after the blank | text up to it with the choice).

    This is the "partial evaluation" of Trinh and Le 2018, section 3, used for Winograd schemas by GPT-2 and GPT-3.
    """
    before, _, after = sentence.partition(blank)
    return TaskExample(tuple((before + option, after) for option in options), answer)


# --- JSON lines -------------------------------------------------------------------------------------------------------


def read_examples(path: Path) -> Examples[Any]:
    """Reads a task file; its examples are all `TaskExample` or all `GenerativeExample`.

    Raises:
      UserError: the file cannot be read, has no example to evaluate, or a line is malformed (named as FILE:LINE).
    """
    scored: dict[bool, list[TaskExample]] = {True: [], False: []}  # by whether they are asked
    generative: dict[bool, list[GenerativeExample]] = {True: [], False: []}
    for record, place in json_objects(read_lines(path)):
        is_asked = record.get("split") != "fewshot"
        try:
            if "prompt" in record:
                generative[is_asked].append(generative_example(record))
            else:
                scored[is_asked].append(_example(record))
        except ValueError as error:
            raise UserError(f"{place}: {error}") from None
        if any(scored.values()) and any(generative.values()):
            raise UserError(f'{place}: lines with and without "prompt" do not belong in one file: split it')
    if scored[True]:
        return Examples(scored[True], scored[False] or scored[True])
    if generative[True]:
        return Examples(generative[True], generative[False] or generative[True])
    raise UserError(f"{path} has no example to evaluate: add lines without split=fewshot")


def _example(record: dict[str, Any]) -> TaskExample:
    """Converts a record to an example; raises ValueError if it is malformed."""
    if "text" in record:
        return last_word(_string(record, "text"))
    context = _string(record, "context") if "context" in record else ""
    if "continuation" in record:
        return TaskExample((joined(context, _string(record, "continuation")),))
    if "choices" not in record:
        raise ValueError('has none of the fields "text", "continuation", "choices" and "prompt"')
    options = record["choices"]
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(o, str) and o for o in options):
        raise ValueError('"choices" must be a list of at least two strings that are not empty')
    answer = record.get("answer")
    if isinstance(answer, str) and answer in options:
        answer = options.index(answer)
    if not isinstance(answer, int) or isinstance(answer, bool) or not 0 <= answer < len(options):
        raise ValueError(f'"answer" must be one of the choices or its index, 0 to {len(options) - 1}, not {answer!r}')
    if "question" not in record:
        return choices(context, options, answer)
    question = _string(record, "question")
    if question.count(BLANK) != 1:
        raise ValueError(f'"question" must contain {BLANK} exactly once')
    return blank_filled(context, question, options, answer)


def _string(record: dict[str, Any], field: str) -> str:
    value = record[field]
    if not isinstance(value, str) or (field != "context" and not value.strip()):
        raise ValueError(f'"{field}" must be a string that is not empty')
    return value


# --- as requests ------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class ExampleTask:
    """Encoded examples.

    Attributes:
      examples: the examples.
      prompts: for each example, the text before it: its description and few-shot examples.
      requests: for each example, its options, then its options after "Answer:" if `by_answer_prompt`.
      settings: what the metrics depend on other than the model, for the report.
      control: the same examples without their questions; None: not asked for.
    """

    examples: list[TaskExample]
    prompts: list[str]
    requests: list[ScoringRequest]
    settings: dict[str, Any]
    control: "ExampleTask | None" = None

    @property
    def identities(self) -> list[str]:
        """A hash of each example with its few-shot examples, equal for equal text whatever the tokenizer."""
        return [identity(pair) for pair in zip(self.prompts, self.examples, strict=True)]

    def records(self, scores: Sequence[ScoringResult]) -> list[dict[str, Any]]:
        """Returns a record of each example with its few-shot prompt, options, and their log-probabilities in nats."""
        found, rest = [], iter(scores)
        for prompt, example in zip(self.prompts, self.examples, strict=True):
            options = [next(rest) for _ in example.options]
            contexts, continuations = zip(*example.options, strict=True)
            record = {
                "few_shot": prompt,
                "context": contexts[0] if len(set(contexts)) == 1 else contexts,
                "options": continuations,
                "answer": example.answer,
                **({"true": example.true} if example.true else {}),
                "logprobs": [score.logprob for score in options],
                "num_tokens": [score.num_tokens for score in options],
                "is_greedy": [score.is_greedy for score in options],
            }
            if example.by_answer_prompt and len(options) > 1:
                record["answer_prompt_logprobs"] = [next(rest).logprob for _ in options]
            found.append(record)
        return found

    def metrics(self, scores: Sequence[ScoringResult]) -> dict[str, Measurement]:
        """Computes accuracies and, for continuations, perplexity.

        For continuations: `accuracy` (greedy decoding gives all tokens) and `perplexity` (exp of the mean nats of a
        continuation, so per word where a continuation is a word). For choices: the accuracy of the choice of the
        highest log-probability (`accuracy`), the highest per token, per character (lm-evaluation-harness' acc_norm)
        and, for `by_answer_prompt`, relative to the log-probability after "Answer:". In a file with both, `accuracy`
        is over both. For choices of which several are true only `mc2`, see `true_probability`.
        """
        values: dict[str, list[float]] = {}
        rest = iter(scores)
        for example in self.examples:
            n = len(example.options)
            options = [next(rest) for _ in range(n)]
            if n == 1:
                values.setdefault("accuracy", []).append(float(options[0].is_greedy))
                values.setdefault("nats", []).append(-options[0].logprob)
                continue
            if example.true:
                values.setdefault("mc2", []).append(true_probability(options, example.true))
                continue
            totals = {
                "accuracy": [score.logprob for score in options],
                "accuracy_per_token": [score.logprob / score.num_tokens for score in options],
                "accuracy_per_character": [
                    _per_character(score, text) for score, (_, text) in zip(options, example.options, strict=True)
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


def _per_character(score: ScoringResult, continuation: str) -> float:
    """Returns the nats of an option per character, without the blank that joins it to its context."""
    length = len(continuation.removeprefix(" "))
    return score.logprob / length if length else -math.inf


def true_probability(options: Sequence[ScoringResult], true: Sequence[bool]) -> float:
    """Computes the probability of the true options among all options (Lin et al. 2022, MC2)."""
    most = max(score.logprob for score in options)
    weights = [math.exp(score.logprob - most) for score in options]
    return sum(weight for weight, is_true in zip(weights, true, strict=True) if is_true) / sum(weights)


def example_task(
    examples: Examples[TaskExample],
    tokenizer: Tokenizer,
    *,
    num_fewshot: int = 0,
    limit: int | None = None,
    seed: int = 0,
    few_shot_form: Callable[[TaskExample], TaskExample] | None = None,
) -> ExampleTask:
    """Encodes the examples, each after `num_fewshot` others (Brown et al. 2020, section 2.4).

    Args:
      limit: number of examples to evaluate, from the first; None: all.
      seed: sampling seed of the few-shot examples.
      few_shot_form: transformation of all examples when num_fewshot > 0.

    Raises:
      UserError: there are too few few-shot examples, or an example cannot be encoded (see `encode_pair`).
    """
    if num_fewshot > 0 and few_shot_form is not None:
        asked, shots = (list(map(few_shot_form, part)) for part in (examples.asked, examples.shots))
        examples = dataclasses.replace(
            examples, asked=asked, shots=asked if examples.shots is examples.asked else shots
        )
    asked = list(examples.asked[:limit])
    prompts = few_shot_prompts(examples, num_fewshot, limit, seed)
    requests: list[ScoringRequest] = []
    for example, prompt in zip(asked, prompts, strict=True):
        requests += [encode_pair(tokenizer, prompt + context, text) for context, text in example.options]
        if example.by_answer_prompt:
            requests += [encode_pair(tokenizer, *joined(ANSWER_PROMPT, text)) for _, text in example.options]
    settings = {
        "examples": len(asked),
        "examples_available": len(examples.asked),
        "num_fewshot": num_fewshot,
        "fewshot_seed": seed if num_fewshot and examples.sampled else None,
        "examples_sha256": identity(asked),
    }
    return ExampleTask(asked, prompts, requests, settings)


def identity(content: Any) -> str:
    """Returns a hash, 16 hex digits, of what an example asks, by which results of several models are paired."""
    return hashlib.sha256(repr(content).encode(errors="backslashreplace")).hexdigest()[:16]
