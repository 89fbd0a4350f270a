"""Labelled rows: their fields, however the columns are called, and user errors that name the place."""

import numpy as np
import pytest
import tensorflow_datasets as tfds

from gptjax.config import UserError
from gptjax.data import records
from gptjax.data.labelled import ROLES, Row, read_rows, split_rows


def fields(rows: list[Row]) -> list[dict]:
    return [row.fields for row in rows]


# --- roles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ROLES)
def test_a_column_that_is_called_as_its_role_wins(kind, write):
    values = {"choices": ["a", "b"], "tokens": ["a"], "tags": ["x"], "answers": {"text": ["t"], "answer_start": [0]}}
    row = {role: values.get(role, "text" if role != "label" else 1) for role in ROLES[kind]}
    others = {name: "no" for names in ROLES[kind].values() for name in names if name not in row}
    found = read_rows(f"jsonl:{write('a.jsonl', others | row)}", kind)[0].fields
    named = kind in ("classification", "entailment", "similarity")
    assert found == (row | {"label": "1"} if named else row)


def test_columns_of_the_config_come_first(write):
    path = write("a.jsonl", {"text": "wrong", "body": "a", "stars": 4, "title": "b"})
    columns = {"text": "title,body", "label": "stars"}
    assert fields(read_rows(f"jsonl:{path}", "classification", columns)) == [{"text": "b a", "label": "4"}]


def test_a_column_given_to_one_role_is_not_taken_for_another(write):
    path = write("a.jsonl", {"question": "q", "sentence1": "s", "label": "x"})
    rows = read_rows(f"jsonl:{path}", "entailment", {"hypothesis": "sentence1"})
    assert fields(rows) == [{"premise": "q", "hypothesis": "s", "label": "x"}]


@pytest.mark.parametrize(
    ("kind", "row", "columns"),
    [
        ("classification", {"text": "a"}, {"label": "stars"}),
        ("regression", {"first": "a"}, {}),
        ("regression", {"first": "a", "second": "b"}, {}),
        ("multiple_choice", {"context": "a", "choices": ["b", "c"]}, {}),
        ("tagging", {"tokens": ["a", "b"]}, {}),
        ("question_answering", {"context": "a", "question": "b"}, {"answers": "gold"}),
    ],
)
def test_rows_to_predict_need_no_labels(kind, row, columns, write):
    path = write("a.jsonl", row)
    assert fields(read_rows(f"jsonl:{path}", kind, columns, labelled=False)) == [row]


def test_regression_of_one_text_or_two(write):
    path = write("a.csv", "sentence1,sentence2,score\na,b,2.5\nc,d,-1e0\n")
    assert fields(read_rows(f"csv:{path}", "regression")) == [
        {"first": "a", "second": "b", "label": 2.5},
        {"first": "c", "second": "d", "label": -1.0},
    ]
    path = write("b.csv", "review,rating\na,4\n")
    assert fields(read_rows(f"csv:{path}", "regression")) == [{"first": "a", "label": 4.0}]


@pytest.mark.parametrize("label", [1, "1", "warm", "B"])
def test_a_choice_by_its_number_its_text_or_its_name(label, write):
    choices = {"text": ["cold", "warm", "hot"], "label": ["A", "B", "C"]}
    path = write("a.jsonl", {"question": "Soup?", "choices": choices, "answerKey": label})
    assert fields(read_rows(f"jsonl:{path}", "multiple_choice")) == [
        {"context": "Soup?", "choices": ["cold", "warm", "hot"], "label": 1}
    ]


def test_the_names_of_choices_win_over_their_numbers(write):
    for label, index in (("2", 1), (4, 3)):
        choices = {"text": ["3", "2", "1", "0"], "label": ["1", "2", "3", "4"]}
        path = write("a.jsonl", {"question": "Two?", "choices": choices, "answerKey": label})
        assert fields(read_rows(f"jsonl:{path}", "multiple_choice"))[0]["label"] == index
    path = write("a.jsonl", {"question": "Two?", "choices": ["3", "2", "1"], "answer": "2"})
    with pytest.raises(UserError, match="the text of one choice and the index of another"):
        read_rows(f"jsonl:{path}", "multiple_choice")


