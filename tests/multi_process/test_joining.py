"""Processes connect, and end together: quickly, each with one line that names the reason."""

from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("join_and.py")
GOES_ON = "run the same command again in all processes"


def test_three_processes_share_their_devices_and_values(processes):
    results = processes(SCRIPT, count=3, devices=1).wait()
    assert [result.returncode for result in results] == [0, 0, 0]
    got = {"gathered": [[0], [1], [2]], "collective": [0, 1, 2], "first": 7}
    # Nothing but what process 0 prints, though gloo prints in all of them.
    assert [result.stdout for result in results] == [f"{got}\n", "", ""]


@pytest.mark.parametrize(("where", "wait"), [(0, "python"), (0, "collective"), (1, "gather")])
def test_a_killed_process_ends_the_others(processes, reason, where, wait):
    results = processes(SCRIPT, "--what=kill", f"--where={where}", f"--wait={wait}", devices=1).wait()
    assert results[where].returncode == -9
    other = results[1 - where]
    assert other.returncode == 1
    assert reason(other).startswith(f"error: process {where} died")
    assert GOES_ON in reason(other)
    assert "JAX distributed service" not in other.stderr  # which says it in its own way, at length


@pytest.mark.parametrize(("what", "code", "why"), [("mistake", 2, "the disk is full"), ("bug", 1, "see its traceback")])
def test_a_process_that_fails_ends_the_others_with_its_reason(processes, reason, what, code, why):
    results = processes(SCRIPT, f"--what={what}", "--where=1", count=3, devices=1).wait()
    assert [result.returncode for result in results] == [code] * 3
    assert reason(results[1]).startswith("error: process 1: ")
    for result in (results[0], results[2]):
        assert reason(result).startswith("error: process 1 stopped: ")
    assert all(why in reason(result) for result in results)
    assert ("RuntimeError: a bug" in results[1].stderr) == (what == "bug")


def test_processes_started_with_other_flags_are_named(processes, reason):
    results = processes(SCRIPT, devices=1, each={0: ["--where=0"], 1: ["--where=1"]}).wait()
    assert [result.returncode for result in results] == [2, 2]
    for result in results:
        assert "process 1 has --where=1, process 0 has --where=0" in reason(result)
