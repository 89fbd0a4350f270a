"""What a sweep leaves when it ends: its table, and the names of the members that failed."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from gptjax.comparison.runs import choose_quantity, group_runs, read_runs
from gptjax.comparison.tables import comparison_table, runs_csv
from gptjax.config import UserError
from gptjax.files import write_whole
from gptjax.launch import attempts
from gptjax.launch.members import Member
from gptjax.launch.scheduler import how


def write_tables(workdir: Path, done: Sequence[Member], last_steps: Mapping[str, int]) -> str:
    """Writes table.txt and table.csv of the members that are done; returns the table.

    They have no measured times, so that a sweep which was killed and resumed gives the same bytes as one which was not.

    Args:
      last_steps: of members whose later records do not count, by name.

    Raises:
      UserError: the directory cannot be written, or a file of a member is damaged.
    """
    runs = []
    for member in done:
        (run,) = read_runs([member.workdir], lambda text: None)
        last = last_steps.get(member.name, math.inf)
        records = [record for record in run.records if record["step"] <= last]
        runs.append(dataclasses.replace(run, name=member.name, records=records))
    quantity = choose_quantity(runs, "validation", None)
    groups = group_runs(runs, lambda text: None)
    table = comparison_table(groups, quantity, speed=False)
    try:
        write_whole(workdir / "table.txt", table)
        write_whole(workdir / "table.csv", runs_csv(groups, quantity, speed=False))
    except OSError as error:
        raise UserError(f"cannot write in --workdir={workdir}: {error.strerror}") from None
    return table


def failures(members: Sequence[Member], failed: Mapping[str, int]) -> list[str]:
    """A line for each member that failed: its name, how, the last line of its log, and the log."""
    return [
        f"{member.name}: {how(failed[member.name])}: {attempts.last_line(member)} ({member.log})"
        for member in members
        if member.name in failed
    ]
