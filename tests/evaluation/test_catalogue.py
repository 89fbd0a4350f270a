"""The examples made of a record of each benchmark, exactly, and the fields of the dataset."""

import numpy as np
import pytest
import tensorflow_datasets as tfds
import tensorflow_datasets.text

from gptjax.config import UserError
from gptjax.evaluation import catalogue
from gptjax.evaluation.catalogue import BENCHMARKS, check_name, read_benchmark

# As tensorflow-datasets gives them: bytes, numpy integers and arrays.
RECORDS = {
    "lambada": {"passage": b"`` i see '' , said alice to her friend bob\n"},
    "hellaswag": {
        "activity_label": b"Removing ice",
        "context": b"A man is [step] outside.  He",
        "endings": np.array([b"sits.", b"[title] runs."], object),
        "label": np.int32(1),
        "source_id": b"",
        "split_type": b"",
    },
    "piqa": {"goal": b"To sort,", "sol1": b"laugh.", "sol2": b"compare.", "label": np.int64(1), "id": b""},
    "arc_easy": {
        "question": b"What is hot?",
        "choices": {"text": np.array([b"ice", b"fire", b"snow"], object), "label": np.array([0, 1, 2])},
        "answerKey": np.int64(1),
        "id": b"",
    },
    "openbookqa": {
        "question": {
            "stem": b"Ice is",
            **{f"choice_{c}": t for c, t in zip("ABCD", (b"hot", b"wet", b"cold", b"red"), strict=True)},
        },
        "answerKey": np.int64(2),
        "clarity": np.float32(1),
        "fact1": b"",
        "humanScore": np.float32(1),
        "turkIdAnonymized": b"",
    },
    "race_high": {
        "article": b"Ann ran.",
        "questions": np.array([b"Who?", b"When?"], object),
        "options": [[b"Ann", b"Bob", b"Cy", b"Di"], [b"now", b"then", b"soon", b"never"]],
        "answers": np.array([b"A", b"C"], object),
        "example_id": b"",
    },
    "story_cloze": {"context": b"Bob fell.", "endings": np.array([b"He rose.", b"Tea."], object), "label": np.int32(1)},
    "boolq": {"title": b"Force", "passage": b"It acts.", "question": b"does it act", "answer": np.bool_(True)},
    "winogrande": {
        "sentence": b"Ann saw Eve and _ waved.",
        "option1": b"Ann",
        "option2": b"Eve",
        "label": np.int64(0),
    },
    "wsc273": {
        "text": b"The cup broke when it fell.",
        "pronoun_start": np.int32(19),
        "pronoun_end": np.int32(21),
        "option1_normalized": b"the cup",
        "option2_normalized": b"the cat",
        "label": np.int32(0),
        "option1": b"The cup",
        "option2": b"The cat",
        "pronoun_text": b"it",
        "idx": np.int32(0),
    },
}
# Options, the right one first.
EXPECTED = {
    "lambada": [[('"i see", said alice to her friend', " bob")]],
    "hellaswag": [[("Removing ice: A man is outside. He", " runs."), ("Removing ice: A man is outside. He", " sits.")]],
    "piqa": [[("To sort,", " compare."), ("To sort,", " laugh.")]],
    "arc_easy": [[("Question: What is hot?\nAnswer:", f" {text}") for text in ("fire", "ice", "snow")]],
    "openbookqa": [[("Ice is", f" {text}") for text in ("cold", "hot", "wet", "red")]],
    "race_high": [
        [("Article: Ann ran.\n\nQ: Who?\n\nA:", f" {text}") for text in ("Ann", "Bob", "Cy", "Di")],
        [("Article: Ann ran.\n\nQ: When?\n\nA:", f" {text}") for text in ("soon", "now", "then", "never")],
    ],
    "story_cloze": [[("Bob fell.", " He rose."), ("Bob fell.", " Tea.")]],
    "boolq": [[("Force -- It acts.\nquestion: does it act?\nanswer:", f" {text}") for text in ("yes", "no")]],
    "winogrande": [[("Ann saw Eve and Ann", " waved."), ("Ann saw Eve and Eve", " waved.")]],
    "wsc273": [[("The cup broke when the cup", " fell."), ("The cup broke when the cat", " fell.")]],
}
SAME_SCHEMA = {"arc_challenge": "arc_easy", "race_middle": "race_high"}
NAMES = [*RECORDS, *SAME_SCHEMA]  # the others: test_published_prompts.py


@pytest.fixture
def records(monkeypatch):
    """Serves the records above for every split, and notes which were asked for."""
    asked = []

    def open_tfds(name, split, spec):
        asked.append((name, split))
        key = next(key for key in NAMES if BENCHMARKS[key].dataset == name)
        return None, [RECORDS[SAME_SCHEMA.get(key, key)]]

    monkeypatch.setattr(catalogue, "open_tfds", open_tfds)
    return asked


@pytest.mark.parametrize("name", NAMES)
def test_examples_to_the_letter(name, records):
    found = read_benchmark(name, 0)
    expected = EXPECTED[SAME_SCHEMA.get(name, name)]
    assert len(found.asked) == len(expected)
    for example, (right, *wrong) in zip(found.asked, expected, strict=True):
        options = list(example.options)
        assert options.pop(example.answer) == right
        assert options == wrong
    assert records == [(BENCHMARKS[name].dataset, BENCHMARKS[name].split)]


@pytest.mark.parametrize("name", NAMES)
def test_shots_come_from_their_own_split(name, records):
    found = read_benchmark(name, 1)
    benchmark = BENCHMARKS[name]
    assert (found.shots is found.asked) == (benchmark.shots is None)
    assert [split for _, split in records] == [s for s in (benchmark.split, benchmark.shots) if s is not None]


@pytest.mark.parametrize("name", NAMES)
def test_fields_are_those_of_the_dataset(name, tmp_path):
    builder = tfds.builder(BENCHMARKS[name].dataset, data_dir=tmp_path, file_format="array_record")
    record = RECORDS[SAME_SCHEMA.get(name, name)]
    assert set(record) == set(builder.info.features)
    for field, value in record.items():
        if isinstance(value, dict):
            assert set(value) == set(builder.info.features[field].keys())


def test_a_split_without_labels_is_named(records, monkeypatch):
    monkeypatch.setitem(RECORDS, "piqa", {**RECORDS["piqa"], "label": np.int64(-1)})
    with pytest.raises(UserError, match="example 0 of tfds:piqa@validation has no label"):
        read_benchmark("piqa", 0)


def test_a_dataset_as_it_is_read(tmp_path, monkeypatch):
    """Through tensorflow-datasets itself, with random values of its schema."""
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))
    with tfds.testing.mock_data(num_examples=3):
        for name in ("arc_easy", "boolq", "winogrande"):
            found = read_benchmark(name, 1)
            assert (len(found.asked), len(found.shots)) == (3, 3)
            assert all(isinstance(text, str) for example in found.asked for pair in example.options for text in pair)


def test_names():
    check_name("perplexity", ("perplexity",))
    with pytest.raises(UserError, match="unknown task 'lambda': did you mean 'lambada'"):
        check_name("lambda", ())
    with pytest.raises(UserError, match=r"unknown task 'q': known are lambada, .*ending in \.jsonl"):
        check_name("q", ())
