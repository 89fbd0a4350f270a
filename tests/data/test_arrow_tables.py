"""Parquet files and datasets that `datasets` saved: documents, rows with named classes, and user errors."""

import json
import tracemalloc
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptjax.config import UserError
from gptjax.data import arrow_tables
from gptjax.data.conversations import read_conversations, read_rankings
from gptjax.data.labelled import read_rows
from gptjax.data.sources import open_source
from gptjax.data.text_files import Utf8

CLASSES = {"names": ["negative", "positive"], "_type": "ClassLabel"}


def read(spec: str, **options: Any) -> list[str]:
    return list(open_source(spec, **options).documents())


def declared(table: pa.Table, **features: Any) -> pa.Table:
    """Returns a table with the metadata that `datasets` writes."""
    return table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def save_to_disk(directory: Path, *tables: pa.Table) -> Path:
    """Writes what `datasets.Dataset.save_to_disk` writes, one file for each table."""
    directory.mkdir(parents=True)
    names = [f"data-{i:05}-of-{len(tables):05}.arrow" for i in range(len(tables))]
    for name, table in zip(names, tables, strict=True):
        with pa.ipc.new_stream(directory / name, table.schema) as stream:
            stream.write_table(table, max_chunksize=300)
    (directory / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return directory


# --- documents --------------------------------------------------------------------------------------------------------


def test_rows_of_a_column_are_documents(tmp_path: Path) -> None:
    texts = [f"text {i}" for i in range(1000)]
    pq.write_table(pa.table({"id": range(1000), "text": texts}), tmp_path / "a.parquet", row_group_size=300)
    encoded = pa.table({"text": pa.array(["x", "", "y"]).dictionary_encode(), "#": pa.array(["p", "q", "r"])})
    pq.write_table(encoded, tmp_path / "b#1.parquet")
    pq.write_table(pa.table({"body": pa.array([b"raw", "ü".encode()])}), tmp_path / "c.parquet")
    assert read(f"parquet:{tmp_path}/[ab]*.parquet") == [*texts, "x", "y"]
    assert read(f"parquet:{tmp_path}/b#1.parquet##") == ["p", "q", "r"]
    assert read(f"parquet:{tmp_path}/c.parquet#body") == ["raw", "ü"]


def test_a_saved_dataset(tmp_path: Path) -> None:
    tables = [pa.table({"text": [f"{part} {i}" for i in range(500)]}) for part in "ab"]
    save_to_disk(tmp_path / "one", *tables)
    assert read(f"arrow:{tmp_path}/one") == [text.as_py() for table in tables for text in table["text"]]
    save_to_disk(tmp_path / "two/train", pa.table({"body": ["train"]}))
    save_to_disk(tmp_path / "two/test", pa.table({"body": ["test"]}))
    (tmp_path / "two/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert read(f"arrow:{tmp_path}/two#body") == ["train"]
    assert read(f"arrow:{tmp_path}/two@test#body") == ["test"]


def test_fingerprints_are_those_of_content_and_column(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "body": ["b"]}), tmp_path / "a.parquet")
    spec = f"parquet:{tmp_path}/a.parquet"
    before = open_source(spec).fingerprint()
    assert open_source(f"{spec}#body").fingerprint() != before
    assert open_source(f"{spec}#text").fingerprint() == before
    pq.write_table(pa.table({"text": ["c"], "body": ["b"]}), tmp_path / "a.parquet")
    assert open_source(spec).fingerprint() != before


def test_memory_is_bounded_by_rows_not_by_the_file(tmp_path: Path) -> None:
    """32 MB in one row group, in pages of 1 MB."""
    table = pa.table({"text": [f"{i:>16384}" for i in range(2000)]})
    pq.write_table(table, tmp_path / "a.parquet", compression="none", write_batch_size=32)
    del table
    before = pa.total_allocated_bytes()
    tracemalloc.start()
    arrow = max(pa.total_allocated_bytes() for _ in open_source(f"parquet:{tmp_path}/a.parquet").documents())
    python = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert arrow - before + python < 16e6


