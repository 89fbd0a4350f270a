"""The examples with prompts of lm-evaluation-harness to the letter, and how it draws few-shot examples."""

import dataclasses
import json
import random

import pytest

from gptjax.config import UserError
from gptjax.data.tokenizers import BytesTokenizer
from gptjax.evaluation.catalogue import BENCHMARKS, read_benchmark
from gptjax.evaluation.few_shot import Examples, few_shot_prompts
from gptjax.evaluation.harness_prompts import winogrande, wsc273
from gptjax.evaluation.scoring import ScoringResult
from gptjax.evaluation.tasks import TaskExample, example_task
from tests.evaluation.harness_cases import CHOICES

RACE_PROMPT = (
    "Article: Ann ran to Rome.\nThen she sat.\n\nQuestion: Who ran?\nAnswer: Ann\nShe ran to  Rome\nThen she _ ."
)
# The options of the first record, and which is right.
EXPECTED = {
    "lambada_openai": ([('He said "I see", and then he told his  old friend', " Bob")], 0),
    "lm_eval_hellaswag": (
        [
            ("Removing ice: A man is outside.  He has a tool. Then bob", f" {ending}")
            for ending in ("sits.. Then he  goes.", " runs away.", "answers no.", "is Rome.")
        ],
        3,
    ),
    "lm_eval_piqa": ([("Question: To sort, \nAnswer:", f" {text}") for text in ("laugh.", "compare. ")], 1),
    "lm_eval_race": ([(RACE_PROMPT, f" {text}") for text in ("ran", "saw", "fell", "sat")], 3),
    "lm_eval_boolq": ([("It acts.  Rome\nQuestion: does it act?\nAnswer:", f" {text}") for text in ("no", "yes")], 1),
    "lm_eval_winogrande": ([("Ann saw Eve and Ann", " waved."), ("Ann saw Eve and Eve", " waved.")], 0),
    "lm_eval_wsc273": ([("The cup broke when the cup", "  fell."), ("The cup broke when the cat", "  fell.")], 0),
    "openbookqa": ([("Ice is", f" {text}") for text in ("hot", "wet ", "cold", "red")], 2),
    "story_cloze": ([("Bob fell. It hurt. He sat. Ann came.", f" {e}") for e in ("He rose.", "The answer is 7.")], 0),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_examples_to_the_letter(name, tmp_path):
    path = tmp_path / name / f"{BENCHMARKS[name].split}.jsonl"
    path.parent.mkdir()
    path.write_text("".join(json.dumps(record) + "\n" for record in CHOICES[name].asked))
    example = read_benchmark(name, 0, tmp_path).asked[0]
    assert (list(example.options), example.answer) == EXPECTED[name]


def test_the_rest_of_a_sentence_follows_after_a_blank():
    ((option, _),) = (example.options for example in winogrande(CHOICES["lm_eval_winogrande"].asked[1]))
    assert option == ("Ann took Bob", " 's hat.")
    (example,) = wsc273(CHOICES["lm_eval_wsc273"].asked[1])
    assert example.options == (
        ("Ann saw Eve. Ann's", "  hat fell on Rome."),
        ("Ann saw Eve. The Eve's", "  hat fell on Rome."),
    )


def test_a_split_without_labels_is_named(tmp_path):
    record = {**CHOICES["lm_eval_hellaswag"].asked[0], "label": ""}
    path = tmp_path / "lm_eval_hellaswag" / "validation.jsonl"
    path.parent.mkdir()
    path.write_text(json.dumps(record) + "\n")
    with pytest.raises(UserError, match="has no label: use a split with labels"):
        read_benchmark("lm_eval_hellaswag", 0, tmp_path)


@pytest.mark.parametrize("spare", [False, True])
def test_few_shot_examples_are_drawn_as_by_the_harness(spare):
    shots = [TaskExample(((f"q{n}", " a "),)) for n in range(9)]
    prompts = few_shot_prompts(Examples(shots[:4], shots, spare=spare), 2, None, 1234)
    rng = random.Random(1234)
    drawn = [rng.sample(range(9), 2 + spare)[:2] for _ in range(4)]
    assert prompts == ["".join(f"q{n} a \n\n" for n in places) for places in drawn]


def test_an_option_is_as_long_as_it_is_in_the_file():
    example = TaskExample((("q", " a  "), ("q", " bb")), answer=1)
    task = example_task(Examples([example], []), BytesTokenizer())
    scores = [ScoringResult(-4.0, 4, False), ScoringResult(-3.0, 3, False)]
    assert task.metrics(scores)["accuracy_per_character"].value == 0  # -4/3 is more than -3/2
    empty = example_task(
        Examples([dataclasses.replace(example, options=(("q", " "), ("q", " bb")))], []), BytesTokenizer()
    )
    assert empty.metrics(scores)["accuracy_per_character"].value == 1
