"""Made records of the benchmarks of choices that lm-evaluation-harness has too, in the form of its datasets."""

import dataclasses
from collections.abc import Callable
from typing import Any

Record = dict[str, Any]


def same(record: Record) -> Record:
    return record


def as_it_is(record: Record, completion: str, index: int) -> Record:
    return record


@dataclasses.dataclass(frozen=True)
class Case:
    """A benchmark in both.

    Attributes:
      tasks: names in the harness, each with the name of its configuration on the Hub.
      path: name of its dataset on the Hub.
      asked, shots: records; those of several tasks are told apart by `subject`.
      splits: names of the splits of the harness that have these.
      scores: name here -> name in the harness, without its filter unless there are several.
      ours: converts a record to the form of tensorflow-datasets, where the benchmark here reads this.
      answered: given the completion of the model, makes a record whose answer it hits or misses.
      few_shot: whether prompts with few-shot examples agree. The harness' of DROP have the names of fields as answers,
        those of lambada_standard two blanks before the last word, and its squadv2 fails with few-shot examples.
    """

    tasks: dict[str, str | None]
    path: str
    asked: list[Record]
    scores: dict[str, str]
    shots: list[Record] = dataclasses.field(default_factory=list)
    splits: tuple[str, str] = ("test", "train")
    ours: Callable[[Record], Record] = same
    answered: Callable[[Record, str, int], Record] = as_it_is
    few_shot: bool = True


def shown(records: list[Record], field: str) -> list[Record]:
    """Records to be shown as few-shot examples, which differ from those that are asked."""
    return [{**record, field: f"{n} {record[field]}"} for n in range(3) for record in records]


WORD = {"accuracy": "acc", "perplexity": "perplexity"}
CHOICE = {"accuracy": "acc"}
NORMALISED = {"accuracy": "acc", "accuracy_per_character": "acc_norm"}
VALIDATION = ("validation", "train")