def test_nulls_and_invalid_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"caf\xe9", None, b"fine"])
    texts = pa.Array.from_buffers(pa.string(), 3, raw.buffers())
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    source = open_source(f"parquet:{tmp_path}/a.parquet", on_corrupt="skip")
    assert list(source.documents()) == ["caf\ufffd", "fine"]
    assert (source.replaced_bytes, source.skipped) == (1, 1)
    with pytest.raises(UserError, match=r"row 1 of .*a\.parquet: column 'text' is null"):
        read(f"parquet:{tmp_path}/a.parquet")
    with pytest.raises(UserError, match=r"row 0 of .*a\.parquet is not UTF-8 at byte 3"):
        read(f"parquet:{tmp_path}/a.parquet", invalid_utf8="error")


# --- user errors ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("parquet:DIR/a.parquet#body", r"DIR/a\.parquet has no column 'body': choose one with #FIELD: id, text$"),
        ("parquet:DIR/a.parquet#id", r"DIR/a\.parquet: column 'id' is not text but int64: choose another with #FIELD$"),
        ("parquet:DIR/cut.parquet", r"cannot read DIR/cut\.parquet: it is not a whole Parquet file: "),
        ("parquet:DIR/flipped.parquet", r"cannot read DIR/flipped\.parquet: it is not a whole Parquet file: "),
        ("parquet:DIR/none.parquet", "no file matches"),
        ("parquet:", r"malformed source 'parquet:': write parquet:GLOB\[#FIELD\]"),
        ("arrow:DIR/saved@test", "DIR/saved has no splits: remove @test"),
        ("arrow:DIR/dict@x", "DIR/dict has no split 'x': choose one with @SPLIT: train, test"),
        ("arrow:DIR/cut", r"cannot read DIR/cut/data.*: it is not a whole Arrow stream: its end is missing"),
        ("arrow:DIR/lacks", "DIR/lacks lacks the file ../a.arrow, which its state.json names: copy it again"),
        ("arrow:DIR", "DIR is not a dataset saved by datasets.save_to_disk"),
        ("arrow:DIR/none", "arrow:DIR/none names DIR/none, which is not a directory"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, spec: str, message: str) -> None:
    table = pa.table({"id": range(500), "text": [f"text {i}" for i in range(500)]})
    pq.write_table(table, tmp_path / "a.parquet", write_page_checksum=True, use_dictionary=False, compression="none")
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "cut.parquet").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "flipped.parquet").write_bytes(whole.replace(b"text 250", b"text 251"))
    save_to_disk(tmp_path / "saved", table)
    cut = next(save_to_disk(tmp_path / "cut", table).glob("*.arrow"))
    cut.write_bytes(cut.read_bytes()[:-8])  # at the end of a batch
    (tmp_path / "dict").mkdir()
    (tmp_path / "dict/dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    (tmp_path / "lacks").mkdir()
    (tmp_path / "lacks/state.json").write_text('{"_data_files": [{"filename": "../a.arrow"}]}')
    with pytest.raises(UserError, match=message.replace("DIR", str(tmp_path))) as error:
        read(spec.replace("DIR", str(tmp_path)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_random_changes_are_user_errors_or_harmless(tmp_path: Path, kind: Literal["parquet", "arrow"]) -> None:
    table = pa.table({"text": [f"text {i}" for i in range(40)], "list": [[{"a": "x"}]] * 40})
    path, random = tmp_path / "a.parquet", np.random.default_rng(0)
    pq.write_table(table, path)
    if kind == "arrow":
        path = next(save_to_disk(tmp_path / "saved", table).glob("*.arrow"))
    whole, refused = path.read_bytes(), 0
    for _ in range(300):
        damaged = bytearray(whole)
        damaged[random.integers(len(whole))] = random.integers(256)
        path.write_bytes(damaged)
        try:
            list(arrow_tables.column_values(path, "text", kind))
            list(arrow_tables.rows(path, Utf8("replace"), None, kind))
        except UserError:
            refused += 1
    assert 0 < refused < 300


# --- records ----------------------------------------------------------------------------------------------------------


def test_labelled_rows_have_the_names_of_classes(tmp_path: Path) -> None:
    table = pa.table({"sentence": ["a", "b", "c"], "label": [0, 1, -1]})
    pq.write_table(
        declared(table, sentence={"dtype": "string", "_type": "Value"}, label=CLASSES), tmp_path / "a.parquet"
    )
    save_to_disk(tmp_path / "saved", declared(table, label=CLASSES))
    for spec in (f"parquet:{tmp_path}/a.parquet", f"arrow:{tmp_path}/saved"):
        rows = read_rows(spec, "classification")
        assert [tuple(row.fields.values()) for row in rows] == [("a", "negative"), ("b", "positive")]
    assert read_rows(f"parquet:{tmp_path}/a.parquet", "classification")[1].place == f"row 1 of {tmp_path}/a.parquet"
    pq.write_table(declared(pa.table({"text": ["a"], "label": [7]}), label=CLASSES), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"row 0 of .*b\.parquet has the class 7, but only 2 classes have names"):
        read_rows(f"parquet:{tmp_path}/b.parquet", "classification")


def test_tags_and_answers(tmp_path: Path) -> None:
    tags = {"feature": {"names": ["O", "PER"], "_type": "ClassLabel"}, "length": -1, "_type": "Sequence"}
    table = declared(pa.table({"tokens": [["Ada", "ran"]], "ner_tags": [[1, 0]]}), ner_tags=tags)
    pq.write_table(table, tmp_path / "tags.parquet")
    (row,) = read_rows(f"parquet:{tmp_path}/tags.parquet", "tagging")
    assert row.fields == {"tokens": ["Ada", "ran"], "tags": ["PER", "O"]}
    answers = {"feature": {"text": {"_type": "Value"}, "answer_start": {"_type": "Value"}}, "_type": "Sequence"}
    squad = {
        "context": ["It is Ada."],
        "question": ["Who?"],
        "answers": [{"text": ["Ada"], "answer_start": [6]}],
    }
    pq.write_table(declared(pa.table(squad), answers=answers), tmp_path / "squad.parquet")
    (row,) = read_rows(f"parquet:{tmp_path}/squad.parquet", "question_answering")
    assert row.fields["answers"] == {"text": ["Ada"], "answer_start": [6]}


def test_conversations_and_rankings(tmp_path: Path) -> None:
    """A table has the fields of all messages in each of them, as nulls."""
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", "tool_calls": None}]
    table = pa.table({"messages": pa.array([said]), "system": pa.array([None], pa.string())})
    pq.write_table(table, tmp_path / "a.parquet")
    for harmony in (False, True):
        (conversation,) = read_conversations(f"parquet:{tmp_path}/a.parquet", harmony=harmony)
        assert [(m.role, m.content) for m in conversation.messages] == [("user", "Hi"), ("assistant", "Hello")]
    save_to_disk(tmp_path / "saved", pa.table({"prompt": ["Hi"], "chosen": ["Hello"], "rejected": ["Go"]}))
    (ranking,) = read_rankings(f"arrow:{tmp_path}/saved")
    assert ranking.completions == ("Hello", "Go")
    with pytest.raises(UserError, match=r"malformed source 'parquet:' of labelled rows: write parquet:GLOB"):
        read_conversations("parquet:")


def test_rows_with_invalid_utf8(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"caf\xe9"])
    texts = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    table = pa.table({"text": texts, "label": ["a", "b"], "extra": pa.array([[{"x": "1"}], None])})
    pq.write_table(table, tmp_path / "a.parquet")
    rows = read_rows(f"parquet:{tmp_path}/a.parquet", "classification", {"text": "text"})
    assert [row.fields["text"] for row in rows] == ["fine", "caf\ufffd"]
    with pytest.raises(UserError, match=r"row 1 of .*a\.parquet is not UTF-8 at byte 3"):
        read_rows(f"parquet:{tmp_path}/a.parquet", "classification", {"text": "text"}, invalid_utf8="error")
