"""Predicts labels, values, tags or answers with fine-tuned models.

python -m gptjax.predict --workdir=runs/tweets --input=texts.txt
echo "What a day!" | python -m gptjax.predict --workdir=runs/tweets
python -m gptjax.predict --workdir=runs/mnli_lora,runs/tweets_lora --source=jsonl:new.jsonl --output=predicted.jsonl
python -m gptjax.predict --workdir=runs/tweets --source=csv:test.csv --output=predicted.jsonl --report=report.json

Each line of --input is a text, for tagging its words separated by spaces. A .jsonl file, the input of tasks that read
several texts, and any input with --input_format=jsonl have one JSON object per line, with the texts by name. Each line
of the output is a JSON object: the input and, as "predicted", the label, value, tags or answer. If the rows of --source
have labels, the metrics are printed too, to standard error where standard output has the predictions. Several workdirs
that started from the same weights share them in memory.
"""

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from absl import flags, logging

from gptjax import cli
from gptjax.config import TaskConfig, UserError, read_config
from gptjax.data import text_files
from gptjax.files import expand, write_whole
from gptjax.parallel import program_cache

if TYPE_CHECKING:
    from gptjax.data.labelled import Row
    from gptjax.metrics.task_reports import TaskReport

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a fine-tuned run; several separated by commas.")
BEST = flags.DEFINE_boolean("best", True, "Use the best checkpoint by evaluation.metric; --nobest: the newest.")
STEP = flags.DEFINE_integer("step", None, "Use the checkpoint of this step instead.", lower_bound=0)
INPUT = flags.DEFINE_string("input", None, "File with one example per line; default, and -: standard input.")
INPUT_FORMAT = flags.DEFINE_enum(
    "input_format",
    None,
    ["text", "jsonl"],
    "Format of --input; default: by the file name, or jsonl for tasks with several texts.",
)
SOURCE = flags.DEFINE_string("source", None, "Instead of --input: rows as in data.source, such as csv:new.csv.")
COLUMNS = flags.DEFINE_string("columns", None, "For --source: ROLE=COLUMN,...; default: the run's task.columns.")
OUTPUT = flags.DEFINE_string("output", None, "File for the predictions; default: standard output.")
SCORE = flags.DEFINE_boolean("score", None, "Compute metrics on --source; default: if its rows have labels.")
REPORT = flags.DEFINE_string("report", None, "JSON file for the metrics; needs labels.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples per batch, over all devices.", lower_bound=1)
MESH = flags.DEFINE_string("mesh", "", "Devices by axis, such as fsdp=2,tensor=4; data takes the rest.")
CACHE_DIR = cli.define_cache_dir()


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("needs --workdir=DIR of a fine-tuned run")
    check_flags()
    output = None if OUTPUT.value is None else cli.output_file("output", OUTPUT.value)
    report_file = None if REPORT.value is None else cli.output_file("report", REPORT.value)
    import jax  # after the checks: these take seconds to import

    from gptjax.metrics.report_files import write_predictions
    from gptjax.parallel.mesh import make_mesh
    from gptjax.stages.finetune.predictor import load_predictor, measure
    from gptjax.stages.trained_model import parse_mesh

    mesh = make_mesh(parse_mesh(MESH.value))
    workdirs = [expand(part) for part in WORKDIR.value.split(",")]
    lines: list[tuple[str, str]] | None = None
    program_cache.use(expand(CACHE_DIR.value))
    as_json = is_json_input([read_config(workdir).task.kind for workdir in workdirs])
    base_weights: dict[Path, Any] = {}
    details: list[list[dict[str, Any]]] = []
    reports: dict[str, TaskReport] = {}
    records: list[dict[str, Any]] = []
    with jax.set_mesh(mesh):
        for workdir in workdirs:
            config, predict = load_predictor(
                workdir, mesh, BATCH_SIZE.value, best=BEST.value, step=STEP.value, given=base_weights
            )
            if lines is None:  # standard input can be read only once
                lines = read_input() if SOURCE.value is None else []
            rows = read_rows(config.task, lines, as_json)
            predictions = predict(rows)
            details.append(predictions.details)
            if predictions.loss is not None:
                reports[str(workdir)] = measure(config.task, rows, predictions)
            # Tasks may read different parts of a row: each record has all of them.
            inputs = records or [{} for _ in rows]
            records = [record | row.fields for record, row in zip(inputs, rows, strict=True)]
    for record, predicted in zip(records, zip(*details, strict=True), strict=True):
        record["predicted"] = (
            predicted[0] if len(workdirs) == 1 else dict(zip(map(str, workdirs), predicted, strict=True))
        )
    if output is not None:
        write_predictions(output, records)
    else:
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
    show_reports(reports, report_file)


def check_flags() -> None:
    """Raises UserError for flags that contradict each other."""
    if INPUT.value is not None and SOURCE.value is not None:
        raise UserError("--input and --source exclude each other: give one")
    if STEP.value is not None and flags.FLAGS["best"].present:
        raise UserError("--step and --best both choose the checkpoint: give one")
    if (SCORE.value or REPORT.value is not None) and SOURCE.value is None:
        raise UserError("--score and --report need labelled rows: name them by --source, such as --source=csv:test.csv")
    if SCORE.value is False and REPORT.value is not None:
        raise UserError("--noscore and --report contradict each other: give one")