LAMBADA = [
    {"text": 'He said "I see", and then he told his  old friend Bob'},
    {"text": "The Rome of the answer was Rome .\n\nHe went to Rome"},
    {"text": "`` i see '' , said alice to her friend bob"},
]
HELLASWAG = [
    {
        "activity_label": "Removing ice",
        "ctx_a": "A man is [step] outside.   He has  a tool.",
        "ctx_b": "then Bob",
        "endings": ["sits. [title] Then he   goes.", "[title] runs [substeps] away.", "answers no.", "is Rome."],
        "label": "3",
    },
    {"activity_label": "Tea", "ctx_a": "Ann pours.", "ctx_b": "", "endings": ["a", "bb", "ccc", "dd d"], "label": "0"},
]
PIQA = [
    {"goal": "To sort, ", "sol1": "laugh.", "sol2": "compare. ", "label": 1},
    {"goal": "How is Rome?", "sol1": "the answer is 7", "sol2": "no", "label": 0},
    {"goal": "Open it", "sol1": " pull", "sol2": "push and  pull", "label": 0},
]
ARC = [
    {
        "question": "What is hot?",
        "choices": {"text": ["ice ", "fire", "snow"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    },
    {
        "question": "Is it?",
        "choices": {"text": ["yes", "no", "7", "Rome"], "label": ["1", "2", "3", "4"]},
        "answerKey": "3",
    },
]
OPENBOOKQA = [
    {
        "question_stem": "Ice is",
        "choices": {"text": ["hot", "wet ", "cold", "red"], "label": [*"ABCD"]},
        "answerKey": "C",
    },
    {
        "question_stem": "Rome ",
        "choices": {"text": ["no", "the answer", "7", "."], "label": [*"ABCD"]},
        "answerKey": "C",
    },
]
RACE = [
    {
        "article": "Ann ran to Rome.\nThen she sat.",
        "problems": str(
            [
                {"question": "Who ran?", "answer": "A", "options": ["Ann", "Bob", "Cy", "Di"]},
                {"question": "She ran to   _  .", "answer": "B", "options": ["Paris", "Rome", "7", "no"]},
                {"question": "Then she _ .", "answer": "D", "options": ["ran", "saw", "fell", "sat"]},
            ]
        ),
    },
    {"article": "No.", "problems": str([{"question": "Is?", "answer": "A", "options": ["no", "7", "the", "Rome"]}])},
]
STORY_CLOZE = [
    {
        **{f"input_sentence_{n}": text for n, text in enumerate(("Bob fell.", "It hurt.", "He sat.", "Ann came."), 1)},
        "sentence_quiz1": "He rose.",
        "sentence_quiz2": "The answer is 7.",
        "answer_right_ending": right,
    }
    for right in (1, 2)
]
BOOLQ = [
    {"question": "does it act", "passage": "It acts.  Rome", "label": 1},
    {"question": "is it 7", "passage": "The answer is 7", "label": 0},
]
WINOGRANDE = [
    {"sentence": "Ann saw Eve and _ waved. ", "option1": "Ann", "option2": "Eve", "answer": "1"},
    {"sentence": "Ann took _'s hat.", "option1": "Bob", "option2": "Rome", "answer": "2"},
    {"sentence": "_ is the answer, no?", "option1": "7", "option2": "Rome", "answer": "2"},
]
WSC = [
    {
        "text": "The  cup broke when it fell.",
        "pronoun": "it",
        "pronoun_loc": 19,
        "options": ["The cup", "The cat"],
        "label": 0,
    },
    {
        "text": "Ann saw Eve. Her hat fell on Rome.",
        "pronoun": "Her",
        "pronoun_loc": 13,
        "options": ["Ann", "The Eve"],
        "label": 0,
    },
]
MMLU = [
    {"question": f" {number} + 1? ", "subject": subject, "choices": ["2", "Rome", "1", "7"], "answer": number % 4}
    for subject in ("anatomy", "high_school_world_history")
    for number in range(7)
]
ANLI = [{"premise": "A dog ran. ", "hypothesis": "A cat ran.", "label": label} for label in (2, 0, 1)]
TRUTHFUL = [
    {
        "question": "Is it?",
        "mc1_targets": {"choices": ["Yes.", "No.", "Rome is the answer."], "labels": [1, 0, 0]},
        "mc2_targets": {"choices": ["Yes.", "No.", "Well."], "labels": [1, 0, 1]},
    },
    {
        "question": "What is Rome?",
        "mc1_targets": {"choices": ["Nothing", "7"], "labels": [1, 0]},
        "mc2_targets": {"choices": ["Nothing", "7", "no", "the answer"], "labels": [1, 1, 0, 0]},
    },
]  # fmt: skip


def openbookqa(record: Record) -> Record:
    options = {f"choice_{letter}": text for letter, text in zip("ABCD", record["choices"]["text"], strict=True)}
    return {"question": {"stem": record["question_stem"], **options}, "answerKey": "ABCD".index(record["answerKey"])}


def story_cloze(record: Record) -> Record:
    context = " ".join(record[f"input_sentence_{n}"] for n in (1, 2, 3, 4))
    endings = [record["sentence_quiz1"], record["sentence_quiz2"]]
    return {"context": context, "endings": endings, "label": record["answer_right_ending"]}


def anli(record: Record) -> Record:
    return {"context": record["premise"], "hypothesis": record["hypothesis"], "label": record["label"]}


CHOICES = {
    "lambada_openai": Case({"lambada_openai": "default"}, "EleutherAI/lambada_openai", LAMBADA, WORD),
    "lambada_standard": Case(
        {"lambada_standard": None},
        "cimec/lambada",
        LAMBADA,
        WORD,
        shown(LAMBADA, "text"),
        splits=("test", "validation"),
        few_shot=False,
    ),
    "lm_eval_hellaswag": Case(
        {"hellaswag": None}, "Rowan/hellaswag", HELLASWAG, NORMALISED, shown(HELLASWAG, "activity_label"), VALIDATION
    ),
    "lm_eval_piqa": Case({"piqa": None}, "baber/piqa", PIQA, NORMALISED, shown(PIQA, "goal"), VALIDATION),
    "arc_easy": Case({"arc_easy": "ARC-Easy"}, "allenai/ai2_arc", ARC, NORMALISED, shown(ARC, "question")),
    "arc_challenge": Case(
        {"arc_challenge": "ARC-Challenge"}, "allenai/ai2_arc", ARC, NORMALISED, shown(ARC, "question")
    ),
    "openbookqa": Case(
        {"openbookqa": "main"},
        "allenai/openbookqa",
        OPENBOOKQA,
        NORMALISED,
        shown(OPENBOOKQA, "question_stem"),
        ours=openbookqa,
    ),
    "lm_eval_race": Case({"race": "high"}, "EleutherAI/race", RACE, CHOICE),
    "story_cloze": Case(
        *(
            {"storycloze_2016": "2016"},
            "LSDSem/story_cloze",
            STORY_CLOZE,
            CHOICE,
            shown(STORY_CLOZE, "input_sentence_1"),
        ),
        splits=("test", "validation"),
        ours=story_cloze,
    ),
    "lm_eval_boolq": Case({"boolq": "boolq"}, "aps/super_glue", BOOLQ, CHOICE, shown(BOOLQ, "passage"), VALIDATION),
    "lm_eval_winogrande": Case(
        {"winogrande": "winogrande_xl"},
        "allenai/winogrande",
        WINOGRANDE,
        CHOICE,
        shown(WINOGRANDE, "sentence"),
        VALIDATION,
    ),
    "lm_eval_wsc273": Case({"wsc273": "wsc273"}, "lighteval/winograd_wsc", WSC, CHOICE),
    "mmlu": Case(
        {f"mmlu_{subject}": subject for subject in ("anatomy", "high_school_world_history")},
        *("cais/mmlu", MMLU[3:9], CHOICE, MMLU),
        splits=("test", "dev"),
    ),
    **{
        f"anli_r{n}": Case(
            *({f"anli_r{n}": None}, "facebook/anli", ANLI, CHOICE, shown(ANLI, "premise")),
            splits=(f"test_r{n}", f"train_r{n}"),
            ours=anli,
        )
        for n in (1, 2, 3)
    },
    "truthfulqa_mc1": Case(
        {"truthfulqa_mc1": "multiple_choice"}, "truthfulqa/truthful_qa", TRUTHFUL, CHOICE, splits=VALIDATION
    ),
    "truthfulqa_mc2": Case(
        {"truthfulqa_mc2": "multiple_choice"}, "truthfulqa/truthful_qa", TRUTHFUL, {"mc2": "acc"}, splits=VALIDATION
    ),
}
