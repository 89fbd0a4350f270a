"""What a score on multiple choice is compared with: choosing without the model, and without the question.

The random baseline is the expected accuracy of a uniform choice, the mean of 1 / options. The majority baseline is the
accuracy of always choosing the most frequent answer: its text where all examples have the same options, such as "yes"
and "no", else its place among the options. Where several options are true, the random baseline is their share.

The choices-only control scores the options without the question (Poliak et al. 2018; Balepur et al. 2024). Where it
scores as high as with the question, the benchmark does not measure whether the question is read.
"""

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterable, Sequence

from gptjax.config import UserError
from gptjax.evaluation.few_shot import Examples
from gptjax.evaluation.tasks import ANSWER_PROMPT, TaskExample, joined


def choice_baselines(examples: Sequence[TaskExample]) -> dict[str, float]:
    """Returns the accuracies of a random and of the majority choice; empty unless all examples have options."""
    if not examples or any(len(example.options) < 2 for example in examples):
        return {}
    if all(example.true for example in examples):
        return {"random": sum(sum(example.true) / len(example.true) for example in examples) / len(examples)}
    texts = [[continuation.strip() for _, continuation in example.options] for example in examples]
    same = len({frozenset(each) for each in texts}) == 1 and len(set(texts[0])) == len(texts[0])
    answers = Counter(
        text[example.answer] if same else example.answer for text, example in zip(texts, examples, strict=True)
    )
    return {
        "random": sum(1 / len(text) for text in texts) / len(texts),
        "majority": max(answers.values()) / len(texts),
    }


def choices_only(examples: Examples[TaskExample], name: str) -> Examples[TaskExample]:
    """Returns the examples without what their options share: the question, of few-shot examples too.

    Raises:
      UserError: an example of the task `name` has no options.
    """
    if any(len(example.options) < 2 for example in (*examples.asked, *examples.shots)):
        raise UserError(f"--choices_only needs examples with options, and some of {name} have none")
    asked = list(map(_without_question, examples.asked))
    same = examples.shots is examples.asked
    shots = asked if same else list(map(_without_question, examples.shots))
    return dataclasses.replace(examples, asked=asked, shots=shots)


def _without_question(example: TaskExample) -> TaskExample:
    """Replaces the words that all contexts begin with by "Answer:".

    Options that differ in their context, as in a Winograd schema, keep the part in which they differ. The words
    after the blank of a cloze, which all continuations end with, are left out too.
    """
    contexts, continuations = ([option[part] for option in example.options] for part in (0, 1))
    if len(set(contexts)) > 1:
        start = len(_shared_words(contexts))
        rests = ["".join(joined(ANSWER_PROMPT, context[start:])) for context in contexts]
        return _with_options(example, zip(rests, continuations, strict=True))
    if not example.by_answer_prompt:
        after = len(_shared_words([text[::-1] for text in continuations]))
        continuations = [text[: len(text) - after] for text in continuations]
    if example.question:
        return _with_options(
            example, ((contexts[0].replace(example.question, "", 1).lstrip(), text) for text in continuations)
        )
    return _with_options(example, (joined(ANSWER_PROMPT, text) for text in continuations))


def _with_options(example: TaskExample, options: Iterable[tuple[str, str]]) -> TaskExample:
    return dataclasses.replace(example, options=tuple(options), by_answer_prompt=False)


def _shared_words(texts: Sequence[str]) -> str:
    """The whole words that all texts begin with; their last one ends in white space."""
    same = itertools.takewhile(lambda letters: len(set(letters)) == 1, zip(*texts, strict=False))
    shared = texts[0][: len(list(same))]
    return shared[: len(shared) - len(re.split(r"\s", shared)[-1])]
