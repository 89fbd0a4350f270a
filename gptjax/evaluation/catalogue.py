"""Published benchmarks by name: their tensorflow-datasets source and the conversion of their examples.

Prompts follow Brown et al. 2020, Appendix G. Few-shot examples come from the training split or, as in that paper, from
the development split where there is no training split.
"""

import dataclasses
import re
from collections.abc import Callable, Iterator
from typing import Any

from gptjax.config import UserError, nearest
from gptjax.data.sources import open_tfds
from gptjax.evaluation import tasks
from gptjax.evaluation.detokenizers import DETOKENIZERS
from gptjax.evaluation.tasks import Examples, TaskExample


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The source of a benchmark.

    Attributes:
      dataset: name in tensorflow-datasets.
      split: split to evaluate.
      shots: split of the few-shot examples; None: `split` itself.
      examples: converts a record, with decoded text, to examples.
      few_shot_form: see `example_task`.
    """

    dataset: str
    split: str
    shots: str | None
    examples: Callable[[dict[str, Any]], list[TaskExample]]
    few_shot_form: Callable[[TaskExample], TaskExample] | None = None


def _lambada(record: dict[str, Any]) -> list[TaskExample]:
    # The release is tokenised and in lower case. OpenAI's file, used for their published numbers, is a task file.
    return [tasks.last_word(DETOKENIZERS["lambada"].to_plain(record["passage"].strip()))]


def _hellaswag(record: dict[str, Any]) -> list[TaskExample]:
    def plain(text: str) -> str:  # WikiHow's [title], [step] and [substeps] are marks of the format
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return " ".join(text.split())

    context = plain(f"{record['activity_label']}: {record['context']}")
    return [tasks.choices(context, [plain(ending) for ending in record["endings"]], record["label"])]


def _piqa(record: dict[str, Any]) -> list[TaskExample]:
    return [tasks.choices(record["goal"], [record["sol1"], record["sol2"]], record["label"])]


def _arc(record: dict[str, Any]) -> list[TaskExample]:
    # Labels are class indices of letters, and the letters of a question's choices need not begin with A.
    answer = list(record["choices"]["label"]).index(record["answerKey"])
    return [tasks.choices(f"Question: {record['question']}\nAnswer:", record["choices"]["text"], answer)]


def _openbookqa(record: dict[str, Any]) -> list[TaskExample]:
    question = record["question"]
    return [tasks.choices(question["stem"], [question[f"choice_{c}"] for c in "ABCD"], record["answerKey"])]


def _race(record: dict[str, Any]) -> list[TaskExample]:
    return [
        tasks.choices(f"Article: {record['article']}\n\nQ: {question}\n\nA:", options, "ABCD".index(answer))
        for question, options, answer in zip(record["questions"], record["options"], record["answers"], strict=True)
    ]


def _story_cloze(record: dict[str, Any]) -> list[TaskExample]:
    return [tasks.choices(record["context"], record["endings"], record["label"] - 1)]  # counted from 1


def _bool_q(record: dict[str, Any]) -> list[TaskExample]:
    context = f"{record['title']} -- {record['passage']}\nquestion: {record['question']}?\nanswer:"
    return [tasks.choices(context, ["no", "yes"], int(record["answer"]))]


def _winogrande(record: dict[str, Any]) -> list[TaskExample]:
    options = [record["option1"], record["option2"]]
    return [tasks.both_contexts(record["sentence"], options, record["label"], blank="_")]


def _wsc273(record: dict[str, Any]) -> list[TaskExample]:
    before, after = record["text"][: record["pronoun_start"]], record["text"][record["pronoun_end"] :]
    options = [record["option1_normalized"], record["option2_normalized"]]
    return [TaskExample(tuple((before + option, after) for option in options), record["label"])]


BENCHMARKS = {
    "lambada": Benchmark("lambada", "test", "train", _lambada, tasks.as_blank),
    "hellaswag": Benchmark("hellaswag", "validation", "train", _hellaswag),
    "piqa": Benchmark("piqa", "validation", "train", _piqa),
    "arc_easy": Benchmark("ai2_arc/ARC-Easy", "test", "train", _arc),
    "arc_challenge": Benchmark("ai2_arc/ARC-Challenge", "test", "train", _arc),
    "openbookqa": Benchmark("openbookqa", "test", "train", _openbookqa),
    "race_middle": Benchmark("race/middle", "test", "train", _race),
    "race_high": Benchmark("race/high", "test", "train", _race),
    "story_cloze": Benchmark("story_cloze/2016", "test", "validation", _story_cloze),
    "boolq": Benchmark("bool_q", "validation", "train", _bool_q),
    "winogrande": Benchmark("winogrande", "validation", "train_xl", _winogrande),
    "wsc273": Benchmark("wsc273", "test", None, _wsc273),
}


def check_name(name: str, others: tuple[str, ...]) -> None:
    """Raises UserError unless `name` is a benchmark or one of the `others`."""
    known = [*BENCHMARKS, *others]
    if name not in known:
        raise UserError(
            f"unknown task {name!r}{nearest(name, known)}; a task file is given by its path, ending in .jsonl"
        )


def read_benchmark(name: str, num_fewshot: int) -> Examples:
    """Reads the examples of a benchmark, downloaded on first use.

    Raises:
      UserError: it cannot be downloaded or read, or its split has no labels.
    """
    benchmark = BENCHMARKS[name]
    asked = list(_read(benchmark, benchmark.split))
    if num_fewshot == 0 or benchmark.shots is None:
        return Examples(asked, asked)
    return Examples(asked, list(_read(benchmark, benchmark.shots)))


def _read(benchmark: Benchmark, split: str) -> Iterator[TaskExample]:
    what = f"tfds:{benchmark.dataset}@{split}"
    _, records = open_tfds(benchmark.dataset, split, what)
    for index, record in enumerate(records):
        try:
            examples = benchmark.examples(_decoded(record))
        except ValueError as error:
            raise UserError(f"example {index} of {what}: {error}") from None
        for example in examples:
            if not 0 <= example.answer < len(example.options):
                raise UserError(f"example {index} of {what} has no label: use a split with labels")
            yield example


def _decoded(value: Any) -> Any:
    """Converts a record to Python types: bytes to str, numpy scalars to int or float, and arrays to lists."""
    if isinstance(value, dict):
        return {name: _decoded(part) for name, part in value.items()}
    if isinstance(value, list | tuple) or (hasattr(value, "ndim") and value.ndim > 0):
        return [_decoded(part) for part in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if hasattr(value, "item") else value
