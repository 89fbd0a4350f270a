"""Examples with the prompts of lm-evaluation-harness 0.4, where those of `gptjax/evaluation/catalogue.py` are others.

The records are those of the datasets on the Hugging Face Hub that the harness reads. As in the harness, an option
follows its context after a blank, even where there is white space already, and blanks within texts are kept.
"""

import ast
import re
from collections.abc import Sequence
from typing import Any

from gptjax.evaluation.tasks import TaskExample

_LETTERS = "ABCD"
_POSSESSIVE = ("my", "his", "her", "our", "their")
_CAPITALISED = ("A", "An", "The", "She", "He", "It", "They", "My", "His", "Her", "Their")


def after_blank(context: str, options: Sequence[str], answer: int, *, by_answer_prompt: bool = False) -> TaskExample:
    """Returns a multiple-choice example whose options follow the context after a blank."""
    return TaskExample(tuple((context, f" {option}") for option in options), answer, by_answer_prompt)


def lambada(record: dict[str, Any]) -> list[TaskExample]:
    """Paperno et al. 2016: the text after the last blank; texts are scored as they are in the file."""
    context, _, word = record["text"].rpartition(" ")
    return [TaskExample(((context, f" {word}"),))]


def hellaswag(record: dict[str, Any]) -> list[TaskExample]:
    """Zellers et al. 2019, where the second part of the context is capitalised, and otherwise in lower case."""

    def plain(text: str) -> str:  # [title], [step] and [substeps] are marks of WikiHow's format
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = plain(f"{record['activity_label']}: {record['ctx_a']} {record['ctx_b'].capitalize()}")
    return [after_blank(context, list(map(plain, record["endings"])), int(record["label"] or -1))]


def piqa(record: dict[str, Any]) -> list[TaskExample]:
    """Bisk et al. 2020, as a question."""
    return [
        after_blank(f"Question: {record['goal']}\nAnswer:", [record["sol1"], record["sol2"]], record["label"]),
    ]


def race(record: dict[str, Any]) -> list[TaskExample]:
    """Lai et al. 2017: the last question of an article, after its other questions with their answers."""
    *others, asked = ast.literal_eval(record["problems"])
    context = f"Article: {record['article']}\n\n"
    for problem in others:
        question, answer = problem["question"], problem["options"][_LETTERS.index(problem["answer"])]
        if question.endswith("  _  ."):
            context += f"{question[:-5]}{answer}\n"
        else:
            context += f"Question: {question}\nAnswer: {answer}\n"
    return [after_blank(context + asked["question"], asked["options"], _LETTERS.index(asked["answer"]))]


def bool_q(record: dict[str, Any]) -> list[TaskExample]:
    """Clark et al. 2019, from SuperGLUE, whose records have no titles."""
    context = f"{record['passage']}\nQuestion: {record['question']}?\nAnswer:"
    return [after_blank(context, ["no", "yes"], record["label"])]


def winogrande(record: dict[str, Any]) -> list[TaskExample]:
    """Sakaguchi et al. 2020, by partial evaluation; the rest of the sentence follows after a blank, even "'s"."""
    before, _, after = record["sentence"].partition("_")
    options = [record["option1"], record["option2"]]
    answer = {"1": 0, "2": 1}.get(record["answer"], -1)
    return [TaskExample(tuple((before + option, f" {after.strip()}") for option in options), answer)]


def wsc273(record: dict[str, Any]) -> list[TaskExample]:
    """Levesque et al. 2012, by partial evaluation. The rest of the sentence keeps its blank, so there are two."""
    text, start, pronoun = record["text"].replace("  ", " "), record["pronoun_loc"], record["pronoun"]

    def fitted(option: str) -> str:
        if pronoun.lower() in _POSSESSIVE:
            option += "'s"
        first = option.split()[0]
        begins_sentence = text[start - 2] == "."
        return option.replace(first, first.lower()) if not begins_sentence and first in _CAPITALISED else option

    after = f" {text[start + len(pronoun) :]}"
    return [TaskExample(tuple((text[:start] + fitted(option), after) for option in record["options"]), record["label"])]
