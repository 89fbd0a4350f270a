"""Tables of trained runs, to which scaling laws are fitted, and CSV files of them."""

import csv
import dataclasses
import hashlib
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config import UserError, nearest
from gptjax.files import read_bytes
from gptjax.scaling.laws import Floats

NUMBERS = ("parameters", "tokens", "flops", "loss", "pass_rate")
# Common names of the columns in other people's tables, in lower case.
SYNONYMS = {
    "parameters": ("n", "params", "num_params", "n_params", "model size"),
    "tokens": ("d", "num_tokens", "n_tokens", "training tokens"),
    "flops": ("c", "flop", "compute", "training flop", "training flops"),
    "loss": ("l", "val_loss", "validation_loss"),
    "pass_rate": ("pass rate",),
    "name": ("run", "id"),
}
MAX_CSV_BYTES = 100_000_000


@dataclasses.dataclass(frozen=True)
class RunTable:
    """Runs, or several points of the training curves of each.

    Attributes:
      source: where they are from, for messages.
      names: (n,), the run of each row.
      columns: (n,) float64 arrays, some of parameters, tokens, flops, loss, pass_rate; all positive.
      sha256: of the data.
    """

    source: str
    names: tuple[str, ...]
    columns: dict[str, Floats]
    sha256: str

    def __len__(self) -> int:
        return len(self.names)

    def take(self, rows: Sequence[int] | Any) -> "RunTable":
        """Returns the table of some rows, by indices or by a mask."""
        indices = np.arange(len(self))[np.asarray(rows)]
        columns = {name: values[indices] for name, values in self.columns.items()}
        return dataclasses.replace(self, names=tuple(self.names[i] for i in indices), columns=columns)

    def rows(self) -> list[dict[str, Any]]:
        """Returns the rows for JSON."""
        numbers = zip(*(values.tolist() for values in self.columns.values()), strict=True)
        return [
            {"name": name} | dict(zip(self.columns, row, strict=True))
            for name, row in zip(self.names, numbers, strict=True)
        ]

    def needs(self, *columns: str) -> None:
        """Raises UserError unless the table has these columns."""
        for name in columns:
            if name not in self.columns:
                raise UserError(f"{self.source} has no {name}, which this law needs: it has {', '.join(self.columns)}")


def complete(columns: Mapping[str, Floats]) -> dict[str, Floats]:
    """Adds the one of parameters, tokens and flops that is missing, by C = 6 N D (Kaplan et al. 2020, section 2.1)."""
    found = dict(columns)
    if "flops" not in found and {"parameters", "tokens"} <= set(found):
        found["flops"] = 6 * found["parameters"] * found["tokens"]
    elif "tokens" not in found and {"parameters", "flops"} <= set(found):
        found["tokens"] = found["flops"] / (6 * found["parameters"])
    elif "parameters" not in found and {"tokens", "flops"} <= set(found):
        found["parameters"] = found["flops"] / (6 * found["tokens"])
    return found


def read_csv(path: Path, given: Mapping[str, str], needed: Sequence[str], where: Mapping[str, str]) -> RunTable:
    """Reads runs from a CSV file with a header.

    Args:
      given: column of the file by our name (parameters, tokens, flops, loss, pass_rate, name); others are found by
        common names.
      needed: our names that must be there, after `complete`.
      where: value by column of the file: only rows with these values are read.

    Raises:
      UserError: the file cannot be read, lacks a column, or has a value that is not a positive number.
    """
    try:
        content = read_bytes(path, MAX_CSV_BYTES)
        lines = list(csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True))
    except FileNotFoundError:
        raise UserError(f"there is no file {path}") from None
    except (OSError, ValueError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not lines:
        raise UserError(f"{path} is empty: its first line must name the columns")
    header, rows = lines[0], [(number, row) for number, row in enumerate(lines[1:], start=2) if row]
    places = _places(path, header, given)
    for name in where:
        if name not in header:
            raise UserError(f"{path} has no column {name!r}{nearest(name, header)}")
    for number, row in rows:
        if len(row) != len(header):
            raise UserError(f"{path}:{number} has {len(row)} values for {len(header)} columns")
    rows = [(n, row) for n, row in rows if all(row[header.index(name)] == value for name, value in where.items())]
    if not rows:
        raise UserError(f"{path} has no rows{' with these values of --where' if where else ''}")
    columns = {
        name: np.array([_number(path, n, header[places[name]], row[places[name]], name) for n, row in rows], np.float64)
        for name in NUMBERS
        if name in places
    }
    columns = complete(columns)
    for name in needed:
        if name not in columns:
            raise UserError(f"{path} has no column of {name}: name it by --columns={name}=COLUMN ({', '.join(header)})")
    names = [row[places["name"]] if "name" in places else str(n) for n, row in rows]
    return RunTable(str(path), tuple(names), columns, hashlib.sha256(content).hexdigest())


def _places(path: Path, header: list[str], given: Mapping[str, str]) -> dict[str, int]:
    """The position of each of our columns in the header."""
    places = {}
    for name, column in given.items():
        if name not in (*NUMBERS, "name"):
            raise UserError(f"--columns names an unknown column {name!r}{nearest(name, (*NUMBERS, 'name'))}")
        if column not in header:
            raise UserError(
                f"{path} has no column {column!r}, which --columns names for {name}{nearest(column, header)}"
            )
        places[name] = header.index(column)
    for name, others in SYNONYMS.items():
        matches = [i for i, column in enumerate(header) if column.strip().lower() in (name, *others)]
        if name not in places and matches:
            if len(matches) > 1:
                choices = ", ".join(repr(header[i]) for i in matches)
                raise UserError(f"{path} has several columns of {name}, {choices}: choose by --columns={name}=COLUMN")
            places[name] = matches[0]
    return places


def _number(path: Path, line: int, column: str, text: str, name: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        never = ": leave out problems that a model never solves, for all models" if name == "pass_rate" else ""
        raise UserError(f"{path}:{line}: {column}={text} is not a positive number{never}")
    if name == "pass_rate" and value > 1:
        raise UserError(f"{path}:{line}: {column}={text} is above 1, and a pass rate is a share")
    return value


def mean_surprise(runs: RunTable) -> RunTable:
    """Returns one row for each amount of compute, with the mean of -log(pass rate) over its problems as "surprise".

    A problem that a model never solves has an infinite value: OpenAI 2023 (GPT-4), section 3.2, fits the problems that
    models of all sizes solve sometimes.

    Raises:
      UserError: the models have different numbers of problems, so that their means cannot be compared.
    """
    flops, each = np.unique(runs.columns["flops"], return_inverse=True)
    counts = np.bincount(each)
    if len(set(counts.tolist())) > 1:
        raise UserError(
            f"{runs.source} has {counts.min()} problems for one amount of compute and {counts.max()} for another: fit "
            "the problems that all models have"
        )
    means = np.bincount(each, weights=-np.log(runs.columns["pass_rate"])) / counts
    if not (means > 0).all():
        raise UserError(f"{runs.source} has a model that solves every problem always: leave it or these problems out")
    names = tuple(f"{value:.6g}" for value in flops)
    return RunTable(runs.source, names, {"flops": flops, "surprise": means}, runs.sha256)
