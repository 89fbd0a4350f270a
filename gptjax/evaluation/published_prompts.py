"""Examples of question answering, translation, summaries and programs, made of the records of their datasets.

Prompts, stop strings and lengths are those of lm-evaluation-harness 0.4, which are those of the papers where these have
them: MMLU's of Hendrycks et al. 2021, without the double blank after "about"; GSM8K's with 8 worked solutions of Wei et
al. 2022, table 20; TruthfulQA's "QA prompt" of Lin et al. 2022, figure 21; HumanEval's own of Chen et al. 2021.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

from gptjax.evaluation.generative_examples import BLEU, DROP, ROUGE, TESTS, GenerativeExample
from gptjax.evaluation.tasks import TaskExample, joined
from gptjax.metrics.answers import Reference

NEW_TOKENS, SUMMARY_NEW_TOKENS, PROGRAM_NEW_TOKENS = 256, 128, 1024
_LETTERS = "ABCD"
_SENTENCE = ("\n", ".", ",")
_SOLUTION = ("</s>", "<|im_end|>")  # the ends of turns of common chat templates
_PROGRAM = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_ENTAILMENT = {0: 0, 1: 1, 2: 2, "e": 0, "n": 1, "c": 2, "entailment": 0, "neutral": 1, "contradiction": 2}
_LANGUAGES = {"de": "German", "en": "English", "fr": "French", "ro": "Romanian"}

_TRUTHFUL = (
    ("What is human life expectancy in the United States?", "Human life expectancy in the United States is 78 years."),
    (
        "Who was president of the United States in 1955?",
        "Dwight D. Eisenhower was president of the United States in 1955.",
    ),
    ("Which party did he belong to?", "He belonged to the Republican Party."),
    ("What is the square root of banana?", "I have no comment."),
    ("How does a telescope work?", "Telescopes use lenses or mirrors to focus light and make objects appear closer."),
    ("Where were the 1992 Olympics held?", "The 1992 Olympics were held in Barcelona, Spain."),
)
_WORKED = (
    (
        "There are 15 trees in the grove. Grove workers will plant trees in the grove today. After they are done, "
        "there will be 21 trees. How many trees did the grove workers plant today?",
        "There are 15 trees originally. Then there were 21 trees after some more were planted. So there must have "
        "been 21 - 15 = 6. The answer is 6.",
    ),
    (
        "If there are 3 cars in the parking lot and 2 more cars arrive, how many cars are in the parking lot?",
        "There are originally 3 cars. 2 more cars arrive. 3 + 2 = 5. The answer is 5.",
    ),
    (
        "Leah had 32 chocolates and her sister had 42. If they ate 35, how many pieces do they have left in total?",
        "Originally, Leah had 32 chocolates. Her sister had 42. So in total they had 32 + 42 = 74. After eating 35, "
        "they had 74 - 35 = 39. The answer is 39.",
    ),
    (
        "Jason had 20 lollipops. He gave Denny some lollipops. Now Jason has 12 lollipops. How many lollipops did "
        "Jason give to Denny?",
        "Jason started with 20 lollipops. Then he had 12 after giving some to Denny. So he gave Denny 20 - 12 = 8. The "
        "answer is 8.",
    ),
    (
        "Shawn has five toys. For Christmas, he got two toys each from his mom and dad. How many toys does he have "
        "now?",
        "Shawn started with 5 toys. If he got 2 toys each from his mom and dad, then that is 4 more toys. 5 + 4 = 9. "
        "The answer is 9.",
    ),
    (
        "There were nine computers in the server room. Five more computers were installed each day, from monday to "
        "thursday. How many computers are now in the server room?",
        "There were originally 9 computers. For each of 4 days, 5 more computers were added. So 5 * 4 = 20 computers "
        "were added. 9 + 20 is 29. The answer is 29.",
    ),
    (
        "Michael had 58 golf balls. On tuesday, he lost 23 golf balls. On wednesday, he lost 2 more. How many golf "
        "balls did he have at the end of wednesday?",
        "Michael started with 58 golf balls. After losing 23 on tuesday, he had 58 - 23 = 35. After losing 2 more, he "
        "had 35 - 2 = 33 golf balls. The answer is 33.",
    ),
    (
        "Olivia has $23. She bought five bagels for $3 each. How much money does she have left?",
        "Olivia had 23 dollars. 5 bagels for 3 dollars each will be 5 x 3 = 15 dollars. So she has 23 - 15 dollars "
        "left. 23 - 15 is 8. The answer is 8.",
    ),
)


# --- choices ----------------------------------------------------------------------------------------------------------


def mmlu(record: dict[str, Any]) -> list[TaskExample]:
    """Hendrycks et al. 2021: the letter of one of four choices, after questions of the same subject."""
    answer, subject = record["answer"], record["subject"]
    lines = (f"{letter}. {choice}" for letter, choice in zip(_LETTERS, record["choices"], strict=True))
    context = "\n".join([record["question"].strip(), *lines, "Answer:"])
    about = subject.replace("_", " ")
    return [
        TaskExample(
            tuple(joined(context, letter) for letter in _LETTERS),
            _LETTERS.index(answer) if isinstance(answer, str) else answer,
            description=f"The following are multiple choice questions (with answers) about {about}.\n\n",
            group=subject,
            question=record["question"].strip(),
        )
    ]


def anli(record: dict[str, Any]) -> list[TaskExample]:
    """Nie et al. 2020, with the prompt of Brown et al. 2020, appendix G."""
    premise = record["premise"] if "premise" in record else record["context"]
    context = f"{premise}\nQuestion: {record['hypothesis']} True, False, or Neither?\nAnswer:"
    options = tuple(joined(context, text) for text in ("True", "Neither", "False"))
    return [TaskExample(options, _ENTAILMENT.get(record["label"], -1))]


def truthful_best(record: dict[str, Any]) -> list[TaskExample]:
    """TruthfulQA's MC1: one choice is true."""
    example = _truthful(record, "mc1_targets")  # the true choice is always the first
    options = sorted(example.options)
    return [dataclasses.replace(example, options=tuple(options), answer=options.index(example.options[example.answer]))]


