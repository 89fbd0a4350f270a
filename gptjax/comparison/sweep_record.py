"""The file sweep.json of a sweep's directory, which names its runs."""

from pathlib import Path
from typing import Any

from gptjax.config import UserError
from gptjax.files import is_plain_name, read_json

SWEEP_FILE = "sweep.json"


def read_record(directory: Path) -> dict[str, Any] | None:
    """Returns the record of a sweep: the overrides of its runs by name, as "members", and more; None: there is none.

    Raises:
      UserError: the record is damaged.
    """
    path = directory / SWEEP_FILE
    if not path.is_file():
        return None
    try:
        record = read_json(path)
        if not isinstance(record, dict) or not isinstance(record.get("members"), dict):
            raise ValueError("it is not the record of a sweep")
        if strange := [name for name in record["members"] if not is_plain_name(name)]:
            raise ValueError(f"{strange[0]!r} is not the name of a run")
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    return record
