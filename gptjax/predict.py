"""Says of new texts what a fine-tuned model has learned to say.

python -m gptjax.predict --workdir=runs/tweets --input=texts.txt
echo "What a day!" | python -m gptjax.predict --workdir=runs/tweets
python -m gptjax.predict --workdir=runs/mnli_lora,runs/tweets_lora --source=jsonl:new.jsonl --output=said.jsonl

A line of --input is a text; of tagging its words, with blanks between; of tasks that read several texts a JSON object
with them by name. Each line of the output is a JSON object: what was read and, as "predicted", the label, value, tags
or answer. Several workdirs that started from the same weights share them in memory.
"""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from absl import flags

from gptjax import cli
from gptjax.config import TaskConfig, UserError
from gptjax.parallel import program_cache

WORKDIR = flags.DEFINE_string("workdir", None, "Directory of a fine-tuned run; several, with commas between.")
INPUT = flags.DEFINE_string("input", None, "File with an example a line; default, and -: standard input.")
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
    import jax  # after the checks: these take seconds to import

    from gptjax.metrics.report_files import write_predictions
    from gptjax.parallel.mesh import make_mesh
    from gptjax.stages.finetune.predictor import load_predictor
    from gptjax.stages.trained_model import parse_mesh

    mesh = make_mesh(parse_mesh(MESH.value))
    workdirs = [Path(part) for part in WORKDIR.value.split(",")]
    lines: list[tuple[str, str]] | None = None
    program_cache.use(Path(CACHE_DIR.value))
    given: dict[Path, Any] = {}
    said: list[list[dict[str, Any]]] = []
    records: list[dict[str, Any]] = []
    with jax.set_mesh(mesh):
        for workdir in workdirs:
            config, predict = load_predictor(workdir, mesh, BATCH_SIZE.value, given=given)
            if lines is None:  # once: standard input ends
                lines = list(_lines()) if SOURCE.value is None else []
            rows = read_rows(config.task, lines)
            said.append(predict(rows).details)
            # Of tasks that read different parts of a row, all of them.
            read = records or [{} for _ in rows]
            records = [record | row.fields for record, row in zip(read, rows, strict=True)]
    for record, of_row in zip(records, zip(*said, strict=True), strict=True):
        record["predicted"] = of_row[0] if len(workdirs) == 1 else dict(zip(map(str, workdirs), of_row, strict=True))
    if OUTPUT.value is not None:
        write_predictions(Path(OUTPUT.value), records)
        return
    for record in records:
        print(json.dumps(record, ensure_ascii=False))


def read_rows(task: TaskConfig, lines: list[tuple[str, str]]) -> list[Any]:
    """The rows to predict, without labels: of --source, or of `lines` and their places.

    Raises:
      UserError: names the line of one that cannot be read.
    """
    from gptjax.data import labelled

    columns = dict(task.columns)
    if COLUMNS.value is not None:
        parts = [part.partition("=") for part in COLUMNS.value.split(",")]
        if not all(role and column for role, _, column in parts):
            raise UserError(f"--columns={COLUMNS.value} is not of the form ROLE=COLUMN,...")
        columns = {role: column for role, _, column in parts}
    if SOURCE.value is not None:
        labelled.check_spec(SOURCE.value)
        return labelled.read_rows(SOURCE.value, task.kind, columns, labelled=False)
    rows = []
    for place, line in lines:
        if line.strip():
            rows.append(labelled.Row(_fields(task, line, place), place))
    if not rows:
        raise UserError("there is nothing to predict: each line of --input is an example")
    return rows


def _lines() -> Iterator[tuple[str, str]]:
    """The lines of the input, and where each is from."""
    path = None if INPUT.value in (None, "-") else Path(INPUT.value).expanduser()
    name = "standard input" if path is None else INPUT.value
    try:
        with nullcontext(sys.stdin) if path is None else path.open(encoding="utf-8") as file:
            yield from ((f"{name}:{number}", line) for number, line in enumerate(file, start=1))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {name}: {error}") from None


def _fields(task: TaskConfig, line: str, place: str) -> dict[str, Any]:
    """What the task reads of a line."""
    from gptjax.data.labelled import ROLES, TARGETS

    line = line.strip()
    roles = [role for role in ROLES[task.kind] if role not in TARGETS]
    if line.startswith("{"):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{place} is not JSON: {error}") from None
        fields = {role: record[role] for role in roles if role in record}
    elif task.kind == "tagging":
        fields = {"tokens": line.split()}
    else:
        fields = {roles[0]: line}
    optional = ("second",) if task.kind == "regression" else ()
    for role in roles:
        value = fields.get(role)
        if role in optional and value is None:
            continue
        several = role in ("tokens", "choices")
        texts = value if several and isinstance(value, list) else [] if several else [value]
        if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
            raise UserError(f"{place} has no {role}: {task.kind} reads {', '.join(roles)}, as JSON objects")
    return fields


if __name__ == "__main__":
    cli.run(main)