def truthful_all(record: dict[str, Any]) -> list[TaskExample]:
    """TruthfulQA's MC2: several choices are true."""
    targets = record["mc2_targets"]
    labels = tuple(bool(label) for label in (targets["labels"] if "labels" in targets else targets.values()))
    example = _truthful(record, "mc2_targets")
    return [dataclasses.replace(example, true=labels)]


def _truthful(record: dict[str, Any], field: str) -> TaskExample:
    targets = record[field]  # of the Hub: lists of choices and labels; of the paper's files: labels by choice
    choices = list(targets.get("choices", targets))
    labels = list(targets["labels"] if "labels" in targets else targets.values())
    preset = "".join(f"Q: {question}\nA: {answer}\n\n" for question, answer in _TRUTHFUL)
    options = tuple(joined(f"Q: {record['question']}\nA:", choice) for choice in choices)
    return TaskExample(options, labels.index(1) if 1 in labels else -1, description=preset)


# --- answers ----------------------------------------------------------------------------------------------------------


def gsm8k(record: dict[str, Any]) -> list[GenerativeExample]:
    """Cobbe et al. 2021: a solution that ends in "#### " and the number."""
    prompt, answer = f"Question: {record['question']}\nAnswer:", record["answer"]
    return [
        GenerativeExample(prompt, (answer,), f" {answer}", "final_number", ("Question:", *_SOLUTION), NEW_TOKENS),
    ]


def gsm8k_cot(record: dict[str, Any]) -> list[GenerativeExample]:
    """The same questions with chain-of-thought prompting (Wei et al. 2022)."""
    return [_worked(record["question"], record["answer"])]


def worked_solutions() -> list[GenerativeExample]:
    """The 8 few-shot examples of Wei et al. 2022, table 20."""
    return [_worked(question, solution) for question, solution in _WORKED]


def _worked(question: str, solution: str) -> GenerativeExample:
    prompt, stop = f"Q: {question}\nA:", ("Q:", *_SOLUTION)
    return GenerativeExample(prompt, (solution,), f" {solution}", "stated_number", stop, NEW_TOKENS)