def test_choices_in_several_columns(write):
    path = write("a.csv", "context,ending0,ending1,label\nHe fell.,He rose.,Tea.,0\n")
    rows = read_rows(f"csv:{path}", "multiple_choice", {"choices": "ending0,ending1"})
    assert fields(rows) == [{"context": "He fell.", "choices": ["He rose.", "Tea."], "label": 0}]


def test_answers_as_in_squad_or_in_plain_columns(write):
    expected = [{"context": "Ann ran.", "question": "Who?", "answers": {"text": ["Ann"], "answer_start": [0]}}]
    plain = write("a.csv", "context,question,answer,answer_start\nAnn ran.,Who?,Ann,0\n")
    assert fields(read_rows(f"csv:{plain}", "question_answering")) == expected
    assert fields(read_rows(f"jsonl:{write('a.jsonl', expected[0])}", "question_answering")) == expected


# --- tensorflow-datasets ----------------------------------------------------------------------------------------------


class TinyTagged(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        features = {
            "tokens": tfds.features.Sequence(tfds.features.Text()),
            "ner": tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "B-PER"])),
            "text": tfds.features.Text(),
            "label": tfds.features.ClassLabel(names=["bad", "good"]),
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples([1, 0, -1]), "test": self._generate_examples([-1])}

    def _generate_examples(self, labels):
        for i, label in enumerate(labels):
            yield i, {"tokens": ["Zoë", "ran"], "ner": [1, 0], "text": f"täle {i}", "label": label}


@pytest.fixture
def tfds_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path))


@pytest.mark.usefixtures("tfds_dir")
def test_a_dataset_as_tensorflow_datasets_reads_it():
    rows = read_rows("tfds:tiny_tagged@train", "classification")
    assert sorted((row.fields["text"], row.fields["label"]) for row in rows) == [("täle 0", "good"), ("täle 1", "bad")]
    assert all(row.place.startswith("example ") for row in rows)
    tagged = read_rows("tfds:tiny_tagged@test", "tagging")
    assert fields(tagged) == [{"tokens": ["Zoë", "ran"], "tags": ["B-PER", "O"]}]
    message = r"^tfds:tiny_tagged@test has no labels: all of its 1 have -1; choose another @SPLIT$"
    with pytest.raises(UserError, match=message):
        read_rows("tfds:tiny_tagged@test", "classification")
    assert fields(read_rows("tfds:tiny_tagged@test", "classification", labelled=False)) == [{"text": "täle 0"}]


DATASETS = {
    "glue/sst2": "classification",
    "glue/cola": "classification",
    "imdb_reviews": "classification",
    "ag_news_subset": "classification",
    "glue/mnli": "entailment",
    "glue/rte": "entailment",
    "glue/qnli": "entailment",
    "snli": "entailment",
    "glue/mrpc": "similarity",
    "glue/qqp": "similarity",
    "paws_wiki": "similarity",
    "glue/stsb": "regression",
}


@pytest.mark.usefixtures("tfds_dir")
@pytest.mark.parametrize("name", DATASETS)
def test_common_datasets_need_no_columns(name):
    with tfds.testing.mock_data(num_examples=2):
        rows = read_rows(f"tfds:{name}", DATASETS[name])
    assert len(rows) == 2
    assert set(rows[0].fields) == set(ROLES[DATASETS[name]])


