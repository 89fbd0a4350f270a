"""Published benchmarks by name: their dataset and the conversion of its records to examples.

Prompts follow Brown et al. 2020, Appendix G, or those stated in `gptjax/evaluation/published_prompts.py`; where the
prompts of lm-evaluation-harness differ from the former, the benchmark `lm_eval_NAME` has them. Few-shot examples come
from the training split or, as in that paper, from the development split where there is no training split.

Datasets are those of tensorflow-datasets, or else of the Hugging Face Hub: MMLU, TruthfulQA and HumanEval, which the
former does not have, nor CLUE's; TriviaQA and CNN/DailyMail, which it prepares with TensorFlow only; DROP, as it keeps
one span of an answer; and WMT, as it prepares the training data too.
"""

import dataclasses
import glob
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gptjax.config import UserError, nearest
from gptjax.data.records import read_records
from gptjax.data.sources import open_tfds
from gptjax.data.text_files import json_objects, read_lines
from gptjax.evaluation import clue_prompts, harness_prompts, published_prompts, tasks
from gptjax.evaluation.detokenizers import DETOKENIZERS
from gptjax.evaluation.few_shot import SEPARATOR, Examples
from gptjax.evaluation.generative_examples import GenerativeExample
from gptjax.evaluation.tasks import TaskExample

AnyExample = TaskExample | GenerativeExample


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """The source of a benchmark.

    Attributes:
      dataset: name in tensorflow-datasets, or hf:OWNER/NAME@CONFIG.
      split: split to evaluate.
      shots: split of the few-shot examples, or these; None: `split` itself.
      examples: converts a record, with decoded text, to examples.
      few_shot_form: see `example_task`.
      num_fewshot: published number of few-shot examples, the default.
      separator, sampled: see `few_shot.Examples`.
      runs_programs: whether completions are run as programs.
      name_field: where it is not None, records have no names of their classes: those of labels.json, by label, are
        added to each as `label_names`. The field of that file with the names.
    """

    dataset: str
    split: str
    shots: str | Callable[[], Sequence[AnyExample]] | None
    examples: Callable[[dict[str, Any]], Sequence[AnyExample]]
    few_shot_form: Callable[[TaskExample], TaskExample] | None = None
    num_fewshot: int = 0
    separator: str = SEPARATOR
    sampled: bool = True
    runs_programs: bool = False
    name_field: str | None = None


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
    context, options = f"Question: {record['question']}\nAnswer:", record["choices"]["text"]
    return [harness_prompts.after_blank(context, options, answer, by_answer_prompt=True)]


def _openbookqa(record: dict[str, Any]) -> list[TaskExample]:
    if "question_stem" in record:  # of the Hub
        stem, options = record["question_stem"], record["choices"]["text"]
        answer = list(record["choices"]["label"]).index(record["answerKey"].lstrip())
    else:
        stem, answer = record["question"]["stem"], record["answerKey"]
        options = [record["question"][f"choice_{c}"] for c in "ABCD"]
    return [harness_prompts.after_blank(stem, options, answer, by_answer_prompt=True)]


def _race(record: dict[str, Any]) -> list[TaskExample]:
    return [
        tasks.choices(f"Article: {record['article']}\n\nQ: {question}\n\nA:", options, "ABCD".index(answer))
        for question, options, answer in zip(record["questions"], record["options"], record["answers"], strict=True)
    ]


def _story_cloze(record: dict[str, Any]) -> list[TaskExample]:
    if "sentence_quiz1" in record:  # of the Hub
        context = " ".join(record[f"input_sentence_{n}"] for n in (1, 2, 3, 4))
        endings, answer = [record["sentence_quiz1"], record["sentence_quiz2"]], record["answer_right_ending"]
    else:
        context, endings, answer = record["context"], record["endings"], record["label"]
    return [harness_prompts.after_blank(context, endings, answer - 1, by_answer_prompt=True)]  # counted from 1


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


