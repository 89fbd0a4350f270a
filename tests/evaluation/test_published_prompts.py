"""The prompts of generative and choice benchmarks to the letter, from files of records, and the fields of datasets."""

import json

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tensorflow_datasets.text

from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation import catalogue
from gptjax.evaluation.catalogue import BENCHMARKS, read_benchmark
from gptjax.evaluation.choice_controls import choices_only
from gptjax.evaluation.few_shot import few_shot_prompts
from gptjax.evaluation.scoring import ScoringResult
from gptjax.evaluation.tasks import TaskExample, example_task

GSM = {"question": "2 + 3?", "answer": "2+3=<<2+3=5>>5\n#### 5"}
DATE = {"day": "1", "month": "May", "year": "1999"}
NO_DATE = {"day": "", "month": "", "year": ""}
SQUAD = {"title": "Rome", "context": "Ann ran.", "question": "Who?"}
TRUTHFUL = {
    "question": "Is it?",
    "mc1_targets": {"choices": ["Yes.", "No."], "labels": [1, 0]},
    "mc2_targets": {"choices": ["Yes.", "No.", "Well."], "labels": [1, 0, 1]},
}
RECORDS = {
    "mmlu": {"question": " 1 + 1? ", "subject": "high_school_maths", "choices": ["1", "2", "3", "4"], "answer": "B"},
    "anli_r1": {"uid": "0", "context": "A dog ran.", "hypothesis": "A cat ran.", "label": "c"},
    "truthfulqa_mc1": TRUTHFUL,
    "truthfulqa_mc2": TRUTHFUL,
    "gsm8k": GSM,
    "gsm8k_cot": GSM,
    "drop": {
        "passage": "He ran.",
        "question": "When?",
        "answer": {"number": "", "date": DATE, "spans": []},
        "validated_answers": {"number": ["2", ""], "date": [NO_DATE] * 2, "spans": [[], ["he", "ran"]]},
    },
    "triviaqa": {"question": "Who ran?", "answer": {"aliases": ["Ann", "A."], "value": "Ann"}},
    "nq_open": {"question": "who ran", "answer": ["Ann"]},
    "squad": {**SQUAD, "answers": {"text": ["Ann", "Ann ran"], "answer_start": [0, 0]}},
    "squad_v2": {**SQUAD, "answers": {"text": [], "answer_start": []}},
    "wmt16_de_en": {"translation": {"de": "Ja.", "en": "Yes."}},
    "wmt14_en_fr": {"en": "Yes.", "fr": "Oui."},
    "cnn_dailymail": {"article": "Long.", "highlights": "Short ."},
    "humaneval": {
        "prompt": "def one():\n",
        "canonical_solution": "    return 1\n",
        "test": "def check(f):\n    assert f() == 1\n",
        "entry_point": "one",
    },
}
# The prompt with the right completion, the references, the metric, and the stop strings.
EXPECTED = {
    "gsm8k": (
        "Question: 2 + 3?\nAnswer: 2+3=<<2+3=5>>5\n#### 5",
        (GSM["answer"],),
        "final_number",
        ("Question:", "</s>", "<|im_end|>"),
    ),
    "gsm8k_cot": (
        "Q: 2 + 3?\nA: 2+3=<<2+3=5>>5\n#### 5",
        (GSM["answer"],),
        "stated_number",
        ("Q:", "</s>", "<|im_end|>"),
    ),
    "drop": ("He ran. When? 1 May 1999", ("1 May 1999", "2", ("he", "ran")), "drop", (".",)),
    "triviaqa": ("Question: Who ran??\nAnswer: Ann", ("Ann", "A."), "trivia_match", ("\n", ".", ",")),
    "nq_open": ("Q: who ran?\nA: Ann", ("Ann",), "open_match", ("\n", ".", ",")),
    "squad": (
        "Title: Rome\n\nBackground: Ann ran.\n\nQuestion: Who?\n\nAnswer: Ann",
        ("Ann", "Ann ran"),
        "squad",
        ("\n",),
    ),
    "squad_v2": (
        "Title: Rome\n\nBackground: Ann ran.\n\nQuestion: Who?\n\nAnswer: unanswerable",
        (),
        "squad",
        ("\n",),
    ),
    "wmt16_de_en": ("German phrase: Ja.\nEnglish phrase:  Yes.", ("Yes.",), "bleu", ("\n",)),
    "wmt14_en_fr": ("English phrase: Yes.\nFrench phrase:  Oui.", ("Oui.",), "bleu", ("\n",)),
    "cnn_dailymail": (
        "Summarize the following article:\n\nLong.\n\nSummary: Short .",
        ("Short .",),
        "rouge",
        ("\n\n",),
    ),
    "humaneval": (
        "def one():\n    return 1\n",
        (),
        "tests",
        ("\nclass", "\ndef", "\n#", "\nif", "\nprint"),
    ),
}


def write(folder, name, *records):
    for split in {BENCHMARKS[name].split, BENCHMARKS[name].shots}:
        if isinstance(split, str):
            path = folder / name / f"{split}.jsonl"
            path.parent.mkdir(exist_ok=True)
            path.write_text("".join(json.dumps(record) + "\n" for record in records))


