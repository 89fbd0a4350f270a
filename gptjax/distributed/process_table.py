"""What /proc says of processes on Linux."""

from pathlib import Path


def stat_fields(path: str) -> list[str]:
    """Returns the fields of a stat file of /proc from the third (state) on; empty if it cannot be read."""
    try:
        return Path(path).read_text().rpartition(")")[2].split()
    except OSError:
        return []


def has_running_threads(pid: int) -> bool:
    """Whether a process has not ended. A zombie has, but only when its threads have too: one may still be writing."""
    tasks = Path(f"/proc/{pid}/task").glob("*/stat")
    return any(stat_fields(str(task))[:1] not in ([], ["Z"], ["X"]) for task in tasks)