_TRUTHFUL_QA = "hf:truthfulqa/truthful_qa@multiple_choice"
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
    "lambada_openai": Benchmark("hf:EleutherAI/lambada_openai@default", "test", None, harness_prompts.lambada),
    "lambada_standard": Benchmark("hf:cimec/lambada@", "test", "validation", harness_prompts.lambada),
    "lm_eval_hellaswag": Benchmark("hf:Rowan/hellaswag@", "validation", "train", harness_prompts.hellaswag),
    "lm_eval_piqa": Benchmark("hf:baber/piqa@", "validation", "train", harness_prompts.piqa),
    "lm_eval_race": Benchmark("hf:EleutherAI/race@high", "test", None, harness_prompts.race),
    "lm_eval_boolq": Benchmark("hf:aps/super_glue@boolq", "validation", "train", harness_prompts.bool_q),
    "lm_eval_winogrande": Benchmark(
        *("hf:allenai/winogrande@winogrande_xl", "validation", "train", harness_prompts.winogrande),
    ),
    "lm_eval_wsc273": Benchmark("hf:lighteval/winograd_wsc@wsc273", "test", None, harness_prompts.wsc273),
    "mmlu": Benchmark("hf:cais/mmlu@all", "test", "dev", published_prompts.mmlu, num_fewshot=5, sampled=False),
    **{f"anli_r{n}": Benchmark(f"anli/r{n}", "test", "train", published_prompts.anli) for n in (1, 2, 3)},
    "truthfulqa_mc1": Benchmark(_TRUTHFUL_QA, "validation", None, published_prompts.truthful_best),
    "truthfulqa_mc2": Benchmark(_TRUTHFUL_QA, "validation", None, published_prompts.truthful_all),
    "gsm8k": Benchmark("gsm8k", "test", "train", published_prompts.gsm8k, num_fewshot=5),
    "gsm8k_cot": Benchmark(
        *("gsm8k", "test", published_prompts.worked_solutions, published_prompts.gsm8k_cot),
        num_fewshot=8,
        sampled=False,
    ),
    "drop": Benchmark("hf:EleutherAI/drop@", "validation", "train", published_prompts.drop),
    "triviaqa": Benchmark("hf:mandarjoshi/trivia_qa@rc.nocontext", "validation", "train", published_prompts.trivia_qa),
    "nq_open": Benchmark(
        *("natural_questions_open", "validation", "train", published_prompts.natural_questions),
        separator="\n",
    ),
    "squad": Benchmark("squad/v1.1", "validation", "train", published_prompts.squad),
    "squad_v2": Benchmark("squad/v2.0", "validation", "train", published_prompts.squad_v2),
    **{
        f"{wmt}_{source}_{target}": Benchmark(
            f"hf:wmt/{wmt}@{pair}", "test", "validation", published_prompts.translation(source, target)
        )
        for wmt, pair, other in (("wmt14", "fr-en", "fr"), ("wmt16", "de-en", "de"), ("wmt16", "ro-en", "ro"))
        for source, target in ((other, "en"), ("en", other))
    },
    "cnn_dailymail": Benchmark("hf:abisee/cnn_dailymail@3.0.0", "test", "train", published_prompts.cnn_dailymail),
    "humaneval": Benchmark(
        *("hf:openai/openai_humaneval@", "test", None, published_prompts.human_eval),
        runs_programs=True,
    ),
    "clue_afqmc": Benchmark("hf:clue/clue@afqmc", "validation", "train", clue_prompts.afqmc),
    "clue_tnews": Benchmark("hf:clue/clue@tnews", "validation", "train", clue_prompts.tnews),
    "clue_iflytek": Benchmark(
        *("hf:clue/clue@iflytek", "validation", "train", clue_prompts.iflytek),
        name_field="label_des",
    ),
    "clue_cmnli": Benchmark("hf:clue/clue@cmnli", "validation", "train", clue_prompts.cmnli),
    "clue_csl": Benchmark("hf:clue/clue@csl", "validation", "train", clue_prompts.csl),
    "clue_wsc": Benchmark("hf:clue/clue@cluewsc2020", "validation", "train", clue_prompts.wsc),
}
LABELS_FILE = "labels.json"
_CLUE_SPLITS = {"validation": "dev"}  # names of CLUE's files, where they differ