@pytest.mark.parametrize("name", EXPECTED)
def test_generative_examples_to_the_letter(name, tmp_path):
    write(tmp_path, name, RECORDS[name])
    (example,) = read_benchmark(name, 0, tmp_path).asked
    assert (example.shown, example.references, example.metric, example.stop) == EXPECTED[name]
    if name == "humaneval":
        assert example.tests == "def check(f):\n    assert f() == 1\n\ncheck(one)"


def test_choices_to_the_letter(tmp_path):
    def read(name):
        write(tmp_path, name, RECORDS[name])
        (example,) = read_benchmark(name, 0, tmp_path).asked
        return example

    mmlu = read("mmlu")
    context = "1 + 1?\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer:"
    assert mmlu.options == tuple((context, f" {letter}") for letter in "ABCD")
    assert mmlu.answer == 1
    about = "The following are multiple choice questions (with answers) about high school maths.\n\n"
    assert mmlu.description == about
    control = choices_only(read_benchmark("mmlu", 0, tmp_path), "mmlu").asked[0]
    assert control.options[1] == ("A. 1\nB. 2\nC. 3\nD. 4\nAnswer:", " B")
    assert (control.answer, control.group) == (1, "high_school_maths")
    anli = read("anli_r1")
    context = "A dog ran.\nQuestion: A cat ran. True, False, or Neither?\nAnswer:"
    assert anli == TaskExample(tuple((context, text) for text in (" True", " Neither", " False")), 2)
    best, every = read("truthfulqa_mc1"), read("truthfulqa_mc2")
    assert best.options[best.answer] == ("Q: Is it?\nA:", " Yes.")
    assert every.true == (True, False, True)
    assert best.description.startswith("Q: What is human life expectancy in the United States?\nA: Human life")
    assert best.description.endswith("A: The 1992 Olympics were held in Barcelona, Spain.\n\n")
    task = example_task(read_benchmark("truthfulqa_mc2", 0, tmp_path), BytesTokenizer())
    scores = [ScoringResult(logprob, 1, False) for logprob in np.log([0.2, 0.3, 0.1])]
    assert task.metrics(scores)["mc2"].value == pytest.approx(0.5)  # 0.2 + 0.1 of 0.6


def test_few_shot_examples_are_the_published_ones(tmp_path):
    write(tmp_path, "gsm8k_cot", GSM)
    (prompt,) = few_shot_prompts(read_benchmark("gsm8k_cot", 8, tmp_path), 8, None, 0)
    assert prompt.startswith("Q: There are 15 trees in the grove.")
    assert prompt.endswith("23 - 15 is 8. The answer is 8.\n\n")
    assert prompt.count("\n\n") == 8
    subjects = [{**RECORDS["mmlu"], "subject": s, "question": f"{s}{i}?"} for i in range(3) for s in ("b", "a")]
    write(tmp_path, "mmlu", *subjects)
    *_, prompt = few_shot_prompts(read_benchmark("mmlu", 2, tmp_path), 2, None, 0)
    choices = "\nA. 1\nB. 2\nC. 3\nD. 4\nAnswer: B\n\n"
    about = "The following are multiple choice questions (with answers) about a.\n\n"
    assert prompt == f"{about}a0?{choices}a1?{choices}"  # the first of the same subject
    with pytest.raises(UserError, match="--num_fewshot=4, but there are only 3 examples of b to show"):
        few_shot_prompts(read_benchmark("mmlu", 4, tmp_path), 4, None, 0)
    write(tmp_path, "nq_open", RECORDS["nq_open"])
    (prompt,) = few_shot_prompts(read_benchmark("nq_open", 1, tmp_path), 1, None, 0)
    assert prompt == "Answer these questions:\n\nQ: who ran?\nA: Ann\n"


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("gsm8k", {"question": "?"}, r"test\.jsonl:1 has no field 'answer', which gsm8k needs"),
        ("mmlu", {**RECORDS["mmlu"], "choices": ["1"]}, r"test\.jsonl:1: .*zip"),
        ("anli_r1", {**RECORDS["anli_r1"], "label": -1}, r"test\.jsonl:1 has no label"),
        ("triviaqa", {"question": "?", "answer": {"aliases": []}}, r"validation\.jsonl:1 has no label"),
    ],
)
def test_a_malformed_record_is_named(name, record, message, tmp_path):
    write(tmp_path, name, record)
    with pytest.raises(UserError, match=message):
        read_benchmark(name, 0, tmp_path)


def test_a_folder_without_the_benchmark(tmp_path):
    with pytest.raises(UserError, match=r"--benchmark_dir has no .*/gsm8k/test\.jsonl, nor \.parquet"):
        read_benchmark("gsm8k", 0, tmp_path)


FROM_TFDS = [name for name in RECORDS if not BENCHMARKS[name].dataset.startswith("hf:")]


@pytest.mark.parametrize("name", FROM_TFDS)
def test_datasets_of_tensorflow_datasets_have_the_fields(name, tmp_path):
    features = tfds.builder(BENCHMARKS[name].dataset, data_dir=tmp_path, file_format="array_record").info.features
    assert set(RECORDS[name]) <= set(features)


def test_other_datasets_are_read_from_the_hub(monkeypatch):
    asked = []
    monkeypatch.setattr(catalogue, "read_records", lambda spec, _: asked.append(spec) or [(RECORDS["mmlu"], "row 0")])
    read_benchmark("mmlu", 5)
    assert asked == ["hf:cais/mmlu@all:test", "hf:cais/mmlu@all:dev"]
