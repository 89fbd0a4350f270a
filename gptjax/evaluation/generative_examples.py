"""Examples whose completion is generated, and the lines of task files that define them.

A line of a task file with a `prompt` is such an example:

  {"prompt": "Q: Who wrote Faust?\\nA:", "answers": ["Goethe", "Johann Wolfgang Goethe"], "metric": "squad"}

  prompt          text to complete
  answers         acceptable completions, a list of texts, or one text; for the metric drop a list of spans is an answer
  metric          one of the names below; default: exact_match
  stop            strings that end the completion; default: a newline, for programs none
  max_new_tokens  default: 64, for programs 512; --max_new_tokens replaces it
  tests           for the metric tests, instead of `answers`: Python code that follows prompt and completion, and raises
                  an exception if they are wrong; run with --allow_code_execution only
  shown           the completion in a few-shot example; default: the first of the answers
  description     text before the few-shot examples
  group           few-shot examples are taken from the same group
  split           "fewshot": the line is a few-shot example only

Metrics: exact_match (up to white space at the ends), trivia_match (and case and punctuation), open_match (and
articles), squad (exact match and F1 of SQuAD), drop (those of DROP), final_number and stated_number (numbers as in
GSM8K), bleu and rouge (of one answer), tests (pass@k).
"""

import dataclasses
from typing import Any

from gptjax.metrics.answers import ANSWER_METRICS, Reference

DROP, BLEU, ROUGE, TESTS = "drop", "bleu", "rouge", "tests"
METRICS = (*ANSWER_METRICS, DROP, BLEU, ROUGE, TESTS)
DEFAULT_NEW_TOKENS, PROGRAM_NEW_TOKENS = 64, 512
_FIELDS = {
    *("prompt", "answers", "metric", "stop", "max_new_tokens", "tests", "shown", "description", "group", "split"),
}


@dataclasses.dataclass(frozen=True)
class GenerativeExample:
    """An example whose completion is generated.

    Attributes:
      prompt: text to complete.
      references: acceptable completions; none: there is no answer (SQuAD 2.0), or `tests` decide.
      target: the right completion in a few-shot example, with the blank that joins it to the prompt.
      metric: one of METRICS.
      stop: strings that end a completion.
      max_new_tokens: maximum length of a completion in tokens.
      tests: Python code that follows prompt and completion, for the metric "tests".
      description, group: see `few_shot.Example`.
      labels: names of subsets that the example belongs to, whose metrics are also reported on their own.
    """

    prompt: str
    references: tuple[Reference, ...]
    target: str
    metric: str = "exact_match"
    stop: tuple[str, ...] = ("\n",)
    max_new_tokens: int = DEFAULT_NEW_TOKENS
    tests: str = ""
    description: str = ""
    group: str = ""
    labels: tuple[str, ...] = ()

    @property
    def shown(self) -> str:
        """The text of the example as a few-shot example."""
        return self.prompt + self.target

    @property
    def texts(self) -> list[str]:
        """All texts of the example, each with its prompt, as a training corpus might contain them."""
        references = (each if isinstance(each, str) else ", ".join(each) for each in self.references)
        return list(dict.fromkeys([self.shown, *(f"{self.prompt} {reference}" for reference in references)]))


def spaced(prompt: str, completion: str) -> str:
    """Returns a completion with a blank before it, unless there is white space already."""
    bare = prompt and not prompt[-1].isspace() and not completion[:1].isspace()
    return f" {completion}" if bare else completion


def generative_example(record: dict[str, Any]) -> GenerativeExample:
    """Converts a line of a task file; raises ValueError if it is malformed."""
    if unknown := set(record) - _FIELDS:
        raise ValueError(f'unknown field "{sorted(unknown)[0]}": known are {", ".join(sorted(_FIELDS))}')
    prompt = _text(record, "prompt", empty=False)
    metric = record.get("metric", TESTS if "tests" in record else "exact_match")
    if metric not in METRICS:
        raise ValueError(f'"metric" must be one of {", ".join(METRICS)}, not {metric!r}')
    if (metric == TESTS) != ("tests" in record):
        raise ValueError(f'"tests" belongs to the metric tests, not to {metric}' if metric != TESTS else 'no "tests"')
    if metric == TESTS and "answers" in record:
        raise ValueError('"answers" and "tests" exclude each other')
    references = () if metric == TESTS else _references(record, metric)
    first = references[0] if references else ""
    stop = record.get("stop", [] if metric == TESTS else ["\n"])
    if not isinstance(stop, list) or not all(isinstance(text, str) and text for text in stop):
        raise ValueError('"stop" must be a list of strings that are not empty')
    tokens = record.get("max_new_tokens", PROGRAM_NEW_TOKENS if metric == TESTS else DEFAULT_NEW_TOKENS)
    if not isinstance(tokens, int) or isinstance(tokens, bool) or tokens < 1:
        raise ValueError(f'"max_new_tokens" must be an integer of at least 1, not {tokens!r}')
    shown = _text(record, "shown", first if isinstance(first, str) else ", ".join(first))
    return GenerativeExample(
        prompt,
        references,
        spaced(prompt, shown),
        metric,
        tuple(stop),
        tokens,
        _text(record, "tests", "", empty=False),
        _text(record, "description", ""),
        _text(record, "group", ""),
    )


def _text(record: dict[str, Any], field: str, default: str | None = None, *, empty: bool = True) -> str:
    if default is not None and field not in record:
        return default
    value = record.get(field)
    if not isinstance(value, str) or not (empty or value.strip()):
        raise ValueError(f'"{field}" must be a string' + ("" if empty else " that is not empty"))
    return value


def _references(record: dict[str, Any], metric: str) -> tuple[Reference, ...]:
    answers = record.get("answers")
    found: list[Reference] = []
    given: list[Any] = answers if isinstance(answers, list) else [answers]
    for answer in given:
        spans = metric == DROP and isinstance(answer, list) and answer and all(isinstance(s, str) for s in answer)
        if not isinstance(answer, str) and not spans:
            form = "a list of texts" if metric != DROP else "a list whose items are texts or lists of texts"
            raise ValueError(f'"answers" must be a text or {form}')
        found.append(tuple(answer) if isinstance(answer, list) else answer)
    if not found and metric != "squad":
        raise ValueError('"answers" is empty: only the metric squad has questions without an answer')
    if metric == BLEU and len(found) != 1:
        raise ValueError("the metric bleu takes one answer")
    return tuple(found)