def show_reports(reports: Mapping[str, "TaskReport"], path: Path | None) -> None:
    """Prints the reports by workdir, if any, and writes them to `path` as JSON, by workdir if there are several."""
    for workdir, report in reports.items():
        title = f"{workdir}\n" if len(reports) > 1 else ""
        # Standard output has the predictions, which other programs may read.
        print(f"{title}{report.text}", end="", file=sys.stderr if OUTPUT.value is None else sys.stdout)
    if path is not None:
        found = {workdir: report.as_json() for workdir, report in reports.items()}
        content = next(iter(found.values())) if len(found) == 1 else found
        try:
            write_whole(path, json.dumps(content, indent=2) + "\n")
        except OSError as error:
            raise UserError(f"cannot write --report={path}: {error.strerror}") from None


def is_json_input(kinds: Sequence[str]) -> bool:
    """Whether --input is JSON lines: by --input_format, by its name, or as one of the tasks reads several texts."""
    if INPUT_FORMAT.value is not None:
        return INPUT_FORMAT.value == "jsonl"
    if INPUT.value is not None and text_files.is_json_lines(INPUT.value):
        return True
    return any(len(set(roles) - set(optional)) > 1 for roles, optional in map(_roles, kinds))


def _roles(kind: str) -> tuple[list[str], list[str]]:
    """Returns the inputs of a kind of task, and which of them are optional."""
    from gptjax.data.labelled import ROLES, TARGETS

    return [role for role in ROLES[kind] if role not in TARGETS], ["second"] if kind == "regression" else []


def read_rows(task: TaskConfig, lines: list[tuple[str, str]], as_json: bool) -> list["Row"]:
    """Reads the rows to predict from --source, with labels if they are to be scored, or from (place, line) pairs.

    Raises:
      UserError: names the first line that cannot be read.
    """
    from gptjax.data import labelled
    from gptjax.data.records import split_words

    columns = dict(task.columns)
    if COLUMNS.value is not None:
        parts = [part.partition("=") for part in COLUMNS.value.split(",")]
        if not all(role and column for role, _, column in parts):
            raise UserError(f"--columns={COLUMNS.value} is not of the form ROLE=COLUMN,...")
        columns = {role: column for role, _, column in parts}
    if SOURCE.value is not None:
        labelled.check_spec(SOURCE.value)
        return read_source(SOURCE.value, task, columns)
    roles, optional = _roles(task.kind)
    if as_json:
        records = [(record, place) for record, place in text_files.json_objects(lines)]
    else:
        key, texts = roles[0], [(line.strip(), place) for place, line in lines if line.strip()]
        records = [({key: split_words(text) if key == "tokens" else text}, place) for text, place in texts]
        if texts and all(text.startswith("{") and _is_json(text) for text, _ in texts):
            logging.warning(
                "every line is JSON but is read as plain text: pass --input_format=jsonl to read its fields"
            )
    rows = [labelled.Row(_fields(task.kind, roles, optional, record, place), place) for record, place in records]
    if not rows:
        raise UserError("there is nothing to predict: each line of --input is an example")
    return rows


def read_source(spec: str, task: TaskConfig, columns: Mapping[str, str]) -> list["Row"]:
    """Reads the rows of --source, with labels if they are to be scored.

    Without --score and --report, labels that cannot be scored are only warned about: the column may be empty.
    """
    from gptjax.data import labelled
    from gptjax.data.task_inputs import NAMED, check_labels

    required = bool(SCORE.value) or REPORT.value is not None
    if required or (SCORE.value is None and has_labels(spec, task.kind, columns)):
        try:
            rows = labelled.read_rows(spec, task.kind, columns)
            if task.kind in NAMED:
                check_labels(rows, task.labels)
            return rows
        except UserError as error:
            if required:
                raise
            logging.warning("not scored: %s", error)
    return labelled.read_rows(spec, task.kind, columns, labelled=False)


def has_labels(spec: str, kind: str, columns: Mapping[str, str]) -> bool:
    """Whether the first record of a source has a column of labels, by the names that `read_rows` knows."""
    from gptjax.data.labelled import ROLES, TARGETS
    from gptjax.data.records import read_records

    record, _ = next(read_records(spec, "replace"), ({}, ""))
    targets = [role for role in TARGETS if role in ROLES[kind] or kind == "question_answering"]
    names = {name for role in targets for name in (role, *ROLES[kind].get(role, ()))}
    names |= {columns[role] for role in targets if role in columns}
    return not names.isdisjoint(record)


def read_input() -> list[tuple[str, str]]:
    """Reads --input; returns (place, line) pairs."""
    return list(text_files.read_lines(None if INPUT.value in (None, "-") else expand(INPUT.value)))


def _is_json(text: str) -> bool:
    try:
        text_files.parse_json(text, "")
    except UserError:
        return False
    return True


def _fields(
    kind: str, roles: Sequence[str], optional: Sequence[str], record: dict[str, Any], place: str
) -> dict[str, Any]:
    """Returns the inputs of the task in a record; UserError if one is missing."""
    fields = {role: record[role] for role in roles if role in record}
    for role in roles:
        value = fields.get(role)
        if role in optional and value is None:
            continue
        several = role in ("tokens", "choices")
        texts = value if several and isinstance(value, list) else [] if several else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{place} has no {role}: {kind} reads {', '.join(roles)} from JSON objects")
    return fields


if __name__ == "__main__":
    cli.run(main)