# Random values of these would contradict each other.
OTHERS = {
    "conll2003": ("tagging", {"tokens": [b"Ann", b"ran"], "pos": [22, 38], "chunks": [11, 21], "ner": [1, 0]}),
    "squad": (
        "question_answering",
        {
            "context": "Zoë ran.".encode(),
            "question": b"What did she do?",
            "answers": {"text": [b"ran"], "answer_start": np.array([4], np.int32)},
            "id": b"",
            "title": b"",
        },
    ),
    "hellaswag": (
        "multiple_choice",
        {
            "activity_label": b"",
            "context": b"He is",
            "endings": np.array([b"up.", b"down."], object),
            "label": np.int32(1),
            "source_id": b"",
            "split_type": b"",
        },
    ),
}
EXPECTED = {
    "conll2003": {"tokens": ["Ann", "ran"], "tags": ["B-PER", "O"]},
    "squad": {
        "context": "Zoë ran.",
        "question": "What did she do?",
        "answers": {"text": ["ran"], "answer_start": [4]},
    },
    "hellaswag": {"context": "He is", "choices": ["up.", "down."], "label": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_datasets_with_lists(name, tmp_path, monkeypatch):
    kind, example = OTHERS[name]
    builder = tfds.builder(name, data_dir=tmp_path, file_format="array_record")
    assert set(example) == set(builder.info.features)
    monkeypatch.setattr(records, "open_tfds", lambda name, split, spec: (builder, [example]))
    assert fields(read_rows(f"tfds:{name}", kind)) == [EXPECTED[name]]


def test_secret_scores_are_no_scores(tmp_path, monkeypatch):
    builder = tfds.builder("glue/stsb", data_dir=tmp_path, file_format="array_record")
    examples = [{"sentence1": b"a", "sentence2": b"b", "label": np.float32(-1), "idx": np.int32(0)}] * 2
    monkeypatch.setattr(records, "open_tfds", lambda name, split, spec: (builder, examples))
    with pytest.raises(UserError, match=r"^tfds:glue/stsb@test has no labels: all of its 2 have -1"):
        read_rows("tfds:glue/stsb@test", "regression")


# --- mistakes ---------------------------------------------------------------------------------------------------------


MISTAKES = {
    "missing column": (
        "csv", "classification", {}, "text,stars\na,1\n",
        r":2 has no column for label: name it in task\.columns; its columns are text, stars$",
    ),
    "missing given column": (
        "csv", "classification", {"text": "body"}, "text,label\na,1\n",
        r":2 has no column 'body', which task\.columns has for text: its columns are text, label$",
    ),
    "two columns for a label": (
        "csv", "classification", {"label": "a,b"}, "text,a,b\nx,1,2\n",
        r":2 has no column 'a,b', which task\.columns has for label: its columns are text, a, b$",
    ),
    "ambiguous": (
        "csv", "classification", {}, "review,tweet,label\na,b,1\n",
        r":2 has several columns for text, review, tweet: choose by task\.columns$",
    ),
    "unknown role": (
        "csv", "classification", {"texts": "a"}, "a,label\na,1\n",
        r"^task\.columns names 'texts', which classification does not read: did you mean 'text'\?$",
    ),
    "empty text": (
        "csv", "classification", {}, "text,label\na,1\n ,0\n",
        r":3: text is empty$",
    ),
    "empty label": (
        "csv", "classification", {}, "text,label\na,\n",
        r":2: label is empty$",
    ),
    "null label": (
        "jsonl", "classification", {}, '{"text": "a", "label": null}',
        r":1: label is not a label but 'None'$",
    ),
    "text that is none": (
        "jsonl", "classification", {}, '\n{"text": 5, "label": 1}',
        r":2: text is not a text but '5'$",
    ),
    "too few cells": (
        "csv", "classification", {}, "text,label\na\n",
        r":2 has 1 cells, but there are 2 columns, with ",
    ),
    "too many cells": (
        "tsv", "classification", {}, "text\tlabel\na\t1\t\n",
        r":2 has 3 cells, but there are 2 columns, with ",
    ),
    "open quote": (
        "csv", "classification", {}, 'text,label\na,1\n"b,1\nc,1',
        r":3 is malformed: unexpected end of data$",
    ),
    "same names": (
        "csv", "classification", {}, "text,text\na,1\n",
        r":1 has a duplicate column name: text, text$",
    ),
    "only a header": (
        "csv", "classification", {}, "text,label\n",
        r"^csv:.* has no rows$",
    ),
    "no JSON": (
        "jsonl", "classification", {}, '{"text": "a", "label": 1}\n{"text"',
        r":2 is not JSON: ",
    ),
    "no object": (
        "jsonl", "classification", {}, "[1]",
        r":1 is not a JSON object, as each line must be$",
    ),
    "number": (
        "csv", "regression", {}, "text,score\na,1\nb,good\n",
        r":3: label is not a number but 'good'$",
    ),
    "not a number": (
        "csv", "regression", {}, "text,score\na,nan\n",
        r":2: label is not a number but 'nan'$",
    ),
    "lengths": (
        "jsonl", "tagging", {}, '{"tokens": ["a", "b"], "tags": ["x"]}',
        r":1 has 2 tokens and 1 tags$",
    ),
    "empty token": (
        "jsonl", "tagging", {}, '{"tokens": ["a", ""], "tags": ["x", "y"]}',
        r":1: tokens\[1\] is empty$",
    ),
    "no tokens": (
        "jsonl", "tagging", {}, '{"tokens": [], "tags": []}',
        r":1: tokens is empty$",
    ),
    "hash": (
        "conll", "tagging", {}, "#one\na O\n",
        r":2 has 2 columns, but line 1 of its sentence 1$",
    ),
    "no tag": (
        "conll", "tagging", {}, "a O\n\nb\n",
        r":3 has no column for tags: .* its columns are 0, tokens$",
    ),
    "columns": (
        "conll", "tagging", {}, "a O\nb b O\n",
        r":2 has 3 columns, but line 1 of its sentence 2$",
    ),
    "number of a column": (
        "conll", "tagging", {"tags": "2"}, "a O\n",
        r":1 has no column '2', which task\.columns has",
    ),
    "choice": (
        "csv", "multiple_choice", {"choices": "a,b"}, "context,a,b,label\nx,y,z,2\n",
        r":2: label '2' is none of its 2 choices: write 0 for the first$",
    ),
    "two choices": (
        "csv", "multiple_choice", {"choices": "a,b"}, "context,a,b,label\nx,1,0,0\n",
        r":2: label '0' is the text of one choice and the index of another$",
    ),
    "choices": (
        "csv", "multiple_choice", {}, "context,choices,label\nx,y,0\n",
        r":2: choices is not a list but 'y'$",
    ),
    "answer": (
        "csv", "question_answering", {}, "context,question,answer,answer_start\nAnn ran.,Who?,Ann,1\n",
        r":2: the answer 'Ann' is not at character 1 of its context$",
    ),
    "answer_start": (
        "csv", "question_answering", {}, "context,question,answer,answer_start\nAnn,Who?,Ann,-1\n",
        r":2: answer_start is not a whole number but '-1'$",
    ),
    "no answer": (
        "jsonl", "question_answering", {},
        '{"context": "a", "question": "b", "answers": {"text": [], "answer_start": []}}',
        r":1: answers needs one or more texts, and a start for each$",
    ),
    "answers": (
        "jsonl", "question_answering", {}, '{"context": "a", "question": "b", "answers": "a"}',
        r":1: answers is not of the form",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_one_line_with_its_place(name, write):
    scheme, kind, columns, content, message = MISTAKES[name]
    path = write(f"rows.{scheme}", content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(f"{scheme}:{path}", kind, columns)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith((str(path), f"{scheme}:{path}", "task.columns"))


# --- held out ---------------------------------------------------------------------------------------------------------


def test_every_kth_row_is_held_out():
    rows = [Row({"text": str(i)}, f"a.csv:{i}") for i in range(23)]
    train, validation = split_rows(rows, 0.1)
    assert [row.fields["text"] for row in validation] == ["9", "19"]
    assert sorted(train + validation, key=rows.index) == rows
    assert [len(part) for part in split_rows(rows[:2], 0.1)] == [1, 1]
    with pytest.raises(UserError, match=r"^a\.csv:0 is the only row, so none can be held out"):
        split_rows(rows[:1], 0.1)