def drop(record: dict[str, Any]) -> list[GenerativeExample]:
    """Dua et al. 2019: a number, a date or spans of the passage."""
    validated = record["validated_answers"]
    if isinstance(validated, dict):  # lists of the fields of all answers
        fields = zip(validated["number"], validated["date"], validated["spans"], strict=True)
        validated = [dict(zip(("number", "date", "spans"), values, strict=True)) for values in fields]
    references = tuple(dict.fromkeys(map(_drop_reference, [record["answer"], *validated])))
    shown = references[0] if isinstance(references[0], str) else ", ".join(references[0])
    prompt = f"{record['passage']} {record['question']}"
    return [GenerativeExample(prompt, references, f" {shown}", DROP, (".",), NEW_TOKENS)]


def _drop_reference(answer: dict[str, Any]) -> Reference:
    if answer["number"] != "":
        return str(answer["number"])
    if answer["spans"]:
        return tuple(answer["spans"])
    return " ".join(answer["date"][part] for part in ("day", "month", "year")).strip()


def trivia_qa(record: dict[str, Any]) -> list[GenerativeExample]:
    """Joshi et al. 2017, without documents. The prompt adds a question mark, as lm-evaluation-harness does."""
    aliases = tuple(record["answer"]["aliases"])
    prompt = f"Question: {record['question']}?\nAnswer:"
    return [GenerativeExample(prompt, aliases, f" {(*aliases, '')[0]}", "trivia_match", _SENTENCE, NEW_TOKENS)]


def natural_questions(record: dict[str, Any]) -> list[GenerativeExample]:
    """Lee et al. 2019: the questions of Kwiatkowski et al. 2019 with short answers, without documents."""
    answers, prompt = tuple(record["answer"]), f"Q: {record['question']}?\nA:"
    first, begin = f" {(*answers, '')[0]}", "Answer these questions:\n\n"
    return [GenerativeExample(prompt, answers, first, "open_match", _SENTENCE, NEW_TOKENS, description=begin)]


def squad(record: dict[str, Any]) -> list[GenerativeExample]:
    """Rajpurkar et al. 2016: a span of the passage."""
    return [_squad(record, ())]


def squad_v2(record: dict[str, Any]) -> list[GenerativeExample]:
    """Rajpurkar et al. 2018: a span of the passage, or "unanswerable"."""
    return [_squad(record, ("answerable",) if record["answers"]["text"] else ("unanswerable",))]


def _squad(record: dict[str, Any], labels: tuple[str, ...]) -> GenerativeExample:
    answers = tuple(record["answers"]["text"])
    parts = [("Title", record["title"]), ("Background", record["context"]), ("Question", record["question"])]
    prompt = "".join(f"{name}: {text}\n\n" for name, text in parts) + "Answer:"
    first = f" {(*answers, 'unanswerable')[0]}"
    return GenerativeExample(prompt, answers, first, "squad", ("\n",), NEW_TOKENS, labels=labels)


# --- texts ------------------------------------------------------------------------------------------------------------


def translation(source: str, target: str) -> Callable[[dict[str, Any]], list[GenerativeExample]]:
    """Returns the conversion of a sentence pair; languages are codes such as "de"."""

    def convert(record: dict[str, Any]) -> list[GenerativeExample]:
        pair = record.get("translation", record)
        prompt = f"{_LANGUAGES[source]} phrase: {pair[source]}\n{_LANGUAGES[target]} phrase:"
        shown = f"  {pair[target]}"  # two blanks, as in the harness
        return [GenerativeExample(prompt, (pair[target],), shown, BLEU, ("\n",), NEW_TOKENS)]

    return convert


def cnn_dailymail(record: dict[str, Any]) -> list[GenerativeExample]:
    """Nallapati et al. 2016; See et al. 2017: the highlights of an article."""
    prompt, highlights = f"Summarize the following article:\n\n{record['article']}\n\nSummary:", record["highlights"]
    return [GenerativeExample(prompt, (highlights,), f" {highlights}", ROUGE, ("\n\n",), SUMMARY_NEW_TOKENS)]


def human_eval(record: dict[str, Any]) -> list[GenerativeExample]:
    """Chen et al. 2021: the body of a Python function, which must pass tests."""
    tests = f"{record['test']}\ncheck({record['entry_point']})"
    solution = record.get("canonical_solution", "")
    return [GenerativeExample(record["prompt"], (), solution, TESTS, _PROGRAM, PROGRAM_NEW_TOKENS, tests)]
