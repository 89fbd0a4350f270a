"""Says of new texts what a fine-tuned model has learned to say.

python -m gptjax.predict --workdir=runs/tweets --input=texts.txt
echo "What a day!" | python -m gptjax.predict --workdir=runs/tweets
python -m gptjax.predict --workdir=runs/mnli_lora,runs/tweets_lora --source=jsonl:new.jsonl --output=said.jsonl

A line of --input is a text; of tagging its words, with blanks between. A .jsonl file, the input of tasks that read
several texts, and any input with --input_format=jsonl have a JSON object a line, with the texts by name. Each line of
the output is a JSON object: what was read and, as "predicted", the label, value, tags or answer. Several workdirs that
started from the same weights share them in memory.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags, logging

from gptjax import cli
from gptjax.config import TaskConfig, UserError, read_config
from gptjax.data import text_files
from gptjax.files import expand
from gptjax.parallel import program_cache

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a fine-tuned run; several, with commas between.")
INPUT = flags.DEFINE_string("input", None, "File with an example a line; default, and -: standard input.")
INPUT_FORMAT = flags.DEFINE_enum(
    "input_format", None, ["text", "jsonl"], "Of --input; default: jsonl by the file's name or for several texts."
)
SOURCE = flags.DEFINE_string("source", None, "Instead: rows in a form of data.source, such as csv:new.csv.")
COLUMNS = flags.DEFINE_string("columns", None, "Of --source: ROLE=COLUMN,...; default: the run's task.columns.")
OUTPUT = flags.DEFINE_string("output", None, "File for the predictions; default: standard output.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", 32, "Examples at once, over all devices.", lower_bound=1)
MESH = flags.DEFINE_string("mesh", "", "Devices by axis, such as fsdp=2,tensor=4; data takes what is left.")
CACHE_DIR = cli.define_cache_dir()


def main() -> None:
    if WORKDIR.value is None:
        raise UserError("needs --workdir=DIR of a fine-tuned run")
    if INPUT.value is not None and SOURCE.value is not None:
        raise UserError("--input and --source are two ways to say the same: give one")
    output = None if OUTPUT.value is None else cli.output_file("output", OUTPUT.value)
    import jax  # after the checks: these take seconds to import

    from gptjax.metrics.report_files import write_predictions
    from gptjax.parallel.mesh import make_mesh
    from gptjax.stages.finetune.predictor import load_predictor
    from gptjax.stages.trained_model import parse_mesh

    mesh = make_mesh(parse_mesh(MESH.value))
    workdirs = [expand(part) for part in WORKDIR.value.split(",")]
    lines: list[tuple[str, str]] | None = None
    program_cache.use(expand(CACHE_DIR.value))
    as_json = is_json_input([read_config(workdir).task.kind for workdir in workdirs])
    given: dict[Path, Any] = {}
    said: list[list[dict[str, Any]]] = []
    records: list[dict[str, Any]] = []
    with jax.set_mesh(mesh):
        for workdir in workdirs:
            config, predict = load_predictor(workdir, mesh, BATCH_SIZE.value, given=given)
            if lines is None:  # once: standard input ends
                lines = read_input() if SOURCE.value is None else []
            rows = read_rows(config.task, lines, as_json)
            said.append(predict(rows).details)
            # Of tasks that read different parts of a row, all of them.
            read = records or [{} for _ in rows]
            records = [record | row.fields for record, row in zip(read, rows, strict=True)]
    for record, of_row in zip(records, zip(*said, strict=True), strict=True):
        record["predicted"] = of_row[0] if len(workdirs) == 1 else dict(zip(map(str, workdirs), of_row, strict=True))
    if output is not None:
        write_predictions(output, records)
        return
    for record in records:
        print(json.dumps(record, ensure_ascii=False))


def is_json_input(kinds: Sequence[str]) -> bool:
    """Whether --input is JSON lines: by its flag, by its name, or because a task of these kinds reads several texts."""
    if INPUT_FORMAT.value is not None:
        return INPUT_FORMAT.value == "jsonl"
    if INPUT.value is not None and text_files.is_json_lines(INPUT.value):
        return True
    return any(len(set(roles) - set(optional)) > 1 for roles, optional in map(_roles, kinds))


def _roles(kind: str) -> tuple[list[str], list[str]]:
    """What a kind of task reads, and what of that may be absent."""
    from gptjax.data.labelled import ROLES, TARGETS

    return [role for role in ROLES[kind] if role not in TARGETS], ["second"] if kind == "regression" else []


def read_rows(task: TaskConfig, lines: list[tuple[str, str]], as_json: bool) -> list[Any]:
    """The rows to predict, without labels: of --source, or of `lines`, each behind its place.

    Raises:
      UserError: names the line of one that cannot be read.
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
        return labelled.read_rows(SOURCE.value, task.kind, columns, labelled=False)
    roles, optional = _roles(task.kind)
    if as_json:
        records = [(record, place) for record, place in text_files.json_objects(lines)]
    else:
        key, texts = roles[0], [(line.strip(), place) for place, line in lines if line.strip()]
        records = [({key: split_words(text) if key == "tokens" else text}, place) for text, place in texts]
        if texts and all(text.startswith("{") and _is_json(text) for text, _ in texts):
            logging.warning("every line is JSON and is read as a text: --input_format=jsonl reads its fields")
    rows = [labelled.Row(_fields(task.kind, roles, optional, record, place), place) for record, place in records]
    if not rows:
        raise UserError("there is nothing to predict: each line of --input is an example")
    return rows


def read_input() -> list[tuple[str, str]]:
    """The lines of --input, each behind its place."""
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
    """What the task reads of a record; UserError where it lacks a text."""
    fields = {role: record[role] for role in roles if role in record}
    for role in roles:
        value = fields.get(role)
        if role in optional and value is None:
            continue
        several = role in ("tokens", "choices")
        texts = value if several and isinstance(value, list) else [] if several else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{place} has no {role}: {kind} reads {', '.join(roles)}, as JSON objects")
    return fields


if __name__ == "__main__":
    cli.run(main)