def check_name(name: str, others: tuple[str, ...]) -> None:
    """Raises UserError unless `name` is a benchmark or one of the `others`."""
    known = [*BENCHMARKS, *others]
    if name not in known:
        raise UserError(
            f"unknown task {name!r}{nearest(name, known)}; a task file is given by its path, ending in .jsonl"
        )


def read_benchmark(name: str, num_fewshot: int, folder: Path | None = None) -> Examples[Any]:
    """Reads the examples of a benchmark, all `TaskExample` or all `GenerativeExample`.

    Args:
      num_fewshot: 0: few-shot examples need not be read.
      folder: has the records of each split as <folder>/<name>/<split>.jsonl or .parquet, with the fields of the
        dataset, or CLUE's own files; None: the dataset is downloaded on first use.

    Raises:
      UserError: it cannot be downloaded or read, or its split has no labels.
    """
    benchmark = BENCHMARKS[name]
    asked = list(_read(name, benchmark.split, folder))
    shots: Sequence[AnyExample] = asked
    if num_fewshot > 0 and benchmark.shots is not None:
        given = benchmark.shots
        shots = list(_read(name, given, folder)) if isinstance(given, str) else given()
    return Examples(asked, shots, benchmark.separator, benchmark.sampled, spare=benchmark.split != "test")


def _read(name: str, split: str, folder: Path | None) -> Iterator[AnyExample]:
    benchmark = BENCHMARKS[name]
    added = {} if benchmark.name_field is None else {"label_names": _label_names(name, benchmark.name_field, folder)}
    for record, place in _records(name, benchmark, split, folder):
        try:
            examples = benchmark.examples(_decoded(dict(record)) | added)
        except KeyError as error:
            raise UserError(f"{place} has no field {error}, which {name} needs") from None
        except (ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{place}: {error}") from None
        for example in examples:
            if isinstance(example, TaskExample):
                labelled = 0 <= example.answer < len(example.options)
            else:
                labelled = bool(example.references or example.tests or example.labels)
            if not labelled:
                raise UserError(f"{place} has no label: use a split with labels")
            yield example


def _records(
    name: str, benchmark: Benchmark, split: str, folder: Path | None
) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Yields the records of a split, each with its place for error messages."""
    if folder is not None:
        for file in (f"{split}.jsonl", f"{split}.parquet", f"{_CLUE_SPLITS.get(split, split)}.json"):
            if (path := folder / name / file).is_file():
                kind = "parquet" if path.suffix == ".parquet" else "jsonl"
                yield from read_records(f"{kind}:{glob.escape(str(path))}", "error")
                return
        raise UserError(f"--benchmark_dir has no {folder / name / split}.jsonl, nor .parquet: put the split there")
    if benchmark.dataset.startswith("hf:"):
        yield from read_records(f"{benchmark.dataset}:{split}", "error")
        return
    what = f"tfds:{benchmark.dataset}@{split}"
    for index, record in enumerate(open_tfds(benchmark.dataset, split, what)[1]):
        yield record, f"example {index} of {what}"


def _label_names(name: str, field: str, folder: Path | None) -> dict[str, str]:
    """Reads the names of the classes by label, in the order of labels.json."""
    if folder is None:
        raise UserError(
            f"{name} needs --benchmark_dir: the names of its classes are in {LABELS_FILE} of CLUE's archive"
        )
    path = folder / name / LABELS_FILE
    if not path.is_file():
        raise UserError(f"--benchmark_dir has no {path}: put CLUE's there, which has the names of the classes")
    names = {}
    for record, place in json_objects(read_lines(path)):
        if not (isinstance(record.get("label"), str) and isinstance(record.get(field), str)):
            raise UserError(f"{place} needs the texts label and {field}")
        names[record["label"]] = record[field]
    return names


def _decoded(value: Any) -> Any:
    """Converts a record to Python types: bytes to str, numpy scalars to int or float, and arrays to lists."""
    if isinstance(value, dict):
        return {name: _decoded(part) for name, part in value.items()}
    if isinstance(value, list | tuple) or (hasattr(value, "ndim") and value.ndim > 0):
        return [_decoded(part) for part in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    return value.item() if hasattr(value, "item") else value
